"""Pictures of a training that runs: where the time of a step goes in each rank. Its losses: `pictures.loss_curve`."""

from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context

from ml.report import pictures

MAX_RANKS = 16
_PARTS = ("data", "forward", "backward", "communication", "update")
_COLOURS = (pictures._ORANGE, pictures._SKY, pictures._BLUE, pictures._VERMILION, pictures._GREEN)


@rc_context(pictures._STYLE)
def step_times(latest: Mapping[int, Mapping[str, Any]]) -> str | None:
    """A bar per rank: waiting for data, forward, backward, waiting for other ranks or the network, update, in milliseconds.

    None without a rank. Of more than `MAX_RANKS` ranks, the slowest in the forward pass are shown: they set the pace.

    Args:
        latest: rank -> a line of its meters (see `ml.training.meters`).
    """
    shown = sorted(sorted(latest, key=lambda rank: -latest[rank]["forward_seconds"])[:MAX_RANKS])
    if not shown:
        return None
    figure, axes = pictures._new_figure()
    figure.set_figheight(1.5 + 0.32 * len(shown))
    names = [f"rank {rank}" for rank in shown]
    parts = [_parts(latest[rank]) for rank in shown]
    left = [0.0] * len(shown)
    for position, part in enumerate(_PARTS):
        widths = [1000 * values[part] for values in parts]
        axes.barh(names, widths, left=left, height=0.62, label=part, color=_COLOURS[position], edgecolor="white", linewidth=0.8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds of a step")
    figure.legend(loc="outside lower center", ncols=3)
    return pictures._svg(figure, "steps")


def _parts(line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part; where communication is not known it stays in the backward pass."""
    communication = min((line.get("communication_share") or 0.0) * line["step_seconds"], line["backward_seconds"])
    return {
        "data": line["data_seconds"],
        "forward": line["forward_seconds"],
        "backward": line["backward_seconds"] - communication,
        "communication": communication,
        "update": line["update_seconds"],
    }
