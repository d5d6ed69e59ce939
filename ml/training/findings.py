"""What a diagnosis comes to. docs/troubleshooting.md has a section of the same name for each."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["warning", "error"]

NOT_FINITE = "loss not finite"
MEMORY = "memory near the limit"
LOSS_RISING = "loss rising"
PLATEAU = "plateau"
OVERFITTING = "overfitting"
INPUT_BOUND = "input-bound"
STRAGGLER = "straggler"
COMMUNICATION_BOUND = "communication-bound"
UNDER_USED = "under-used device"
NAMES = (NOT_FINITE, MEMORY, LOSS_RISING, PLATEAU, OVERFITTING, INPUT_BOUND, STRAGGLER, COMMUNICATION_BOUND, UNDER_USED)
"""All of them, the most pressing first."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Args:
        name: one of `NAMES`.
        severity: "error" when the training will fail or learns nothing, "warning" when it wastes time or quality.
        sentence: what was seen, with figures.
        advice: what to do.
    """

    name: str
    severity: Severity
    sentence: str
    advice: str


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
