"""The before/after table and the end of a run on the terminal, drawn by rich."""

import html
import json
import re
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ml.artifacts import Interval, Timing
from ml.outcome import ModelRow, PipelineOutcome
from ml.report.comparison import MEGABYTE, Comparison, clause_words, compare, half_width, metric_title
from ml.report.words import STATUS_WORDS, cause_words, duration

# Output that goes to a file or a pipe has no width of its own; this one fits logs and the usual table.
PLAIN_WIDTH = 120

_STATUS_STYLES = {"deployed": "bold green", "deployed_uncompressed": "bold green", "unchanged": "bold green"}
_VERDICT_STYLES = {"chosen": "bold green", "passes": "green", "fails": "yellow", "failed": "red", "reference": "dim", "unjudged": "dim"}
_NOTHING = "–"

Cell = Callable[[ModelRow], str]
Column = tuple[str, Cell]


def print_outcome(outcome: PipelineOutcome, console: Console | None = None) -> None:
    """Print the end of a run: the table, the decision in words, warnings, sample answers, addresses."""
    console = console or open_console()
    console.print()
    console.print(before_after_table(outcome, console.width))
    for part in (_decision_lines(outcome), _note_lines(outcome), _sample_lines(outcome), _address_lines(outcome)):
        if part:
            console.print()
            for line in part:
                console.print(line, soft_wrap=not console.is_terminal)


def open_console() -> Console:
    """The terminal as it is; plain text of a fixed width where standard output is not one."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def before_after_table(outcome: PipelineOutcome, width: int) -> RenderableType:
    """The table alone, for a terminal of this many columns. Nothing in it is read as rich markup.

    Where it is too narrow for all, first only the primary metric keeps its interval, then the table is drawn in two:
    quality and cost.
    """
    comparison = compare(outcome)
    if not comparison.has_results:
        return Text("No model was scored, so there is nothing to compare.")
    heading = Text(_heading(comparison), style="bold")
    cost = _cost_columns()
    for all_intervals in (True, False):
        table = _draw(comparison, _quality_columns(comparison, all_intervals=all_intervals) + cost)
        if _natural_width(table) <= width:
            return Group(heading, table)
    quality = _quality_columns(comparison, all_intervals=True)
    return Group(heading, _draw(comparison, quality), Text(), _draw(comparison, cost, with_verdict=False))


def table_text(outcome: PipelineOutcome, width: int = PLAIN_WIDTH) -> str:
    """The table as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(before_after_table(outcome, width))
    return capture.get()


def render_markdown(outcome: PipelineOutcome) -> str:
    """Decision, cause and table as Markdown, e.g. for a Prefect artifact. Texts are escaped, so they are shown as they are.

    The table is drawn in two, quality and cost, as a page that shows Markdown has rarely room for all columns.
    """
    comparison = compare(outcome)
    lines = [f"**{escape_markdown(outcome.name)}: {STATUS_WORDS[outcome.status]}**", ""]
    lines += [escape_markdown(cause_words(outcome.cause)) + ".", ""]
    lines += [f"- {escape_markdown(reason)}" for reason in outcome.reasons]
    if comparison.has_results:
        verdict: Column = ("verdict", lambda row: comparison.verdict(row).words)
        lines += ["", escape_markdown(_heading(comparison)), ""]
        lines += _markdown_table(comparison, [*_quality_columns(comparison, all_intervals=True), verdict])
        lines += ["", *_markdown_table(comparison, [column for column in _cost_columns() if column[0] != "p95\nms"])]
    if outcome.warnings:
        lines += ["", *(f"- note: {escape_markdown(warning)}" for warning in outcome.warnings)]
    return "\n".join(lines) + "\n"


def table_rows(outcome: PipelineOutcome) -> list[dict[str, str]]:
    """The gist of the table as one dictionary per model, column -> text, not escaped: for narrow tables that others draw."""
    comparison = compare(outcome)
    columns = _quality_columns(comparison, all_intervals=False)[:1]
    columns += [column for column in _cost_columns() if column[0] not in ("p95\nms", "to ORT\nfp32", "rows\n/s")]
    return [
        {
            "model": ("▶ " if row.chosen else "") + row.name,
            "verdict": comparison.verdict(row).words,
            **{" ".join(title.split()): cell(row) for title, cell in columns},
        }
        for row in comparison.rows
        if comparison.has_results
    ]


def _markdown_table(comparison: Comparison, columns: list[Column]) -> list[str]:
    titles = ["model", *(" ".join(title.split()) for title, _ in columns)]
    lines = [f"| {' | '.join(titles)} |", "|".join(["", " --- ", *[" ---: "] * len(columns), ""])]
    for row in comparison.rows:
        mark = "**" if row.chosen else ""
        cells = [row.name, *(cell(row) for _, cell in columns)]
        lines.append(f"| {' | '.join(f'{mark}{escape_markdown(cell)}{mark}' for cell in cells)} |")
    return lines


