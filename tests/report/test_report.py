from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import huggingface_hub as hub
import pytest
import yaml

from expo_ray.cli.process import main
from expo_ray.errors import OutputError
from expo_ray.report.model_card import model_card
from expo_ray.report.report_folder import write_report
from expo_ray.report.report_page import page_of
from expo_ray.report.results import GuardrailCheck, Interval, Measurement, PairResult, Results
from expo_ray.report.results_file import RESULTS, parse_results, read_results, results_json, write_results
from expo_ray.storage import open_store
from tests.support.browser import Tab
from tests.support.sample_results import HOSTILE, LONG_WORD, MODELS, sample_results

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Page(HTMLParser):
    """The page as a browser's parser sees it, so far as these tests ask.

    Attributes:
        tables: by caption, rows of cells' texts.
        elements: (tag, attributes) in order.
        texts: by tag, what elements of that tag contain.
        unbalanced: end tags that close nothing.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.unbalanced: list[str] = []
        self._open: list[tuple[str, int]] = []
        self._text = ""
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, len(self._text)))
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.unbalanced.append(tag)
            return
        content = self._text[self._open.pop()[1] :]
        words = " ".join(content.split())
        self.texts.setdefault(tag, []).append(content)
        if tag in ("td", "th"):
            self._rows[-1].append(words)
        elif tag == "caption":
            self.tables[words] = self._rows

    def row(self, caption: str, start: str) -> list[str]:
        matching = [
            row
            for title, rows in self.tables.items()
            if title.startswith(caption)
            for row in rows
            if row and row[0].startswith(start)
        ]
        assert len(matching) == 1, (caption, start, matching)
        return matching[0]

    def ids(self) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get("id"))]


@pytest.fixture(scope="module")
def results() -> Results:
    return sample_results()


@pytest.fixture(scope="module")
def text(results: Results) -> str:
    return page_of(results)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def pair_of(results: Results, name: str) -> PairResult:
    return next(pair for pair in results.pairs if pair.name == name)


def measured(pair: PairResult, alpha: float, half: str, model: str) -> Measurement:
    (measurement,) = (
        each for each in pair.measured if (each.alpha, each.half, each.reward_model) == (alpha, half, model)
    )
    return measurement


def shown(estimate: Interval) -> str:
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]".replace("-", "\u2212")


def test_results_are_read_as_they_were_written(results: Results) -> None:
    store = open_store("memory://report/round-trip")
    write_results(store, results)
    assert read_results(store) == results


def test_alphas_and_numbers_that_json_lacks_survive(results: Results) -> None:
    pair = replace(
        results.pairs[0],
        rejected={-1.0: "a", 0.1: "b", 1e-7: "c", 1 / 3: "d"},
        guardrails=(GuardrailCheck(0.1, "length ratio", math.inf, 1.6, "reject", "no end"),),
        examples=(replace(results.pairs[0].examples[0], prompt="half a pair: \ud800"),),
    )
    data = results_json(replace(results, pairs=(pair,)))
    read = parse_results(data).pairs[0]
    assert read.rejected == pair.rejected
    assert read.guardrails == pair.guardrails
    assert read.examples[0].prompt == "half a pair: \ufffd"
    assert b"Infinity" not in data


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"format": 1', '"format": 99', "has format 99, written by expo-ray 0.4.0"),
        ('"reason"', '"raeson"', "pairs.0.raeson: Unexpected keyword"),
        ('"prompts": 512', '"prompts": "512"', "pairs.0.measured.0.prompts"),
        ('"half": "choose"', '"half": "chosen"', "'choose' or 'confirm'"),
        ('"win_rate": ', '"win_rate": true, "x": ', "win_rate"),
        ('"0.1": ', '"-2": ', "alpha is -2.0"),
        ("{", "", "no result of a run"),
    ],
)
def test_results_of_another_version_or_a_damaged_file_are_refused(
    results: Results, old: str, new: str, words: str
) -> None:
    data = results_json(results).decode()
    assert old in data
    with pytest.raises(OutputError) as caught:
        parse_results(data.replace(old, new, 1).encode(), "s3://bucket/run/results.json")
    assert words in str(caught.value)
    assert "s3://bucket/run/results.json" in str(caught.value)
    assert "run the job again" in str(caught.value)


def test_the_overview_sorts_pairs_by_gain_and_shows_the_numbers_of_results(
    results: Results, page: Page
) -> None:
    rows = next(rows for title, rows in page.tables.items() if title.startswith("Pairs by gain"))
    assert [row[0] for row in rows[1:]] == ["in-house-8b-10pct", "zephyr-7b", "tulu-2-70b", "starling-lm"]
    pair = pair_of(results, "zephyr-7b")
    assert rows[2][1:6] == [
        "alpha 0.4",
        shown(measured(pair, 0.4, "choose", MODELS[0]).gain),
        shown(measured(pair, 0.4, "confirm", MODELS[0]).gain),
        shown(measured(pair, 0.4, "confirm", MODELS[1]).gain),
        shown(cast("Interval", measured(pair, 0.4, "confirm", MODELS[0]).controlled_gain)),
    ]
    assert rows[2][6] == f"{measured(pair, 0.4, 'confirm', MODELS[0]).win_rate:.1%}"
    assert rows[2][7] == f"\u00d7{pair.mean_tokens[0.4] / pair.mean_tokens[0.0]:.2f}"
    assert rows[2][8] == "5 120"


def test_kept_dpo_and_failures_are_stated(results: Results, page: Page) -> None:
    paragraphs = [" ".join(text.split()) for text in page.texts["p"]]
    assert "2 of 3 pairs have a higher reward with an alpha above 0; 1 keeps dpo; 1 failed." in paragraphs
    assert pair_of(results, "tulu-2-70b").reason in paragraphs
    assert f"starling-lm failed: {results.failures['starling-lm']}" in paragraphs
    assert page.row("Pairs by gain", "tulu-2-70b")[1].startswith("keep dpo")
    assert page.row("Pairs by gain", "starling-lm")[1] == "failed"
    assert any(title.endswith("which came closest, against dpo") for title in page.tables)


def test_the_evidence_holds_both_halves_and_all_reward_models(results: Results, page: Page) -> None:
    pair = pair_of(results, "in-house-8b-10pct")
    rows = page.tables["alpha 4.525, attention \u00d70.5, mlp \u00d72 against dpo"][1:]
    assert [row[:2] for row in rows] == [
        [half, model] for half in ("choosing", "confirming") for model in MODELS
    ]
    for row in rows:
        half = {"choosing": "choose", "confirming": "confirm"}[row[0]]
        (measurement,) = (
            measurement
            for measurement in pair.chosen
            if (measurement.half, measurement.reward_model) == (half, row[1])
        )
        dpo = measured(pair, 0.0, half, row[1])
        assert row[3:6] == [
            f"{dpo.reward.mean:+.3f}".replace("-", "\u2212"),
            f"{measurement.reward.mean:+.3f}".replace("-", "\u2212"),
            shown(measurement.gain),
        ]
        if half == "choose":  # the alpha was picked on these prompts: no figure of theirs is evidence
            assert row[-2:] == ["", ""]
        else:
            beyond = "gains" if measurement.gain.low > 0 else "no gain"
            assert row[-1].startswith(f"{beyond} beyond chance")


def test_multipliers_that_were_tried_stand_beside_alpha_alone(results: Results, page: Page) -> None:
    pair = pair_of(results, "in-house-8b-10pct")
    assert pair.groups
    (rows,) = (rows for title, rows in page.tables.items() if "against alpha 4.525 in all groups" in title)
    assert [row[0] for row in rows[1:]] == [
        "embeddings \u00d70",
        "attention \u00d70.5",
        "attention \u00d70.5, mlp \u00d72",
    ]
    for row, trial in zip(rows[1:], pair.groups.trials, strict=True):
        assert row[1] == (trial.reason or "chosen")
        assert row[2:] == [str(trial.prompts), shown(trial.gain)]
    # The gain that pairs are compared by is of what was chosen.
    assert pair.headline
    assert pair.headline.gain.mean == pytest.approx(
        measured(pair, 4.525, "confirm", MODELS[0]).gain.mean + 0.2
    )


def test_every_alpha_has_its_row_with_the_reason_it_fell_and_what_rounding_left_of_it(
    results: Results, text: str
) -> None:
    pair = pair_of(results, "zephyr-7b")
    article = text[text.index('<h2 id="pair-2-zephyr-7b-title">') :]
    page = Page(article[: article.index("</article>")])
    rows = {row[0]: row for row in next(rows for title, rows in page.tables.items() if "choosing" in title)}
    for alpha, reason in pair.rejected.items():
        row = rows[f"{alpha:g}"]
        assert reason in row[1]
        assert row[3] == shown(measured(pair, alpha, "choose", MODELS[0]).gain)
        assert row[6] == shown(measured(pair, alpha, "choose", MODELS[1]).gain)
        effective = pair.effective_alphas[alpha]
        assert row[-1] == f"{effective:.3f}" + (" off" if abs(effective / alpha - 1) > 0.05 else "")
    assert {row[-1].endswith("off") for row in rows.values()} == {True, False}
    assert "chosen" in rows["0.4"][1]
    assert "no end" not in article


def test_an_alpha_that_was_published_and_not_tried_has_its_row(results: Results) -> None:
    pair = replace(
        pair_of(results, "tulu-2-70b"), published={3.0: "s3://b/alpha=3"}, effective_alphas={3.0: 2.998}
    )
    page = Page(page_of(replace(results, pairs=(pair,))))
    rows = {
        row[0]: row
        for row in next(rows for title, rows in page.tables.items() if title.startswith("On the choosing"))
    }
    assert "the search did not try it" in rows["3"][1]
    assert rows["3"][-1] == "2.998"
    assert "the search did not try it" not in rows["0.8"][1]


def test_hostile_text_is_shown_and_nothing_else(page: Page) -> None:
    shown_text = re.sub(r"[\x00\x1b]", "\ufffd", HOSTILE)
    assert shown_text in page.texts["pre"]
    assert f"{shown_text} {LONG_WORD}" in page.texts["pre"]
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.unbalanced == []
    assert len(page.texts["style"]) == 1


def test_nothing_in_the_page_points_outside(page: Page, text: str) -> None:
    for tag, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,"), (tag, value)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text


def test_names_of_elements_are_unique_and_every_reference_finds_one(page: Page, text: str) -> None:
    ids = page.ids()
    assert len(ids) == len(set(ids))
    named = re.findall(r"url\(#([^)]*)\)", text)
    for _, attributes in page.elements:
        named += [
            value[1:]
            for key in ("href", "xlink:href")
            if (value := attributes.get(key) or "").startswith("#")
        ]
        named += (attributes.get("aria-labelledby") or "").split()
    assert set(named) <= set(ids)
    assert len(named) > 100


def test_figures_have_texts_for_those_who_do_not_see_them(results: Results, page: Page) -> None:
    figures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(figures) == 3 * 4  # two reward models, lengths, guardrails
    assert all(figure["role"] == "img" for figure in figures)
    pair = pair_of(results, "zephyr-7b")
    described = [
        text
        for text in page.texts["desc"]
        if text.startswith("Gain in mean reward over dpo, by RM-Mistral-7B")
    ]
    numbers = [f"alpha {each.alpha:g}: {shown(each.gain)}" for each in pair.measured if each.half == "choose" and each.reward_model == MODELS[0]]  # fmt: skip
    assert [all(number in text for number in numbers) for text in described].count(True) == 1
    words = page.texts["text"]  # text stays text in the figures
    assert {
        "alpha",
        "sft",
        "dpo",
        "choosing prompts",
        "confirming prompts",
        "length-controlled",
        "rejects",
    } <= set(words)
    assert "chosen: 4.525" in words


def test_the_same_results_give_the_same_page(results: Results, text: str) -> None:
    assert page_of(parse_results(results_json(results))) == text


@pytest.mark.parametrize("alphas", [(), (0.0,), (0.5,), (0.0, 300.0)])
def test_a_run_that_hardly_began_has_a_page(alphas: tuple[float, ...]) -> None:
    nothing = Interval(math.nan, -math.inf, math.inf)
    pair = PairResult(
        "a $x$ <b>pair</b>", "sft", "dpo", 0.0, "too early to tell",
        measured=tuple(Measurement(alpha, "choose", "by $length$", 1, nothing, nothing, None, 0.5) for alpha in alphas),
        guardrails=tuple(GuardrailCheck(alpha, "length ratio", math.inf, 1.6, "reject", "endless") for alpha in alphas),
        mean_tokens=dict.fromkeys(alphas, 0.0),
    )  # fmt: skip
    page = Page(page_of(Results("out", "2026-11-24", (pair,))))
    assert page.unbalanced == []
    assert "a $x$ <b>pair</b>" in page.texts["h2"]
    assert Page(page_of(Results("out", "2026-11-24", ()))).unbalanced == []


def test_the_command_draws_the_page_from_storage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results: Results, text: str
) -> None:
    write_results(open_store(str(tmp_path)), results)
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.strip()
    assert Path(printed) == tmp_path / "report" / "index.html"
    assert Path(printed).read_text() == text
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert f"{tmp_path}/nothing/{RESULTS} is not there" in capsys.readouterr().err


@pytest.mark.s3
def test_the_command_draws_the_page_in_a_bucket(
    s3_uri: str, capsys: pytest.CaptureFixture[str], results: Results, text: str
) -> None:
    store = open_store(f"{s3_uri}/run")
    write_results(store, results)
    assert main(["report", f"{s3_uri}/run"]) == 0
    assert capsys.readouterr().out.strip() == f"{s3_uri}/run/report/index.html"
    assert store.read("report/index.html").decode() == text


def test_the_command_needs_neither_a_cluster_nor_a_model(tmp_path: Path, results: Results) -> None:
    write_results(open_store(str(tmp_path)), results)
    code = f"""
