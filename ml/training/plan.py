"""What is decided once, from the data and a few measured steps, and then kept: also when the training is resumed."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ml.training.batches import num_batches
from ml.training.precision import Precision, faster_precision
from ml.training.spec import TrainSpec

MAX_AUTO_EPOCHS = 20
# Fine-tuning settles within two or three passes over thousands of rows, but takes some hundred steps in any case.
PREFERRED_AUTO_EPOCHS = 2
WANTED_STEPS = 150
MAX_VALIDATIONS = 10
# The probe runs alone; training also writes checkpoints and shares the machine with what watches it.
BUDGET_SHARE = 0.85


@dataclass(frozen=True)
class Measured:
    """Seconds of one training step per precision, and of one validation batch of the same number of rows in the best of them."""

    step_seconds: dict[Precision, float]
    validation_batch_seconds: float


@dataclass(frozen=True)
class Plan:
    """Frozen in plan.json and in every checkpoint."""

    fingerprint: str
    precision: Precision
    epochs: int
    num_train_rows: int
    num_available_rows: int
    num_validation_rows: int
    global_batch_size: int
    steps_per_epoch: int
    num_steps: int
    num_warmup_steps: int
    validate_every_steps: int
    step_seconds: float
    step_seconds_measured: dict[str, float]
    estimated_seconds: float
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        return cls(**{**values, "warnings": tuple(values["warnings"])})


def decide_plan(spec: TrainSpec, *, num_rows: int, num_validation_rows: int, measured: Measured, seconds_left: float) -> Plan:
    """Choose precision, epochs and rows so that training ends within the time left.

    With epochs "auto" a tight budget costs epochs first, then rows; given epochs are kept and rows are cut.
    """
    precision = faster_precision(measured.step_seconds) if spec.precision == "auto" else spec.precision
    step_seconds = measured.step_seconds[precision]
    batch_size = spec.global_batch_size
    wanted_epochs = auto_epochs(num_rows, batch_size) if spec.epochs == "auto" else spec.epochs
    warnings = []

    def seconds_for(epochs: int, rows: int) -> float:
        steps = epochs * num_batches(rows, batch_size)
        validations = _num_validations(spec, epochs, rows)
        return steps * step_seconds + validations * num_batches(num_validation_rows, batch_size) * measured.validation_batch_seconds

    allowed = max(seconds_left, 0.0) * BUDGET_SHARE
    epochs, rows = wanted_epochs, num_rows
    while spec.epochs == "auto" and epochs > 1 and seconds_for(epochs, rows) > allowed:
        epochs -= 1
    if epochs < wanted_epochs:
        warnings.append(f"{wanted_epochs} epochs do not fit the time left ({seconds_left:.0f} s); training for {epochs}")
    if seconds_for(epochs, rows) > allowed:
        fixed = seconds_for(epochs, 0)
        fitting = int((allowed - fixed) / (epochs * step_seconds)) * batch_size
        # Below a few batches nothing is learned, whatever the clock says.
        rows = min(num_rows, max(fitting, 4 * batch_size))
        if rows < num_rows:
            warnings.append(
                f"{num_rows} training rows do not fit the time left ({seconds_left:.0f} s at {step_seconds:.2f} s per step of "
                f"{batch_size}); training on {rows}, sampled with the shares of the classes kept. Raise budget_minutes to use all"
            )
    steps_per_epoch = num_batches(rows, batch_size)
    num_steps = epochs * steps_per_epoch
    return Plan(
        fingerprint=spec.fingerprint,
        precision=precision,
        epochs=epochs,
        num_train_rows=rows,
        num_available_rows=num_rows,
        num_validation_rows=num_validation_rows,
        global_batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_warmup_steps=min(math.ceil(spec.optimizer.warmup_fraction * num_steps), num_steps),
        validate_every_steps=_validate_every(spec, epochs, steps_per_epoch),
        step_seconds=step_seconds,
        step_seconds_measured={str(name): seconds for name, seconds in measured.step_seconds.items()},
        estimated_seconds=seconds_for(epochs, rows),
        warnings=tuple(warnings),
    )


def auto_epochs(num_rows: int, batch_size: int) -> int:
    """As many as it takes for `WANTED_STEPS` steps, from `PREFERRED_AUTO_EPOCHS` to `MAX_AUTO_EPOCHS`."""
    wanted = math.ceil(WANTED_STEPS / num_batches(num_rows, batch_size))
    return min(max(wanted, PREFERRED_AUTO_EPOCHS), MAX_AUTO_EPOCHS)


def _validate_every(spec: TrainSpec, epochs: int, steps_per_epoch: int) -> int:
    if spec.validate_every_steps != "epoch":
        return spec.validate_every_steps
    return steps_per_epoch * math.ceil(epochs / MAX_VALIDATIONS)


def _num_validations(spec: TrainSpec, epochs: int, rows: int) -> int:
    steps_per_epoch = max(num_batches(rows, spec.global_batch_size), 1)
    return math.ceil(epochs * steps_per_epoch / _validate_every(spec, epochs, steps_per_epoch))
