"""The page of a training that runs, as Markdown with its pictures inside; see `run_page` for how and why."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml.report import run_page
from ml.report.table import escape_markdown
from ml.report.training_words import seconds_left
from ml.report.words import byte_size, duration
from ml.training.diagnosis import diagnose, recent_lines
from ml.training.findings import Finding

MAX_ROWS = 64
_HEADINGS = (
    "rank", "step", "waits for data", "communication", "rows/s", "tokens/s", "MFU", "CPU", "memory", "machine's memory", "GPU", "GPU memory"
)  # fmt: skip

Line = dict[str, Any]


def render_card(name: str, history: Sequence[Line], metrics: dict[int, list[Line]], *, num_steps: int | None) -> str:
    """Where the training stands, what is wrong, the figures of each rank, the losses, and where the time goes.

    Args:
        name: of the model.
        history: lines of the training history (see `ml.training.history`); steps may be left out.
        metrics: rank -> its lines (see `ml.training.meters`).
        num_steps: planned; None where that is not known.
    """
    from ml.report.pictures import loss_curve, validation_curve
    from ml.report.training_pictures import step_times

    validations = [line for line in history if line.get("kind") == "validation" and line.get("loss") is not None]
    best = min(validations, key=lambda line: line["loss"])["step"] if validations else None
    latest = {rank: lines[-1] for rank, lines in recent_lines(metrics).items()}
    drawable = [line for line in history if math.isfinite(line.get("loss") or 0.0)]
    pictures = {
        "Loss": loss_curve(drawable, best, None),
        "Accuracy on validation": validation_curve(drawable, best),
        "Where the time of a step goes": step_times(latest),
    }
    return run_page._join(
        [
            f"**{escape_markdown(name)}: {_progress(history, num_steps)}**",
            _diagnosis(diagnose(history, metrics)),
            _table(latest),
            *(run_page._picture(title, svg) for title, svg in pictures.items() if svg),
        ]
    )


def _progress(history: Sequence[Line], num_steps: int | None) -> str:
    steps = [line for line in history if line.get("kind") == "step"]
    if not steps:
        return "no step is done yet"
    step = steps[-1]["step"]
    words = f"step {step}" + (f" of {num_steps} ({100 * step / num_steps:.0f} %)" if num_steps else "")
    left = seconds_left(history, num_steps)
    validation = next((line for line in reversed(history) if line.get("kind") == "validation" and line.get("loss") is not None), None)
    words += f", loss {steps[-1]['loss']:.4f}"
    if validation is not None:
        accuracy = validation.get("accuracy")
        words += f", validation loss {validation['loss']:.4f}"
        words += f", accuracy {100 * accuracy:.1f} %" if accuracy is not None else ""
    return words + (f", at most {duration(left)} left" if left else "")


def _diagnosis(findings: Sequence[Finding]) -> str:
    """In words; docs/troubleshooting.md has a section of the same name for each."""
    if not findings:
        return "Diagnosis: nothing is wrong."
    lines = [
        f"- **{finding.name}** ({finding.severity}): {escape_markdown(finding.sentence)}. To do: {escape_markdown(finding.advice)}."
        for finding in findings
    ]
    return "\n".join(["Diagnosis (more in docs/troubleshooting.md):", "", *lines])


def _table(latest: Mapping[int, Line]) -> str:
    if not latest:
        return "No figures of the ranks yet."
    rows = [f"| {' | '.join(_HEADINGS)} |", "|" + " ---: |" * len(_HEADINGS)]
    rows += ["| " + " | ".join(_row(line)) + " |" for line in list(latest.values())[:MAX_ROWS]]
    if len(latest) > MAX_ROWS:
        rows.append(f"\n{len(latest) - MAX_ROWS} more ranks are not shown.")
    return "\n".join(rows)


def _row(line: Line) -> list[str]:
    return [
        str(line["rank"]),
        f"{1000 * line['step_seconds']:.0f} ms",
        _percent(line.get("data_wait_share")),
        _percent(line.get("communication_share")),
        f"{line['rows_per_second']:,.0f}",
        f"{line['tokens_per_second']:,.0f}",
        _percent(line.get("mfu")),
        _of_hundred(line.get("cpu_percent")),
        byte_size(line.get("rss_bytes")),
        _percent(line.get("node_memory_share")),
        _of_hundred(line.get("gpu_percent")),
        byte_size(line.get("gpu_memory_bytes")),
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _of_hundred(percent: float | None) -> str:
    return "–" if percent is None else f"{percent:.0f} %"