import sys
from expo_ray.cli.process import main
light = {{"matplotlib", "jinja2"}} & set(sys.modules)
assert main(["report", {str(tmp_path)!r}]) == 0
print(light, sorted({{"ray", "vllm", "transformers", "torch", "numba"}} & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "set() []"


def manifest(alpha: float) -> dict[str, Any]:
    return {
        "pair": "zephyr-7b", "alpha": alpha, "plan": "p", "expo_ray": "0.4.0", "warnings": [],
        "arithmetic": {"formula": "f", "adapter": None}, "shards": [],
        "parents": {side: {"uri": f"hf://org/{side}", "revision": None} for side in ("sft", "dpo")},
        "statistics": {"elements": 0, "tensors": {}},
    }  # fmt: skip


def test_the_hub_reads_the_evaluation_from_the_card(results: Results) -> None:
    pair = pair_of(results, "zephyr-7b")
    card = hub.ModelCard(model_card(manifest(0.4), pair))
    data = cast("hub.ModelCardData", card.data)
    evaluations = cast("list[hub.EvalResult]", data.eval_results)
    assert data.model_name == "zephyr-7b, alpha 0.4"
    assert {each.task_type for each in evaluations} == {"text-generation"}
    values = {(each.dataset_split, each.metric_name): each for each in evaluations}
    for model in MODELS:
        measurement = measured(pair, 0.4, "confirm", model)
        gain = values["confirm", f"Gain in reward over dpo, {model}"]
        assert gain.metric_value == measurement.gain.mean
        assert gain.metric_args == {"low": measurement.gain.low, "high": measurement.gain.high}
        assert gain.dataset_args == {"num_prompts": measurement.prompts}
        assert values["confirm", f"Win rate over dpo, {model}"].metric_value == measurement.win_rate
        assert values["confirm", f"Mean reward, {model}"].metric_value == measurement.reward.mean
    assert pair.reason in card.text
    assert shown(measured(pair, 0.4, "confirm", MODELS[1]).gain) in card.text


@pytest.mark.parametrize("alpha", [0.4, 0.2])
def test_the_card_lists_no_gain_on_the_prompts_that_alpha_was_chosen_on(
    results: Results, alpha: float
) -> None:
    pair = pair_of(results, "zephyr-7b")
    text = model_card(manifest(alpha), pair)
    for model in MODELS:
        gain = measured(pair, alpha, "choose", model).gain
        assert shown(gain) not in text
        assert str(gain.mean) not in text
    data = cast("hub.ModelCardData", hub.ModelCard(text).data)
    assert {each.dataset_split for each in data.eval_results or []} == (
        {"confirm"} if alpha == 0.4 else set()
    )
    assert ("No gain is listed" in text) == (alpha == 0.2)


def test_the_card_of_an_alpha_that_was_not_chosen_says_so(results: Results) -> None:
    pair = pair_of(results, "zephyr-7b")
    card = model_card(manifest(0.2), pair)
    assert f"**This alpha was not chosen; alpha 0.4 was.** {pair.rejected[0.2]}" in card
    kept = model_card(manifest(0.2), pair_of(results, "tulu-2-70b"))
    assert "**This alpha was not chosen, dpo itself was kept.**" in kept


def test_without_measurements_the_card_is_as_before(results: Results) -> None:
    plain = model_card(manifest(0.77))
    assert "model-index" not in yaml.safe_load(plain.split("---\n")[1])
    assert model_card(manifest(0.77), pair_of(results, "zephyr-7b")) == plain
    assert model_card(manifest(0.4), PairResult("zephyr-7b", "s", "d", 0.4, "r")) == model_card(manifest(0.4))


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_a_browser_shows_the_whole_page_and_asks_nobody(
    tab: Tab, tmp_path: Path, results: Results, width: int
) -> None:
    url = Path(write_report(open_store(str(tmp_path)), results)).as_uri()
    tab.open(url, width)
    tab.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    tab.evaluate("document.body.offsetHeight")
    assert tab.requests == [url]
    assert tab.complaints == []
    assert str(tab.evaluate("document.title")).startswith("expo-ray report")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing but what scrolls inside its own box reaches past the window.
    assert tab.evaluate(
        "[...document.body.querySelectorAll('*')].filter(element => !element.closest('.scroll, pre') || element.matches('.scroll, pre'))"
        f".filter(element => element.getBoundingClientRect().right > {width} + 0.5).map(element => element.outerHTML.slice(0, 200))"
    ) == []  # fmt: skip
    boxes = tab.evaluate(
        "[...document.querySelectorAll('figure svg')].map(element => [element.getBoundingClientRect().width, element.getBoundingClientRect().height])"
    )
    assert len(boxes) == 12
    assert all(width_px >= 300 and height_px >= 200 for width_px, height_px in boxes)
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg')].map(element => element.getBoundingClientRect().width / element.viewBox.baseVal.width)) * 11"
    )
    assert smallest >= 9.5  # pixels of the figures' text
    assert tab.evaluate(
        "[...document.querySelectorAll('table')].every(element => element.rows.length > 1 && element.offsetHeight > 50)"
    )
    assert tab.evaluate("document.querySelectorAll('table').length") == 1 + 3 * 2 + 1
    answers = tab.evaluate("[...document.querySelectorAll('.answers')][0].querySelectorAll('pre').length")
    assert answers == 3
