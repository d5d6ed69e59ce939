"""The report as text: whole for every ending, safe against what data sets contain, and the same for the same run."""

import re
from functools import lru_cache
from html.parser import HTMLParser

import pytest

from ml.report.html import render_report, reproduce_command
from tests.ml.report.example_runs import (
    ALL_RUNS,
    CHINESE,
    HOSTILE,
    ExampleRun,
    deployed_chinese,
    deployed_english,
)

VOID_TAGS = {"meta", "br", "wbr", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("span", "dd", "td"):
            self.texts.append(" ")
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def ids(self) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get("id"))]


def render(run: ExampleRun) -> str:
    return render_report(run.outcome(), run.history, run.summary, run.confusions, run.labels)


@lru_cache(maxsize=len(ALL_RUNS))
def page_of(run: str) -> str:
    """The page of an example, drawn once for all tests that read it."""
    return render(ALL_RUNS[run]())


@pytest.mark.parametrize("run", ALL_RUNS)
def test_every_ending_has_a_well_formed_page_that_says_how_it_ended(run: str):
    example = ALL_RUNS[run]()
    outcome = example.outcome()
    page = Page(page_of(run))
    assert outcome.name in page.text
    assert outcome.run_id in page.text
    for reason in outcome.reasons:
        assert " ".join(reason.split()) in page.text
    assert len(page.ids()) == len(set(page.ids()))


@pytest.mark.parametrize("run", ALL_RUNS)
def test_nothing_on_the_page_is_fetched_or_run(run: str):
    text = page_of(run)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "img"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(http" not in text
    assert "@import" not in text
    assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in page.tags)


def test_markup_in_data_is_shown_as_text_everywhere():
    run = deployed_chinese()
    odd = f"odd{HOSTILE}$x_1$"
    variants = tuple(item.model_copy(update={"name": odd}) if item.name == "dynamic_int8" else item for item in run.records.variants)
    scored = tuple(item.model_copy(update={"variant": odd}) if item.variant == "dynamic_int8" else item for item in run.records.validation)
    records = run.records.model_copy(update={"variants": variants, "validation": scored, "test": ()})
    page = Page(render(ExampleRun(run.config, records, run.history, run.confusions)))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(odd) >= 2  # in the table and in the picture
    assert HOSTILE in page.text


def test_class_names_in_any_script_are_text():
    text = Page(page_of("deployed_chinese")).text
    for label in CHINESE:
        assert label in text


def test_the_table_shows_every_model_with_its_numbers():
    text = Page(page_of("deployed_english")).text
    for words in ("static_int8", "82.9 ± 1.8", "0.30 −0.30 to 0.90", "5.0 0.30×", "method failed", "could not be made", "✗ no", "✓ yes"):
        assert words in text


def test_resumed_training_and_reuse_are_told():
    assert "from step 150; 12 steps were done again" in Page(page_of("deployed_english")).text
    assert Page(page_of("unchanged")).text.count("reused") >= 10


def test_a_rejected_run_still_shows_what_was_measured():
    text = Page(page_of("rejected_below_baseline")).text
    assert "82.9 ± 1.8" in text
    assert "What is mistaken for what" in text
    assert "Served model" not in text


def test_sections_that_the_run_did_not_reach_are_left_out():
    bad_input = Page(page_of("failed_on_bad_input")).text
    assert "Before and after" not in bad_input
    assert "Training" not in bad_input
    data_gate = Page(page_of("rejected_by_data_contract")).text
    assert "31.2 %" in data_gate
    assert "Loss" not in data_gate
    assert "Loss" in Page(page_of("failed_in_training")).text


def test_many_classes_and_many_files_stay_short():
    run = deployed_english()
    labels = tuple(f"class {index}" for index in range(60))
    counts = [[50 if row == column else 1 for column in range(60)] for row in range(60)]
    assert run.records.raw is not None
    objects = {f"part-{index:04d}.csv": next(iter(run.records.raw.objects.values())) for index in range(500)}
    records = run.records.model_copy(update={"raw": run.records.raw.model_copy(update={"objects": objects})})
    text = render_report(ExampleRun(run.config, records).outcome(), [], {}, {"static_int8": counts, "retriever": None}, labels)
    assert "60 classes; the most frequent mistakes" in Page(text).text
    assert "and 480 more" in Page(text).text
    assert len(text) < 200_000


def test_a_summary_of_any_shape_is_shown():
    run = deployed_english()
    summary = {
        "length": {"words": {"p50": 21.5, "max": 59}},
        "texts": ["short", "long " * 200],
        "empty": None,
        "flag": True,
        "pairs": [{"a": 1}],
    }
    text = Page(render_report(run.outcome(), run.history, summary, {}, run.labels)).text
    for words in ("p50 21.5", "max 59", "short", "…", "flag yes", "a 1"):
        assert words in text


def test_the_same_run_gives_the_same_page():
    run = deployed_english()
    outcome = run.outcome()
    pages = {render_report(outcome, run.history, run.summary, run.confusions, run.labels) for _ in range(2)}
    assert len(pages) == 1


def test_the_command_to_reproduce_quotes_what_a_shell_would_read():
    run = deployed_chinese()
    assert f"DATA='{HOSTILE}" not in reproduce_command(run.outcome())
    data = run.config.data.model_copy(update={"source": "my reviews;rm.csv", "encoding": "gb18030"})
    config = run.config.model_copy(update={"data": data})
    command = reproduce_command(ExampleRun(config, run.records).outcome())
    assert "DATA='my reviews;rm.csv' TEXT=text LABEL=label ENCODING=gb18030" in command
    assert "DATA" not in reproduce_command(deployed_english().outcome())


def test_pictures_have_words_for_those_who_do_not_see_them():
    page = Page(page_of("deployed_english"))
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    assert len(figures) == 3
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in figures)
    assert any(re.search(r"static_int8: 5\.0 ms, 82\.9", attributes["aria-label"] or "") for attributes in figures)
