"""What the run page in the Prefect UI shows, as text. How the UI draws it: tests/e2e/test_prefect_ui.py."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import pytest

from ml.events import Cause
from ml.report import run_page
from ml.report.table import table_rows
from ml.report.words import cause_words
from tests.ml.report.example_runs import ALL_RUNS, HOSTILE, ExampleRun, deployed_english, failed_on_bad_input

PICTURE = re.compile(r"!\[([^\]]*)\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)")


def with_cause(run: ExampleRun, cause: Cause) -> ExampleRun:
    return ExampleRun(run.config.model_copy(update={"cause": cause}), run.records, run.history, run.confusions, run.error)


@pytest.mark.parametrize("name", ALL_RUNS)
def test_the_report_says_how_every_run_ended_and_stays_small(name: str):
    run = ALL_RUNS[name]()
    outcome = run.outcome()
    text = run_page.report(outcome, run.history)
    assert outcome.name in text.replace("\\", "")
    assert len(text) < run_page.MAX_CHARACTERS
    assert HOSTILE not in text


def test_pictures_stand_alone_on_white():
    run = deployed_english()
    pictures = dict(PICTURE.findall(run_page.report(run.outcome(), run.history)))
    assert list(pictures) == ["Speed and quality", "Training loss", "Accuracy on validation"]
    for data in pictures.values():
        svg = base64.b64decode(data).decode()
        assert ElementTree.fromstring(svg).get("style", "").startswith("background: #ffffff")
        assert "currentColor" not in svg
        assert "var(" not in svg


def test_the_curve_holds_what_the_run_learned_and_is_missing_without_training():
    run = deployed_english()
    curve = run_page.training_curve(run.outcome(), run.history)
    assert curve is not None
    assert [title for title, _ in PICTURE.findall(curve)] == ["Training loss", "Accuracy on validation"]
    failed = failed_on_bad_input()
    assert run_page.training_curve(failed.outcome(), failed.history) is None


def test_only_a_served_model_can_be_asked():
    served, failed = deployed_english().outcome(), failed_on_bad_input().outcome()
    assert f"Ask the model: `{served.addresses.predict_url}`" in run_page.report(served, [])
    assert "Ask the model" not in run_page.report(failed, [])


def test_of_a_report_that_would_be_too_long_the_largest_picture_goes_first(monkeypatch: pytest.MonkeyPatch):
    run = deployed_english()
    whole = run_page.report(run.outcome(), run.history)
    sizes = {title: len(data) for title, data in PICTURE.findall(whole)}
    largest = max(sizes, key=lambda title: sizes[title])
    monkeypatch.setattr(run_page, "MAX_CHARACTERS", len(whole) - 1000)
    text = run_page.report(run.outcome(), run.history)
    assert {title for title, _ in PICTURE.findall(text)} == set(sizes) - {largest}
    assert "Full report" in text


def test_the_table_has_one_row_per_model_and_marks_the_chosen_one():
    outcome = deployed_english().outcome()
    rows = table_rows(outcome)
    assert [row["model"].removeprefix("▶ ") for row in rows] == [model.name for model in outcome.models]
    assert [row["model"] for row in rows if row["verdict"] == "deployed"] == ["▶ static_int8"]
    assert rows[4]["p50 to PyTorch"] == "0.30×"


def test_the_cause_is_said_wherever_the_outcome_is():
    cause = Cause(kind="data.arrived", summary="3 new objects, the first s3://datasets/sentiment/a.csv")
    run = with_cause(deployed_english(), cause)
    outcome = run.outcome()
    assert outcome.cause == cause
    assert cause_words(outcome.cause) == "Started by new data: 3 new objects, the first s3://datasets/sentiment/a.csv"
    for text in (run_page.report(outcome, run.history), run_page.headline(outcome)):
        assert "Started by new data: 3 new objects, the first s3://datasets/sentiment/a.csv" in text.replace("\\", "")
