"""The report of a run: one HTML file that needs no network, no script and no font of its own."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ml.artifacts import Interval
from ml.outcome import UNCOMPRESSED_NAME, ModelRow, PipelineOutcome
from ml.report.comparison import Comparison, clause_title, compare, half_width, metric_title
from ml.report.confusion import Confusion, describe_confusion
from ml.report.training_words import early_stop, early_stop_words
from ml.report.words import STATUS_WORDS, byte_size, cause_words, count, duration, plain

_TEMPLATES = Path(__file__).parent / "templates"

MAX_LISTED_OBJECTS = 20
MAX_TEXT_CHARACTERS = 400


def render_report(
    outcome: PipelineOutcome,
    history: list[dict[str, Any]],
    summary: dict[str, Any],
    confusions: Mapping[str, Sequence[Sequence[int]] | None],
    labels: Sequence[str],
) -> str:
    """Draw the report of a run that ended in any way; what the run did not reach is left out.

    Texts, labels and names are shown as they are, never read as markup; a content security policy forbids
    scripts and every request as well.

    Args:
        history: lines of the training history (see `ml.training.history`).
        summary: `SplitDataset.summary`, shown whatever its keys are.
        confusions: name of a model -> counts [true][predicted]; None for a model that is not a classifier.
        labels: class names in the order of the matrices.
    """
    from ml.report.pictures import describe_latency_quality, latency_quality, loss_curve, validation_curve

    comparison = compare(outcome)
    training = outcome.training
    stop = early_stop(history, training.plan)
    pictures = {
        "loss": loss_curve(history, training.best_step, training.resumed_from_step),
        "validation": validation_curve(history, training.best_step),
        "latency_quality": latency_quality(comparison),
    }
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "bytes": byte_size, "count": count, "plain": plain, "points": _points}
    environment.filters |= {"metric_title": metric_title, "clause_title": clause_title}
    environment.filters |= {"clip": _clip, "breakable": _breakable, "json": _json}
    return environment.get_template("report.html").render(
        outcome=outcome,
        status_words=STATUS_WORDS[outcome.status],
        cause_words=cause_words(outcome.cause),
        comparison=comparison,
        figures=_key_figures(outcome, comparison),
        metric_cell=lambda row, metric: _metric_cell(comparison, row, metric),
        ratio_cell=_ratio,
        # Drawn by us from numbers and escaped names, so it may stand in the page as it is.
        pictures={name: Markup(svg) if svg else None for name, svg in pictures.items()},  # noqa: S704
        early_stopping=early_stop_words(stop) if stop else None,
        latency_words=describe_latency_quality(comparison),
        events=[line["message"] for line in history if "message" in line],
        summary=summary,
        confusions=_confusions(outcome, confusions, labels),
        max_objects=MAX_LISTED_OBJECTS,
        largest_class=max((rows for counts in outcome.data.split_counts.values() for rows in counts.values()), default=0),
        longest_stage=max((stage.seconds for stage in outcome.stages), default=0.0),
        reproduce=reproduce_command(outcome),
    )


def reproduce_command(outcome: PipelineOutcome) -> str:
    """The `make run` line for the main settings; the report lists all settings below it."""
    config = outcome.config
    data = config["data"]
    options = {"SOLUTION": config["solution"], "NAME": config["name"], "PROFILE": config["profile"]}
    if not data["source"].startswith("package:"):  # demo data comes with its own columns, given by the profile
        options |= {"DATA": data["source"], "TEXT": data["text_column"], "LABEL": data["label_column"], "ENCODING": data["encoding"]}
    options |= {"BUDGET_MINUTES": f"{config['budget_minutes']:g}", "SET": f"seed={config['seed']}"}
    return "make run " + " ".join(f"{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None)


def _key_figures(outcome: PipelineOutcome, comparison: Comparison) -> list[tuple[str, str, str]]:
    """(title, value, remark) of what the run is about: the chosen model, or the trained one when none was chosen."""
    by_name = {row.name: row for row in comparison.rows}
    row = next((row for row in comparison.rows if row.chosen), by_name.get(UNCOMPRESSED_NAME))
    if row is None or not comparison.metrics:
        return []
    metric = comparison.metrics[0]
    unit = " %" if metric in comparison.percent else ""
    found = comparison.interval(row, metric)
    figures = []
    if found is not None:
        cell = _metric_cell(comparison, row, metric)
        figures.append((metric_title(metric), cell.value + unit, f"{cell.spread}, {row.name}, {comparison.split}"))
        baseline = next((row for row in comparison.rows if row.role == "baseline"), None)
        level = comparison.interval(baseline, metric) if baseline else None
        if baseline is not None and level is not None:
            gain = 100 * (found.value - level.value)
            figures.append(
                ("Over the baseline", f"{gain:+.1f} points", f"baseline {_metric_cell(comparison, baseline, metric).value}{unit}")
            )
    if row.timing is not None:
        figures.append(("p50 latency", f"{row.timing.p50_ms:.1f} ms", f"{_ratio(row.timing.latency_ratio)} of PyTorch fp32"))
        figures.append(("Memory", byte_size(row.timing.memory_bytes), f"{row.timing.memory_ratio:.2f}× of PyTorch fp32"))
        figures.append(("Model file", byte_size(row.timing.file_bytes), f"{row.timing.file_ratio:.2f}× of PyTorch fp32"))
    figures.append(("Whole run", duration(outcome.seconds), f"{outcome.environment.num_cores} cores"))
    return figures


@dataclass(frozen=True)
class MetricCell:
    """One metric of one model as text: "82.9" and "± 1.8", without the unit."""

    value: str
    spread: str


def _metric_cell(comparison: Comparison, row: ModelRow, metric: str) -> MetricCell:
    interval = comparison.interval(row, metric)
    if interval is None:
        return MetricCell("–", "")
    shown = comparison.in_units(metric, interval)
    digits = 1 if metric in comparison.percent else 3
    return MetricCell(f"{shown.value:.{digits}f}", f"± {half_width(shown):.{digits}f}")


def _points(points: float) -> str:
    return f"{points:.2f}".replace("-", "−")


def _ratio(interval: Interval | None) -> str:
    return f"{interval.value:.2f}×" if interval else "–"


def _confusions(outcome: PipelineOutcome, matrices: Mapping[str, Sequence[Sequence[int]] | None], labels: Sequence[str]) -> list[Confusion]:
    """In the order of the table, so that before comes before after."""
    order = {row.name: position for position, row in enumerate(outcome.models)}
    names = sorted(matrices, key=lambda name: order.get(name, len(order)))
    return [describe_confusion(name, counts, labels) for name in names if (counts := matrices[name]) is not None]


def _clip(text: object) -> str:
    shown = str(text)
    return shown if len(shown) <= MAX_TEXT_CHARACTERS else shown[: MAX_TEXT_CHARACTERS - 1] + "…"


def _breakable(name: str) -> Markup:
    """A name that may be broken after an underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)
