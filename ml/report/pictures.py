"""The pictures of the report as SVG text that is put into the page itself.

Text stays text, in the page's own font, so names in any script are shown; lines and text take the page's colours,
so one picture serves light and dark. Series differ by shape as well as by colour (Okabe and Ito's palette).
"""

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from ml.report.comparison import Comparison, metric_title

# Replaced by the page's text and line colours after drawing; matplotlib takes only real colours.
_TEXT_SENTINEL = "#010203"
_FAINT_SENTINEL = "#040506"

# The blue is lighter than theirs, so that it stands out on a dark page too.
_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _VERMILION = "#1e88d2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _VERMILION)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_SIZE_INCHES = (4.4, 3.3)  # 317 units wide at 72 an inch: as wide as a phone, so that text keeps its size there
_FONT_SIZE = 9.5

_STYLE: dict[RcKeyType, Any] = {
    "font.size": _FONT_SIZE,
    "text.color": _TEXT_SENTINEL,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT_SENTINEL,
    "axes.labelcolor": _TEXT_SENTINEL,
    "xtick.color": _FAINT_SENTINEL,
    "xtick.labelcolor": _TEXT_SENTINEL,
    "ytick.color": _FAINT_SENTINEL,
    "ytick.labelcolor": _TEXT_SENTINEL,
    "axes.grid": True,
    "grid.color": _FAINT_SENTINEL,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    # Text stays text: fonts that hold every script are the browser's affair.
    "svg.fonttype": "none",
}


@rc_context(_STYLE)
def loss_curve(history: list[dict[str, Any]], best_step: int | None, resumed_from_step: int | None) -> str | None:
    """Training loss (each logged step and its running mean) and validation loss. None without a logged step.

    Args:
        history: lines of the training history: `kind` "step" or "validation", with `step` and `loss`.
    """
    steps = [(line["step"], line["loss"]) for line in history if line.get("kind") == "step"]
    validations = [(line["step"], line["loss"]) for line in history if line.get("kind") == "validation" and line.get("loss") is not None]
    if not steps and not validations:
        return None
    figure, axes = _new_figure()
    if steps:
        xs, ys = zip(*steps, strict=True)
        axes.plot(xs, ys, color=_SKY, alpha=0.35, linewidth=0.8)
        axes.plot(xs, _running_mean(list(ys)), color=_BLUE, linewidth=1.8, label="training (running mean)")
    if validations:
        xs, ys = zip(*validations, strict=True)
        axes.plot(xs, ys, color=_VERMILION, marker="o", markersize=6, linewidth=1.4, linestyle="--", label="validation")
    _mark_step(axes, best_step, "kept")
    _mark_step(axes, resumed_from_step, "resumed", lines_up=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.legend()
    return _svg(figure, "loss")


@rc_context(_STYLE)
def validation_curve(history: list[dict[str, Any]], best_step: int | None) -> str | None:
    """Accuracy on validation after each epoch, in percent. None when it was never measured."""
    points = [(line["step"], 100 * line["accuracy"]) for line in history if line.get("accuracy") is not None]
    if not points:
        return None
    figure, axes = _new_figure()
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=_GREEN, marker="s", markersize=6, linewidth=1.6)
    axes.set_xlim(0, max(xs) * 1.05)
    _mark_step(axes, best_step, "kept")
    axes.margins(y=0.25)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation accuracy, %")
    return _svg(figure, "accuracy")


@rc_context(_STYLE)
def latency_quality(comparison: Comparison) -> str | None:
    """Latency at batch 1 against the primary metric, with 95 % intervals; the rows that nothing beats in both are joined.

    None when no row has both numbers.
    """
    if not comparison.metrics:
        return None
    metric = comparison.metrics[0]
    figure, axes = _new_figure()
    points: list[tuple[float, float]] = []
    for position, row in enumerate(row for row in comparison.rows if row.role != "baseline"):
        found = comparison.interval(row, metric)
        if found is None or row.timing is None:
            continue
        shown = comparison.in_units(metric, found)
        x, y = row.timing.p50_ms, shown.value
        colour = _COLOURS[position % len(_COLOURS)]
        axes.errorbar(x, y, yerr=[[max(y - shown.low, 0)], [max(shown.high - y, 0)]], color=colour, alpha=0.5, linewidth=1, capsize=2)
        marker = _MARKERS[position % len(_MARKERS)]
        axes.plot(x, y, marker=marker, markersize=7, color=colour, linestyle="none", label=row.name + (" (chosen)" if row.chosen else ""))
        if row.chosen:
            axes.plot(x, y, marker="o", markersize=17, markerfacecolor="none", markeredgecolor=_TEXT_SENTINEL, markeredgewidth=1.2)
        points.append((x, y))
    if not points:
        return None
    front = _pareto_front(points)
    axes.plot([x for x, _ in front], [y for _, y in front], color=_FAINT_SENTINEL, linestyle=":", linewidth=1.2, zorder=0)
    for row in comparison.rows:
        found = comparison.interval(row, metric)
        if row.role == "baseline" and found is not None:
            level = comparison.in_units(metric, found).value
            axes.axhline(level, color=_FAINT_SENTINEL, linewidth=1, linestyle="--")
            axes.annotate(
                "baseline", (1, level), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right"
            )
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("p50 latency at batch 1, ms (less is better)")
    axes.set_ylabel(metric_title(metric) + (", %" if metric in comparison.percent else ""))
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, "pareto")


def describe_latency_quality(comparison: Comparison) -> str:
    """The picture in words, for those who do not see it."""
    metric = comparison.metrics[0] if comparison.metrics else ""
    parts = []
    for row in comparison.rows:
        found = comparison.interval(row, metric)
        if found is not None and row.timing is not None:
            parts.append(f"{row.name}: {row.timing.p50_ms:.1f} ms, {comparison.in_units(metric, found).value:.1f}")
    return f"Latency in milliseconds and {metric_title(metric)} of each model. " + "; ".join(parts)


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")  # not pyplot: that would keep every figure in memory
    return figure, figure.add_subplot()


def _running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start (Kingma and Ba, Adam, section 3)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means


def _mark_step(axes: Axes, step: int | None, words: str, *, lines_up: int = 0) -> None:
    if step:
        axes.axvline(step, color=_FAINT_SENTINEL, linewidth=1, linestyle=":")
        axes.annotate(words, (step, 0), xycoords=("data", "axes fraction"), xytext=(3, 3 + 12 * lines_up), textcoords="offset points")


def _pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both: faster and better. Sorted by latency."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _svg(figure: Figure, name: str) -> str:
    """An SVG element for a page: in the page's colours and font, and the same text whenever the numbers are the same."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # an XML prologue has no place inside HTML
    text = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", text)  # line2d_1 and the like: unused, and the same in every picture
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    return text.replace(_TEXT_SENTINEL, "currentColor").replace(_FAINT_SENTINEL, "var(--faint, #888)")
