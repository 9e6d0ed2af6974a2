"""What a user can mend. Every message gives the values found, then the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from expo_ray.text import message

T = TypeVar("T")


class ExpoError(Exception):
    """Base of every error whose remedy is in the user's hands. Its text is one line without secrets or control characters."""

    _lines = False

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            *(message(each, lines=self._lines) if isinstance(each, str) else each for each in arguments)
        )


class JobError(ExpoError):
    """The job file or the command line asks for something that cannot be."""


class CheckpointError(ExpoError):
    """One parent is not a checkpoint that can be extrapolated."""


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
    """The store did not answer as it should; the same request may succeed later. The only error that is retried."""


class Problems(ExpoError):
    """Several errors found in one look, so that a user mends them all at once."""

    _lines = True

    def __init__(self, problems: Sequence[ExpoError]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"- {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[type[Problems], tuple[Sequence[ExpoError]]]:
        return Problems, (self.problems,)


class Attempts:
    """Several things to attempt, and what went wrong with any of them.

    Example:
        >>> attempts = Attempts()
        >>> plans = [plan for pair in pairs for plan in attempts.attempt(partial(plan_pair, pair))]
        >>> attempts.end()  # raises, unless all pairs could be planned
    """

    def __init__(self) -> None:
        self.problems: list[ExpoError] = []

    def attempt(self, make: Callable[[], T]) -> list[T]:
        """What `make` makes, alone in a list; or nothing, and its problems are kept."""
        try:
            return [make()]
        except ExpoError as error:
            self.problems += each(error)
            return []

    def end(self) -> None:
        """Tell all problems at once.

        Raises:
            Problems: if there are any.
        """
        if self.problems:
            raise Problems(self.problems)


def each(error: ExpoError) -> tuple[ExpoError, ...]:
    """The errors that `error` stands for: itself, or those of a `Problems`."""
    return error.problems if isinstance(error, Problems) else (error,)


def some(texts: Sequence[str], shown: int = 5) -> str:
    """The first few of many texts, and how many more there are."""
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def in_one_line(error: Exception) -> str:
    """The text of an error, that of several joined."""
    return "; ".join(map(str, each(error))) if isinstance(error, ExpoError) else str(error)
