"""Errors that a user can fix. Every message gives the values, then the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from expo_ray.text import message


class ExpoError(Exception):
    """Base of every error whose remedy is in the user's hands. Its text is one line without secrets or control characters."""

    _lines = False

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            *(message(value, lines=self._lines) if isinstance(value, str) else value for value in arguments)
        )


class JobError(ExpoError):
    """The job file or the command line asks for something that cannot be."""


class CheckpointError(ExpoError):
    """A parent is not a checkpoint that can be extrapolated."""


class PairError(ExpoError):
    """Two parents do not fit each other."""


class RewardError(ExpoError):
    """A reward model or function cannot score, or a response cannot be scored."""


class PromptError(ExpoError):
    """A set of prompts cannot be read, or a prompt cannot be answered."""


class EndpointError(ExpoError):
    """A model's endpoint cannot be reached, or refuses what it is asked."""


class BenchmarkError(ExpoError):
    """A benchmark's prompts, answers or judgments are not what they should be."""


class ArithmeticFault(ExpoError):
    """The weights themselves forbid a usable result: NaN, infinity, overflow."""


class OutputError(ExpoError):
    """The output folder belongs to something else, or cannot hold the result."""


class StorageError(ExpoError):
    """A store refused; asking again would fail the same way."""


class NotFound(StorageError):
    """No such object, folder or bucket."""


class AlreadyExists(StorageError):
    """A put-if-absent found another content in its place."""


class InputChanged(StorageError):
    """An input is no longer the one that was planned."""


class TransientStorageError(StorageError):
    """The store did not answer as it should; the same request may succeed later. The only error that is retried.

    Attributes:
        passes_with_time: false for damage on the way, which a few attempts overcome or none.
    """

    passes_with_time = True


class SlowDown(TransientStorageError):
    """The store is asked too much.

    Attributes:
        retry_after_s: seconds after which it wants to be asked again; 0 if it did not say.
    """

    retry_after_s: float = 0.0


class Problems(ExpoError):
    """Several errors that were found together, so that a user can fix them all at once."""

    _lines = True

    def __init__(self, problems: Sequence[ExpoError]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"- {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[type[Problems], tuple[Sequence[ExpoError]]]:
        return Problems, (self.problems,)


class Collected:
    """Problems of several steps, collected so that all of them are reported at once.

    A block under `catching` that fails leaves its variables unset. So what depends on them stands in the same block, where a
    nested `catching` keeps its steps apart, or after `raise_any`.

    Example:
        >>> problems = Collected()
        >>> with problems.catching():
        ...     plan = plan_pair(pair)
        ...     with problems.catching():
        ...         check_disk(plan)
        ...     with problems.catching():
        ...         check_memory(plan)
        >>> with problems.catching():
        ...     prompts = load_prompts(sources)
        >>> problems.raise_any()
        >>> start(plan, prompts)  # both are there: nothing failed

    Attributes:
        problems: all so far, in the order in which they were found.
    """

    def __init__(self) -> None:
        self.problems: list[ExpoError] = []

    def catching(self) -> Catching:
        """Run the `with` block up to its first `ExpoError`, keep that, and go on after the block."""
        return Catching(self)

    def add(self, error: ExpoError) -> None:
        """Keep a problem; of a `Problems`, each of those that it holds. One that reads as an earlier one is kept once."""
        for problem in problems_of(error):
            if str(problem) not in map(str, self.problems):
                self.problems.append(problem)

    def raise_any(self) -> None:
        """Report all problems at once.

        Raises:
            Problems: if there are any.
        """
        if self.problems:
            raise Problems(self.problems)


class Catching:
    """Context manager of one block of a `Collected`; every other exception passes through.

    A class, because mypy takes a generator with `contextmanager` for one that never swallows an exception.
    """

    def __init__(self, collected: Collected) -> None:
        self._collected = collected

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, ExpoError):
            return False
        self._collected.add(error)
        return True


def problems_of(error: ExpoError) -> tuple[ExpoError, ...]:
    """The errors that `error` stands for: itself, or those of a `Problems`."""
    return error.problems if isinstance(error, Problems) else (error,)


def in_one_line(error: Exception) -> str:
    """The text of an error on one line; that of a `Problems` joined with semicolons."""
    return "; ".join(map(str, problems_of(error))) if isinstance(error, ExpoError) else str(error)
