"""Sets of prompts: read from every form and place, cut and halved reproducibly."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from examples.local_s3 import SeaweedFS
from expo_ray.config import PromptSource
from expo_ray.errors import ExpoError, Problems, PromptError, StorageError
from expo_ray.evaluation.prompts import load_prompts as load_prompts_module
from expo_ray.evaluation.prompts.load_prompts import load_prompt_set, load_prompts
from expo_ray.evaluation.prompts.prompt_set import (
    PromptSet,
    prompt_of,
    store_prompts,
)
from expo_ray.storage import open_store, split_file
from tests.support.eval_data import read_jsonl_gz, real_data

# Line ends to str.splitlines() alone.
TEXT = "one\u2028two\u2029three\u0085four\x0bfive"


def load(source: Path | str, **options: Any) -> PromptSet:
    return load_prompt_set(PromptSource(source=str(source), **options))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="")
    return path


def asked(prompts: PromptSet) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts.prompts]


def sample_set(sizes: dict[str, int]) -> PromptSet:
    prompts = [
        prompt_of([{"role": "user", "content": f"{category} {number}"}], category)
        for category, size in sizes.items()
        for number in range(size)
    ]
    random.Random(0).shuffle(prompts)
    return PromptSet.of("sample", prompts)


# --- forms


def test_rows_are_split_at_newlines_alone(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"prompt": TEXT}, {"prompt": "b"})
    assert asked(load(file)) == [TEXT, "b"]
    (tmp_path / "p.txt").write_bytes(f"{TEXT}\r\n\n  indented \n".encode())
    assert asked(load(tmp_path / "p.txt")) == [TEXT, "  indented "]


def test_every_form_of_a_row(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c", "name": "left out"},
    ]
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    file = jsonl(
        tmp_path / "p.jsonl",
        {"messages": chat, "category": "chat"},
        {"instruction": "i", "dataset": "koala"},
        {"prompt": "q", "messages": answered, "chosen": answered},
        {"question_id": 81, "category": "math", "turns": ["t1", "t2"]},
    )
    first, second, third, fourth = load(file).prompts
    assert [dict(turn) for turn in first.messages] == [*chat[:3], {"role": "user", "content": "c"}]
    assert (second.messages[0]["content"], second.category) == ("i", "koala")
    assert [dict(turn) for turn in third.messages] == [{"role": "user", "content": "q"}]
    assert (fourth.follow_ups, fourth.temperature, fourth.label) == (("t2",), 0.0, "81")
    assert fourth.id != prompt_of(fourth.messages).id


def test_all_bad_rows_are_reported_with_file_line_and_reason(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    jsonl(good, {"prompt": "a"})
    bad = tmp_path / "bad.jsonl"
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": "cut of',
        '["a list"]',
        '{"text": "a"}',
        '{"prompt": 5}',
        '{"prompt": "  "}',
        '{"prompt": "\\ud800"}',
        '{"messages": [{"role": "tool", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
        '{"turns": []}',
    ]
    bad.write_text("\n".join(lines))
    with pytest.raises(Problems) as caught:
        load_prompts([PromptSource(source=str(file)) for file in (bad, good, tmp_path / "none.txt")])
    bad_rows, missing = map(str, caught.value.problems)
    assert bad_rows.startswith(f"{bad}: 10 bad row(s)")
    for line, reason in enumerate(
        ["not valid JSON", "holds list", "has none of `prompt`", "is 5", "is empty", "surrogate", "role 'tool'", "'assistant'",
         "they differ", "is []"],
        start=2,
    ):  # fmt: skip
        assert any(reason in text for text in bad_rows.split("\n") if f"line {line}:" in text), (
            line,
            bad_rows,
        )
    assert "none.txt" in missing


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"a\nb\xe9\n")
    with pytest.raises(PromptError, match=r"latin\.txt, line 2: is not UTF-8"):
        load(tmp_path / "latin.txt")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PromptError, match="holds no prompts"):
        load(tmp_path / "empty.jsonl")
    (tmp_path / "one.json").write_text('{"prompt": "a"}')
    with pytest.raises(PromptError, match="one list of rows"):
        load(tmp_path / "one.json")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9])
    with pytest.raises(PromptError, match="is not whole"):
        load(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PromptError, match="Parquet"):
        load(tmp_path / "no.parquet")
    with pytest.raises(PromptError, match="`ultrafeedback` or `alpaca-eval`"):
        load("ultrafedback")


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"instruction": "Translate.", "input": "Hola", "output": "-"}, ["Translate.\n\nHola"]),
        (
            {"instruction": "Answer.", "context": "A text.", "response": "-", "category": "qa"},
            ["Answer.\n\nA text."],
        ),
        ({"instruction": "Say hello.", "input": "", "output": "-"}, ["Say hello."]),
        ({"system": "Be brief.", "prompt": "q"}, ["Be brief.", "q"]),
        ({"instruction": "q2", "input": "x", "history": [["q1", "a1"]]}, ["q1", "a1", "q2\n\nx"]),
        ({"prompt": "Read: a text. Why?", "context": "a text.", "question": "Why?"}, ["Read: a text. Why?"]),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
                "completion": [],
            },
            ["s", "q"],
        ),
        (
            {
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
                "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
            },
            ["q"],
        ),
    ],
)
def test_rows_are_asked_whole(tmp_path: Path, row: dict[str, Any], whole: list[str]) -> None:
    (prompt,) = load(jsonl(tmp_path / "p.jsonl", row)).prompts
    assert [turn["content"] for turn in prompt.messages] == whole


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "Summarise.", "context": "A long text."}, "`context`"),
        ({"prompt": "Which one?", "choices": ["a", "b"]}, "`choices`"),
        ({"prompt": "Which one?", "option_a": "a", "option_b": "b"}, "`option_a`, `option_b`"),
        ({"instruction": "Compare.", "Passage 1": "x"}, "`Passage 1`"),
        ({"messages": [{"role": "user", "content": "Describe."}], "image": "cat.png"}, "`image`"),
        ({"turns": ["Translate.", "Again."], "input": "Hola"}, "`input`"),
        ({"instruction": "a", "input": "b", "context": "c"}, "`input` and `context`"),
        (
            {
                "system": "s",
                "messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "q"}],
            },
            "`system`",
        ),
        ({"prompt": "a", "history": "b"}, "`history`"),
        ({"chosen": "a", "rejected": "b"}, "`chosen`"),
    ],
)
def test_rows_that_would_not_be_asked_whole_are_refused_by_column(
    tmp_path: Path, row: dict[str, Any], column: str
) -> None:
    with pytest.raises(PromptError) as caught:
        load(jsonl(tmp_path / "p.jsonl", row))
    assert "line 1" in str(caught.value)
    assert column in str(caught.value)


def test_rows_that_ask_the_same_but_for_another_column_are_no_repeats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "Summarise.", "news": f"On day {day} it rained.", "id": str(day)} for day in range(2)]
    with pytest.raises(PromptError, match=r"line 2: asks the same as line 1 but for `news`"):
        load(jsonl(tmp_path / "p.jsonl", *rows))
    with caplog.at_level(logging.WARNING, "expo_ray"):
        assert len(load(jsonl(tmp_path / "p.jsonl", rows[0], {"prompt": "b", "id": "5"}))) == 2
    assert "`news` is not asked" in caplog.text


def test_files_are_read_by_what_their_names_say_in_any_case(tmp_path: Path) -> None:
    jsonl(tmp_path / "P.JSONL", {"prompt": "a, b"})
    jsonl(tmp_path / "p.ndjson", {"prompt": "a, b"})
    (tmp_path / "p.csv").write_text('prompt,category\r\n"a, b",\r\n', newline="")
    (tmp_path / "p.TSV").write_text("prompt\tid\na, b\t1\n")
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(b'[{"prompt": "a, b"}]'))
    (tmp_path / "P.Txt").write_text("a, b\n")
    for name in ("P.JSONL", "p.ndjson", "p.csv", "p.TSV", "p.json.gz", "P.Txt"):
        assert asked(load(tmp_path / name)) == ["a, b"], name


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("p.xlsx", b"PK", "no kind of file that is read"),
        ("p", b"a", "no kind of file that is read"),
        ("p.jsonl", b"PAR1....", "name it .parquet"),
        ("p.jsonl", b"PK\x03\x04", "zip archive"),
        ("p.json", b"\x28\xb5\x2f\xfd", "zstd"),
        ("p.csv", b'prompt,id\n"a,1\n', "line 2"),
        ("p.csv", b"prompt,id\na,1,2\n", "line 2: holds list"),
        ("p.csv", b"prompt,prompt\na,b\n", "twice"),
        ("p.jsonl", b"[" * 100_000, "nested too deeply"),
        ("p.json", b"[" * 100_000, "nested too deeply"),
        ("p.jsonl", b'{"prompt": "a", "category": "\\ud800"}', "surrogate"),
        ("p.jsonl", b'{"prompt": "a", "question_id": "\\ud800"}', "surrogate"),
        ("p.jsonl", b'{"prompt": "a", "question_id": [1]}', "`question_id`"),
        ("p.jsonl", b'{"prompt": "a", "category": 5}', "`category`"),
    ],
)
def test_files_that_are_something_else_are_refused_by_what_they_are(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptError, match=reason):
        load(tmp_path / name)


def test_no_set_is_read_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_prompts_module, "_MOST_BYTES", 1000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"\n" * 10**6, 9)[:990])
    (tmp_path / "large.jsonl").write_bytes(b"\n" * 1001)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x" * 300] * 10}), tmp_path / "texts.parquet")
    for name in ("bomb.jsonl.gz", "large.jsonl", "texts.parquet"):
        with pytest.raises(PromptError, match=r"more than|is not whole"):
            load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("pipe.jsonl", "/dev/zero"):
        (tmp_path / "link.jsonl").unlink(missing_ok=True)
        (tmp_path / "link.jsonl").symlink_to(tmp_path / name)
        with pytest.raises(ExpoError):
            load(tmp_path / "link.jsonl")


def test_a_prompt_that_comes_twice_is_kept_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = jsonl(tmp_path / "p.jsonl", *({"prompt": text} for text in "abaca"))
    with caplog.at_level(logging.WARNING, "expo_ray"):
        prompts = load(file)
    assert (asked(prompts), prompts.repeated) == (["a", "b", "c"], 2)
    assert "2 row(s) repeat an earlier prompt" in caplog.text


# --- places


def test_the_same_set_from_memory(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "p.jsonl", {"prompt": TEXT}, {"prompt": "b"}).read_bytes()
    open_store("memory://prompts/a").put("p.jsonl.gz", gzip.compress(data))
    assert load("memory://prompts/a/p.jsonl.gz").digest == load(tmp_path / "p.jsonl").digest


@pytest.mark.s3
def test_the_same_set_from_s3(tmp_path: Path, s3_uri: str, s3_server: SeaweedFS) -> None:
    data = jsonl(tmp_path / "p.jsonl", {"prompt": TEXT}, {"prompt": "b"}).read_bytes()
    open_store(s3_uri).put("sets/p.jsonl", data)
    assert load(f"{s3_uri}/sets/p.jsonl").digest == load(tmp_path / "p.jsonl").digest
    with pytest.raises(StorageError, match=r"none\.jsonl"):
        load(f"{s3_uri}/sets/none.jsonl")


def test_copies_of_the_hubs_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answer = {"role": "assistant", "content": "x"}
    rows = [
        {
            "prompt": text,
            "messages": [{"role": "user", "content": text}, answer],
            "chosen": [answer],
            "score": 1.0,
        }
        for text in (TEXT, "second")
    ]
    repository = tmp_path / "ultrafeedback_binarized"
    test_gen = repository / "data" / "test_gen-00000-of-00001.parquet"
    test_gen.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(test_gen)
    datasets.Dataset.from_list(rows[:1]).to_parquet(test_gen.with_name("train_prefs-00000-of-00001.parquet"))
    assert asked(load(repository)) == asked(load(test_gen)) == [TEXT, "second"]

    alpaca = tmp_path / "alpaca_eval" / "alpaca_eval.json"
    alpaca.parent.mkdir()
    listed = [{"instruction": text, "output": "x", "generator": "g", "dataset": "koala"} for text in "ab"]
    alpaca.write_text(json.dumps(listed))
    assert load(alpaca.parent).digest == load(alpaca).digest
    assert [prompt.category for prompt in load(alpaca).prompts] == ["koala"] * 2


def test_an_unreachable_hub_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for name in ("ultrafeedback", "alpaca-eval"):
        with pytest.raises(PromptError, match=r"ConnectionError: offline.*name it as the source"):
            load(name)


def test_the_place_of_a_file() -> None:
    assert split_file("s3://b/f.jsonl") == ("s3://b", "f.jsonl")
    assert split_file("f.jsonl") == (".", "f.jsonl")
    assert split_file("/f.jsonl") == ("/", "f.jsonl")
    for no_file in ("s3://b/", "s3://b", "folder/"):
        with pytest.raises(StorageError, match="names no file"):
            split_file(no_file)


# --- subsets and halves


def test_subsets_are_nested_in_proportion_and_in_order() -> None:
    whole = sample_set({"a": 500, "b": 300, "c": 150, "d": 50})
    smaller: set[str] = set()
    for count in (1, 7, 20, 128, 256, 512, 999, 1000):
        part = whole.limit(count)
        ids = [prompt.id for prompt in part.prompts]
        assert len(part) == count
        assert smaller <= set(ids)
        assert ids == [prompt.id for prompt in whole.prompts if prompt.id in set(ids)]
        assert set(ids) == {prompt.id for prompt in whole.drawn().prompts[:count]}
        drawn = Counter(prompt.category for prompt in part.prompts)
        for category, share in {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}.items():
            assert abs(drawn[category] - share * count) <= 1
        smaller = set(ids)
    assert whole.limit(None) == whole.limit(5000) == whole


def test_neither_subset_nor_half_depends_on_the_order_of_the_source() -> None:
    whole = sample_set({"a": 60, "b": 40})
    other = PromptSet.of("other", reversed(whole.prompts))
    assert whole.digest != other.digest
    for mine, theirs in [
        (whole.limit(30), other.limit(30)),
        *zip(whole.halves(), other.halves(), strict=True),
    ]:
        assert {prompt.id for prompt in mine.prompts} == {prompt.id for prompt in theirs.prompts}


def test_a_prompt_keeps_its_half_as_the_set_grows() -> None:
    whole = sample_set({"a": 500, "b": 400})
    choose, confirm = ({prompt.id for prompt in half.prompts} for half in whole.halves())
    assert choose | confirm == {prompt.id for prompt in whole.prompts}
    assert not choose & confirm
    # Binomial: 900 throws of a fair coin have a standard deviation of 15.
    assert abs(len(choose) - 450) < 4 * 15
    for count in (50, 128, 600):
        part = whole.limit(count)
        halves = part.halves()
        assert {prompt.id for prompt in halves[0].prompts} <= choose
        assert {prompt.id for prompt in halves[1].prompts} <= confirm
        # A subset has the halves of the whole in proportion.
        assert abs(len(halves[0]) - count * len(choose) / 900) <= 2


def test_subsets_are_drawn_without_regard_to_place() -> None:
    numbers = [int(text.split()[1]) for text in asked(sample_set({"a": 1000}).limit(100))]
    # The mean of 100 of 0..999, without replacement, is 499.5 with a standard deviation of 27.
    assert abs(statistics.mean(numbers) - 499.5) < 4 * 27


def test_a_stored_set_holds_every_field_of_its_prompts() -> None:
    store = open_store("memory://kept/out")
    prompts = PromptSet.of(
        "p", [prompt_of([{"role": "user", "content": TEXT}], follow_ups=["b"], temperature=0.1)]
    )
    store_prompts(store, prompts)
    (stored,) = store.list()
    assert stored.key == f"evaluation/prompts/p-{prompts.digest}.jsonl"
    rows = [json.loads(line) for line in store.read(stored.key).split(b"\n") if line]
    assert rows == [json.loads(json.dumps(asdict(prompt))) for prompt in prompts.prompts]


# --- real sets


def test_alpaca_evals_own_prompts() -> None:
    file = real_data("alpaca") / "prompts.jsonl.gz"
    prompts, rows = load(file), read_jsonl_gz(file)
    assert asked(prompts) == [row["instruction"] for row in rows]
    assert [prompt.category for prompt in prompts.prompts] == [row["dataset"] for row in rows]
    assert (len(prompts), prompts.repeated) == (805, 0)
    wanted = {
        "selfinstruct": 25,
        "oasst": 19,
        "koala": 16,
        "helpful_base": 13,
        "vicuna": 8,
    }  # 252, 188, ... of 805
    drawn = Counter(prompt.category for prompt in prompts.limit(80).prompts)
    assert all(abs(drawn[category] - size) <= 1 for category, size in wanted.items())


def test_mt_benchs_own_questions() -> None:
    questions = load(real_data("mtbench") / "question.jsonl")
    assert [prompt.label for prompt in questions.prompts] == [str(number) for number in range(81, 161)]
    assert Counter(prompt.temperature for prompt in questions.prompts) == {0.0: 40, 0.1: 20, 0.7: 20}
    assert all(len(prompt.follow_ups) == 1 for prompt in questions.prompts)
