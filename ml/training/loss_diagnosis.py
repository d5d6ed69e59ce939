"""What losses say: not finite, rising, stuck, overfitting. Part of `ml.training.diagnosis`.

A loss is noisy from step to step, so means of blocks of steps are compared, with their standard errors, and a change has to be both
beyond chance and large enough to matter.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ml.training.findings import LOSS_RISING, NOT_FINITE, OVERFITTING, PLATEAU, Finding, percent

Line = dict[str, Any]

# Blocks of a twentieth of the steps, of ten at the least: fewer say nothing about the spread.
NUM_BLOCKS = 20
MIN_BLOCK = 10
# The lowest of twenty blocks lies some two standard errors below their mean by chance alone.
RISING_ERRORS = 4.0
RISING_SHARE = 0.10
RISING_SHARE_OF_FALL = 0.05
# A rate that is far too high drives the loss up within the first block: the first step alone is the measure then, a rough one.
RISEN_SINCE_START = 3.0
# Stuck: since its first steps the loss has fallen by less, chance taken into account, and by even less in the last half.
STUCK_FALL = 0.05
STUCK_LATEST_FALL = 0.01
STUCK_MIN_STEPS = 60
# A warm-up may take a tenth of a training, in which nothing need happen.
STUCK_MIN_PROGRESS = 0.20
NUM_FIRST_STEPS = 20
# Validation repeats on the same rows, so two in a row above the best by more than this are no accident.
OVERFITTING_RISE = 0.05
OVERFITTING_FALL = 0.05
NUM_WORSE_VALIDATIONS = 2
# A single broken row in some thousand steps is skipped and forgotten.
MANY_NOT_FINITE_SHARE = 0.01
SHOWN_STEPS = 5


@dataclass(frozen=True)
class Block:
    """Consecutive steps: the last of them, their mean loss and its standard error."""

    last_step: int
    mean: float
    error: float


def diagnose_losses(history: Sequence[Line], metrics: dict[int, list[Line]]) -> list[Finding]:
    """Findings about the loss; see `ml.training.diagnosis.diagnose`."""
    steps = [line for line in history if line.get("kind") == "step" and _is_finite(line.get("loss"))]
    validations = [line for line in history if line.get("kind") == "validation" and _is_finite(line.get("loss"))]
    findings = _not_finite(history, metrics)
    rising = _rising(steps)
    findings += rising or _overfitting(steps, validations)
    if not rising:
        num_steps = next((line["num_steps"] for line in reversed(history) if line.get("num_steps")), None)
        findings += _plateau(steps, validations, num_steps)
    return findings


def _not_finite(history: Sequence[Line], metrics: dict[int, list[Line]]) -> list[Finding]:
    bad = {line["step"] for line in history if line.get("kind") == "poisoned"}
    bad = sorted(bad | {line["step"] for line in history if line.get("kind") == "step" and not _is_finite(line.get("loss"))})
    # Every rank counts the same ones.
    metered = max((sum(line.get("num_not_finite", 0) for line in lines) for lines in metrics.values()), default=0)
    number = max(len(bad), metered)
    if not number:
        return []
    last = max((line["step"] for line in history if "step" in line), default=0)
    last = max([last, *(lines[-1]["step"] for lines in metrics.values() if lines), 1])
    which = f" (the latest: {', '.join(map(str, bad[-SHOWN_STEPS:]))})" if bad else ""
    many = number > max(1.0, MANY_NOT_FINITE_SHARE * last)
    return [
        Finding(
            NOT_FINITE,
            "error" if many else "warning",
            f"in {number} of {last} steps the loss or the gradient was not finite{which}; those steps changed no weight",
            "lower train.learning_rate, or set train.precision to bf16 or fp32; look at the rows, if they are always the same",
        )
    ]


def _rising(steps: Sequence[Line]) -> list[Finding]:
    found = blocks(steps)
    if len(found) < 4:
        return []
    best = min(found[:-2], key=lambda block: block.mean)
    start = float(steps[0]["loss"])
    needed = max(RISING_SHARE * abs(best.mean), RISING_SHARE_OF_FALL * (found[0].mean - best.mean))
    if all(block.mean - best.mean > max(needed, RISING_ERRORS * math.hypot(best.error, block.error)) for block in found[-2:]):
        since, lowest = f"up to step {best.last_step}", best.mean
    elif all(block.mean - start > max((RISEN_SINCE_START - 1) * abs(start), 2.0 * block.error) for block in found[-2:]):
        since, lowest = "at its first step", start
    else:
        return []
    rate = steps[-1].get("learning_rate")
    at = f" at a learning rate of {rate:.2g}" if rate is not None else ""
    return [
        Finding(
            LOSS_RISING,
            "error",
            f"the training loss has risen from {lowest:.4g} ({since}) to {found[-1].mean:.4g}{at}",
            "lower train.learning_rate three- to tenfold, or warm up longer (train.warmup_fraction); "
            "if that does not help, look whether the labels are right and the data is in the order that you think",
        )
    ]


def _plateau(steps: Sequence[Line], validations: Sequence[Line], num_steps: int | None) -> list[Finding]:
    """A training that learns nothing. One that has learned and does not get better is what early stopping is for."""
    if len(steps) < STUCK_MIN_STEPS or steps[-1]["step"] < STUCK_MIN_PROGRESS * (num_steps or 0):
        return []
    losses = [float(line["loss"]) for line in steps]
    first = statistics.fmean(losses[:NUM_FIRST_STEPS])
    third, fourth = losses[len(losses) // 2 : 3 * len(losses) // 4], losses[3 * len(losses) // 4 :]
    latest_fall = statistics.fmean(third) - statistics.fmean(fourth)
    chance = 3.0 * math.hypot(_error(third), _error(fourth))
    fallen = first - statistics.fmean(fourth) + 2.0 * _error(losses[:NUM_FIRST_STEPS])
    if fallen > STUCK_FALL * abs(first) or latest_fall > max(STUCK_LATEST_FALL * abs(first), chance):
        return []
    if len(validations) >= 2 and validations[0]["loss"] - validations[-1]["loss"] > STUCK_FALL * abs(validations[0]["loss"]):
        return []
    rate = max((line.get("learning_rate") or 0.0 for line in steps), default=0.0)
    return [
        Finding(
            PLATEAU,
            "error",
            f"the training loss is {statistics.fmean(fourth):.4g} after {steps[-1]['step']} steps and was {first:.4g} at the start: "
            f"nothing is learned at a learning rate of up to {rate:.2g}",
            "raise train.learning_rate three- to tenfold; if no rate helps, the labels may not follow from the inputs "
            "(wrong column, shuffled, mostly noise), or too few parameters are trained",
        )
    ]


def _overfitting(steps: Sequence[Line], validations: Sequence[Line]) -> list[Finding]:
    if len(validations) <= NUM_WORSE_VALIDATIONS:
        return []
    best = min(range(len(validations)), key=lambda i: validations[i]["loss"])
    after = validations[best + 1 :]
    lowest, latest = float(validations[best]["loss"]), float(validations[-1]["loss"])
    worse = after[-NUM_WORSE_VALIDATIONS:]
    if len(after) < NUM_WORSE_VALIDATIONS or min(line["loss"] for line in worse) < lowest + OVERFITTING_RISE * abs(lowest):
        return []
    interval = validations[-1]["step"] - validations[-2]["step"]
    then, now = (
        [float(line["loss"]) for line in steps if validation["step"] - interval < line["step"] <= validation["step"]]
        for validation in (validations[best], validations[-1])
    )
    if not then or not now or statistics.fmean(then) - statistics.fmean(now) < OVERFITTING_FALL * abs(statistics.fmean(then)):
        return []
    fell = (statistics.fmean(then) - statistics.fmean(now)) / abs(statistics.fmean(then))
    return [
        Finding(
            OVERFITTING,
            "warning",
            f"the validation loss was lowest at step {validations[best]['step']} ({lowest:.4g}) and is {latest:.4g} now, while the "
            f"training loss fell by another {percent(fell)}",
            "the weights of the best validation are kept; lower train.epochs or train.patience to save the time, "
            "raise train.weight_decay or the model's dropout, or bring more data",
        )
    ]


def blocks(steps: Sequence[Line]) -> list[Block]:
    """Means of consecutive steps, the last block up to the last step; a rest at the beginning is left out."""
    size = max(MIN_BLOCK, len(steps) // NUM_BLOCKS)
    found = []
    for start in range(len(steps) % size, len(steps), size):
        losses = [float(line["loss"]) for line in steps[start : start + size]]
        found.append(Block(steps[start + size - 1]["step"], statistics.fmean(losses), _error(losses)))
    return found


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
