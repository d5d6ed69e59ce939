"""A training in words: what early stopping saved, and how long it still takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml.report.words import count, duration

Line = Mapping[str, Any]


@dataclass(frozen=True)
class EarlyStop:
    """What was not done because validation no longer got better.

    Args:
        seconds: steps that were not done times the mean time of one, validations and checkpoints included.
        share: of the seconds that the whole plan would have taken, 0 to 1.
    """

    step: int
    num_steps_planned: int
    seconds: float
    share: float

    @property
    def num_steps_saved(self) -> int:
        return self.num_steps_planned - self.step


def early_stop(history: Sequence[Line], plan: Mapping[str, Any]) -> EarlyStop | None:
    """Of a training that is done; None when all planned steps were done, or nothing is known about them.

    Args:
        history: lines of the training history (see `ml.training.history`).
        plan: of the training, with `num_steps`.
    """
    steps = [line for line in history if line.get("kind") in ("step", "validation") and line.get("seconds") is not None]
    planned = plan.get("num_steps")
    if not steps or planned is None or not 0 < steps[-1]["step"] < planned:
        return None
    done, seconds = steps[-1]["step"], steps[-1]["seconds"]
    saved = (planned - done) * seconds / done
    return EarlyStop(step=done, num_steps_planned=planned, seconds=saved, share=saved / (seconds + saved))


def early_stop_words(stop: EarlyStop) -> str:
    """ "Stopped at step 120 of 600: 480 steps not done, about 3.2 min (80 % of the plan) saved." """
    return (
        f"Stopped at step {count(stop.step)} of {count(stop.num_steps_planned)}: {count(stop.num_steps_saved)} steps not done, "
        f"about {duration(stop.seconds)} ({100 * stop.share:.0f} % of the plan) saved."
    )


def seconds_left(history: Sequence[Line], num_steps: int | None) -> float | None:
    """Of all planned steps, at the pace of the latest half of those that are done; early stopping may end it before. None at first."""
    steps = [line for line in history if line.get("kind") == "step" and line.get("seconds") is not None]
    if not num_steps or len(steps) < 2:
        return None
    last, middle = steps[-1], steps[(len(steps) - 1) // 2]
    if last["step"] <= middle["step"]:
        return None
    return max(num_steps - last["step"], 0) * (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])
