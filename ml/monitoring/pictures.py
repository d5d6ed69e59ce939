"""The histograms of a check as one SVG image: for the report, and inlined on the run page in Prefect."""

import base64
import io
import warnings
from collections.abc import Sequence

from ml.monitoring.histograms import Histogram

_BLUE, _ORANGE = "#1e88d2", "#e69f00"
_PANEL_INCHES = (6.4, 2.6)


def histograms_picture(histograms: Sequence[Histogram]) -> str | None:
    """A `data:` address of one picture with all histograms below each other; None without any.

    An image cannot take the page's colours, so it brings its own white ground. Its text stays text, in the fonts of
    whoever looks at it: class names may be in any script.
    """
    if not histograms:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    width, height = _PANEL_INCHES
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "check", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(width, height * len(histograms)), layout="constrained", facecolor="white")
        for axes, histogram in zip(figure.subplots(len(histograms), squeeze=False)[:, 0], histograms, strict=True):
            places = range(len(histogram.bins))
            for offset, name, colour, hatch, shares in (
                (-0.2, "reference", _BLUE, "", histogram.reference),
                (0.2, "now", _ORANGE, "//", histogram.current),
            ):
                axes.bar(
                    [place + offset for place in places],
                    [100 * share for share in shares],
                    width=0.4,
                    label=name,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                )
            axes.set_xticks(places, [_clip(name) for name in histogram.bins], rotation=30, ha="right")
            axes.set_ylabel("share, %")
            axes.set_title(histogram.title, loc="left", fontsize=9.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # Of scripts that matplotlib's own font lacks; it draws no glyph here.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def describe_histograms(histograms: Sequence[Histogram]) -> str:
    """The picture in words, for those who do not see it: the largest difference of each."""
    parts = []
    for histogram in histograms:
        differences = [now - before for before, now in zip(histogram.reference, histogram.current, strict=True)]
        largest = max(range(len(differences)), key=lambda place: abs(differences[place]))
        before, now = histogram.reference[largest], histogram.current[largest]
        parts.append(f"{histogram.title}, largest difference at {histogram.bins[largest]}: {before:.0%} before, {now:.0%} now")
    return "; ".join(parts)


def _clip(name: str, num_characters: int = 18) -> str:
    return name if len(name) <= num_characters else name[: num_characters - 1] + "…"