def escape_markdown(text: str) -> str:
    """Text that Markdown, and the HTML that it may hold, show as it is, on one line."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def _heading(comparison: Comparison) -> str:
    if comparison.num_rows is None:
        return "Models of this run (none was scored)"
    return f"Before and after, on {comparison.num_rows:,} {comparison.split} rows (± is half of the 95 % interval)"


def _natural_width(table: Table) -> int:
    """Columns that the table takes when nothing in it is folded."""
    roomy = Console(width=1000)
    return Measurement.get(roomy, roomy.options, table).maximum


def _draw(comparison: Comparison, columns: list[Column], *, with_verdict: bool = True) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("")
    table.add_column("model", vertical="bottom", overflow="fold")
    for title, _ in columns:
        table.add_column(Text(title), justify="right", no_wrap=True, vertical="bottom")
    if with_verdict:
        table.add_column("verdict", vertical="bottom", overflow="fold", min_width=9)
    for row in comparison.rows:
        verdict = comparison.verdict(row)
        cells = [Text("▶" if row.chosen else " "), Text(row.name), *(Text(cell(row)) for _, cell in columns)]
        if with_verdict:
            cells.append(Text(verdict.words, style=_VERDICT_STYLES[verdict.kind]))
        table.add_row(*cells, style="bold" if row.chosen else "")
    return table


def _quality_columns(comparison: Comparison, *, all_intervals: bool) -> list[Column]:
    columns: list[Column] = []
    for position, metric in enumerate(comparison.metrics):
        unit = "\n%" if metric in comparison.percent else "\n"
        columns.append((metric_title(metric) + unit, _metric_cell(comparison, metric, with_interval=all_intervals or position == 0)))
    return columns


def _metric_cell(comparison: Comparison, metric: str, *, with_interval: bool) -> Cell:
    digits = 1 if metric in comparison.percent else 3

    def cell(row: ModelRow) -> str:
        interval = comparison.interval(row, metric)
        if interval is None:
            return _NOTHING
        shown = comparison.in_units(metric, interval)
        text = f"{shown.value:.{digits}f}"
        return f"{text}±{half_width(shown):.{digits}f}" if with_interval else text

    return cell


def _cost_columns() -> list[Column]:
    return [
        ("p50\nms", _timing_cell(lambda timing: f"{timing.p50_ms:.1f}")),
        ("p95\nms", _timing_cell(lambda timing: f"{timing.p95_ms:.1f}")),
        ("p50 to\nPyTorch", _timing_cell(lambda timing: _ratio(timing.latency_ratio))),
        ("to ORT\nfp32", _timing_cell(lambda timing: _ratio(timing.latency_ratio_to_onnx))),
        ("rows\n/s", _timing_cell(lambda timing: f"{timing.throughput_per_second:.0f}")),
        ("memory\nMB", _timing_cell(lambda timing: f"{timing.memory_bytes / MEGABYTE:.0f}")),
        ("file\nMB", _timing_cell(lambda timing: f"{timing.file_bytes / MEGABYTE:.1f}")),
    ]


def _timing_cell(show: Callable[[Timing], str]) -> Cell:
    return lambda row: show(row.timing) if row.timing else _NOTHING


def _ratio(interval: Interval | None) -> str:
    return f"{interval.value:.2f}×" if interval else _NOTHING


def _decision_lines(outcome: PipelineOutcome) -> list[Text]:
    status = Text(f"{outcome.name}: {STATUS_WORDS[outcome.status]}", style=_STATUS_STYLES.get(outcome.status, "bold red"))
    status.append(f"  (run {outcome.run_id}, {duration(outcome.seconds)})", style="not bold dim")
    lines = [status, Text(f"  {cause_words(outcome.cause)}")]
    if outcome.error is not None:
        where = f" in {outcome.error.stage}" if outcome.error.stage else ""
        lines.append(Text(f"  {outcome.error.type}{where}: {outcome.error.message}"))
    else:
        lines += [Text(f"  {reason}") for reason in outcome.reasons]
    chosen = next((row for row in outcome.models if row.chosen), None)
    if chosen and chosen.clauses:
        lines.append(Text("  contract: " + "; ".join(clause_words(clause) for clause in chosen.clauses)))
    if outcome.version and outcome.alias:
        before = f", before it {outcome.previous_version}" if outcome.previous_version else ""
        lines.append(Text(f"  {outcome.alias}: {outcome.version}{before}"))
    return lines


def _note_lines(outcome: PipelineOutcome) -> list[Text]:
    lines = [Text(f"note: {warning}", style="yellow") for warning in outcome.warnings]
    if reused := [stage.stage for stage in outcome.stages if stage.reused]:
        lines.append(Text(f"reused, because nothing that goes into it changed: {', '.join(dict.fromkeys(reused))}"))
    return lines


def _sample_lines(outcome: PipelineOutcome) -> list[RenderableType]:
    if not outcome.samples:
        return []
    grid = Table.grid(padding=(0, 2, 0, 0))
    for answer, question in served_answers(outcome):
        grid.add_row(Text(f"  {answer}"), Text(question))
    return [Text("The served model has just answered:"), grid]


def served_answers(outcome: PipelineOutcome) -> list[tuple[str, str]]:
    """(answer, question) of each sample request, in a few words."""
    return [(_answer(sample.reply), _question(sample.request)) for sample in outcome.samples]


def _question(request: dict) -> str:
    return str(next(iter(request.values()))) if len(request) == 1 else json.dumps(request, ensure_ascii=False)


def _answer(reply: dict) -> str:
    """A reply in a few words: label and probability where it has them, else its JSON."""
    if "label" in reply and isinstance(reply.get("probability"), float):
        return f"{reply['label']} ({reply['probability']:.0%})"
    return json.dumps(reply, ensure_ascii=False)


def _address_lines(outcome: PipelineOutcome) -> list[Text]:
    addresses = outcome.addresses
    shown = [
        ("predict", addresses.predict_url),
        ("API docs", addresses.api_docs_url),
        ("Prefect UI", addresses.prefect_ui_url),
        ("flow run", addresses.flow_run_url),
        ("report", addresses.report_path),
        ("outcome", addresses.outcome_path),
    ]
    return [Text(f"{title:<11} {address}") for title, address in shown if address]
