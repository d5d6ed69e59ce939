"""The table on the terminal: widths, words, and text that is never read as markup."""

import io

import pytest
from rich.console import Console

from ml.report.table import before_after_table, print_outcome, render_markdown, table_text
from tests.ml.report.example_runs import ALL_RUNS, HOSTILE, deployed_english, failed_on_bad_input, rejected_by_data_contract, unchanged


def printed(run, width: int = 120) -> str:
    buffer = io.StringIO()
    print_outcome(run.outcome(), Console(file=buffer, width=width, highlight=False))
    return buffer.getvalue()


@pytest.mark.parametrize("run", ALL_RUNS)
def test_every_ending_prints_its_status_and_reasons(run: str):
    example = ALL_RUNS[run]()
    outcome = example.outcome()
    text = printed(example, width=400)
    assert outcome.name in text
    for reason in outcome.reasons:
        assert reason in text


@pytest.mark.parametrize("width", [120, 116, 100, 80])
def test_the_table_fits_its_width_and_folds_no_row(width: int):
    lines = table_text(deployed_english().outcome(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.strip().startswith("magnitude_pruning ") for line in lines) == (2 if width < 110 else 1)


def test_a_row_holds_quality_speed_size_and_verdict():
    row = next(line for line in table_text(deployed_english().outcome(), 120).splitlines() if "static_int8 " in line)
    quality = "82.9±1.8 83.0±1.8 82.9±1.8 82.9±1.8"
    cost = "5.0 6.1 0.30× 0.48× 238 98 23.1"
    assert row.split() == f"▶ static_int8 {quality} {cost} deployed".split()


def test_a_narrow_terminal_gets_two_tables_with_the_same_numbers():
    wide = set(table_text(deployed_english().outcome(), 120).split())
    narrow = set(table_text(deployed_english().outcome(), 80).split())
    assert wide == narrow


def test_a_name_in_brackets_is_not_read_as_markup():
    run = deployed_english()
    variants = tuple(
        variant.model_copy(update={"name": "[red]odd[/red]"}) if variant.name == "static_int8_pct" else variant
        for variant in run.records.variants
    )
    outcome = type(run)(run.config, run.records.model_copy(update={"variants": variants})).outcome()
    assert "[red]odd[/red]" in table_text(outcome, 160)


def test_a_terminal_gets_colour_and_a_file_gets_plain_text():
    outcome = deployed_english().outcome()
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(before_after_table(outcome, 120))
    assert "\x1b[" in capture.get()
    assert "\x1b[" not in table_text(outcome)


def test_the_end_of_a_run_shows_contract_version_samples_and_addresses():
    text = printed(deployed_english(), width=200)
    assert "latency ratio 0.30, limit 0.60" in text
    assert "champion: 20261124T082701Z-6dd2a1b0, before it 20261120T101500Z-0b11f2aa" in text
    assert "positive (97%)" in text
    assert "http://127.0.0.1:8080/v1/sentiment/predict" in text
    assert "report.html" in text


def test_a_second_run_says_what_was_reused():
    assert "reused, because nothing that goes into it changed: ingest_data" in printed(unchanged(), width=400)


def test_a_run_without_models_says_so_instead_of_an_empty_table():
    for run in (rejected_by_data_contract(), failed_on_bad_input()):
        assert "No model was scored" in printed(run)


def test_an_error_names_its_kind_and_stage():
    assert "DataError in ingest_data: reviews.csv has no column 'stars'" in printed(failed_on_bad_input(), width=300)


def test_markdown_has_one_cell_per_column_and_escapes_what_it_shows():
    text = render_markdown(deployed_english().outcome())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    quality, cost = rows[: 2 + 7], rows[2 + 7 :]
    assert len(cost) == 2 + 7
    assert {row.count("|") for row in quality} == {7}
    assert {row.count("|") for row in cost} == {8}
    assert "**static\\_int8**" in text
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("run", ALL_RUNS)
def test_markdown_is_there_for_every_ending(run: str):
    assert ALL_RUNS[run]().outcome().name in render_markdown(ALL_RUNS[run]().outcome()).replace("\\", "")
