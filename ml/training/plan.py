"""What is decided once, from the data and a few measured steps, and then kept: also when the training is resumed."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ml.training.batches import num_batches
from ml.training.precision import Precision, fastest_precision
from ml.training.spec import GradientSync, Parallelism, TrainSpec

MAX_AUTO_EPOCHS = 20
# Fine-tuning settles within two or three passes over thousands of rows, but takes some hundred steps in any case.
PREFERRED_AUTO_EPOCHS = 2
WANTED_STEPS = 150
MAX_VALIDATIONS = 10
# The probe runs alone; training also writes checkpoints and shares the machine with what watches it.
BUDGET_SHARE = 0.85
DEFAULT_BUCKET_MB = 25.0
# Another bucket size than the default must be faster by more than this, or noise would choose.
SMALLEST_SYNC_GAIN = 0.02
_DEFAULT_PARALLELISM = Parallelism()
_DEFAULT_SYNC = GradientSync(bucket_mb=DEFAULT_BUCKET_MB)


@dataclass(frozen=True)
class BucketTime:
    """One way for the gradient to travel, measured. Without overlap it is one bucket.

    Args:
        bytes_per_step: sent by each rank.
    """

    bucket_mb: float
    overlap: bool
    step_seconds: float
    bytes_per_step: float


@dataclass(frozen=True)
class CompileTime:
    """What compiling the model gave.

    Args:
        step_seconds: uncompiled.
        compile_seconds: until the compiled model had made its first step.
        used: the gain over all steps is larger than what compiling costs.
    """

    step_seconds: float
    compiled_step_seconds: float
    compile_seconds: float
    used: bool


@dataclass(frozen=True)
class Measured:
    """A few steps, timed.

    Args:
        step_seconds: of one training step, per precision, uncompiled and with the default buckets.
        validation_batch_seconds: of one batch of the same number of rows in the best of them.
        buckets: empty where their size cannot matter, or there was no time.
        compiled: none where it was not tried.
        notes: sentences for the user: what was not measured, and why.
    """

    step_seconds: dict[Precision, float]
    validation_batch_seconds: float
    buckets: tuple[BucketTime, ...] = ()
    compiled: CompileTime | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Frozen in plan.json and in every checkpoint.

    Args:
        step_seconds: expected, with everything that was chosen.
        parallelism: how the model is split, with "auto" resolved; `strategy_reason` says why, in words.
        gradient_sync: with bucket size and overlap as chosen; use `sync_for` to get what holds for a spec.
    """

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
    parallelism: Parallelism = _DEFAULT_PARALLELISM
    strategy_reason: str = ""
    gradient_sync: GradientSync = _DEFAULT_SYNC
    buckets_measured: tuple[BucketTime, ...] = ()
    compiled: CompileTime | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_compiled(self) -> bool:
        return self.compiled is not None and self.compiled.used

    def sync_for(self, spec: TrainSpec) -> GradientSync:
        """The spec's own settings, with what it left to measurement as it was decided when the training began."""
        sync = spec.gradient_sync
        if sync.bucket_mb != "auto":
            return sync
        return replace(sync, bucket_mb=self.gradient_sync.bucket_mb, overlap=sync.overlap and self.gradient_sync.overlap)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["gradient_sync"]["measured"] = values.pop("buckets_measured")
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        sync = {**values["gradient_sync"]}
        measured = tuple(BucketTime(**time) for time in sync.pop("measured"))
        compiled = CompileTime(**values["compiled"]) if values["compiled"] else None
        rebuilt = {
            "parallelism": Parallelism(**values["parallelism"]),
            "gradient_sync": GradientSync(**sync),
            "buckets_measured": measured,
            "compiled": compiled,
        }
        return cls(**{**values, **rebuilt, "warnings": tuple(values["warnings"]), "notes": tuple(values["notes"])})


def decide_plan(
    spec: TrainSpec,
    *,
    num_rows: int,
    num_validation_rows: int,
    measured: Measured,
    seconds_left: float,
    batches_of: Callable[[int], int] | None = None,
) -> Plan:
    """Choose precision, epochs, rows and how the gradient travels, so that training ends within the time left.

    With epochs "auto" a tight budget costs epochs first, then rows; given epochs are kept and rows are cut.

    Args:
        batches_of: batches of an epoch of so many rows; rows divided by the batch size when not given (no token budget).
    """
    precision = fastest_precision(measured.step_seconds) if spec.precision == "auto" else spec.precision
    sync, synced_seconds = choose_buckets(spec.gradient_sync, measured.buckets)
    step_seconds = measured.step_seconds[precision]
    if measured.compiled is not None and measured.compiled.used:
        step_seconds = measured.compiled.compiled_step_seconds
    # Measured last, with everything else as chosen.
    step_seconds = synced_seconds or step_seconds
    batch_size = spec.global_batch_size
    count = batches_of or (lambda rows: num_batches(rows, batch_size))
    wanted_epochs = auto_epochs(count(num_rows)) if spec.epochs == "auto" else spec.epochs
    warnings = []

    def seconds_for(epochs: int, rows: int) -> float:
        steps_per_epoch = count(rows) if rows else 0
        validations = _num_validations(spec, epochs, steps_per_epoch)
        validation = num_batches(num_validation_rows, batch_size) * measured.validation_batch_seconds
        return epochs * steps_per_epoch * step_seconds + validations * validation

    allowed = max(seconds_left, 0.0) * BUDGET_SHARE
    epochs, rows = wanted_epochs, num_rows
    while spec.epochs == "auto" and epochs > 1 and seconds_for(epochs, rows) > allowed:
        epochs -= 1
    if epochs < wanted_epochs:
        warnings.append(f"{wanted_epochs} epochs do not fit the time left ({seconds_left:.0f} s); training for {epochs}")
    if seconds_for(epochs, rows) > allowed:
        fixed = seconds_for(epochs, 0)
        rows_per_batch = num_rows / count(num_rows) if batches_of else batch_size
        fitting = int(int((allowed - fixed) / (epochs * step_seconds)) * rows_per_batch)
        # Below a few batches nothing is learned, whatever the clock says.
        rows = min(num_rows, max(fitting, 4 * batch_size))
        if rows < num_rows:
            warnings.append(
                f"{num_rows} training rows do not fit the time left ({seconds_left:.0f} s at {step_seconds:.2f} s per step of "
                f"{batch_size}); training on {rows}, sampled with the shares of the classes kept. Raise budget_minutes to use all"
            )
    steps_per_epoch = count(rows)
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
        gradient_sync=sync,
        buckets_measured=measured.buckets,
        compiled=measured.compiled,
        warnings=tuple(warnings),
        notes=measured.notes,
    )


def auto_epochs(batches_per_epoch: int) -> int:
    """As many as it takes for `WANTED_STEPS` steps, from `PREFERRED_AUTO_EPOCHS` to `MAX_AUTO_EPOCHS`."""
    return min(max(math.ceil(WANTED_STEPS / batches_per_epoch), PREFERRED_AUTO_EPOCHS), MAX_AUTO_EPOCHS)


def choose_buckets(sync: GradientSync, measured: tuple[BucketTime, ...]) -> tuple[GradientSync, float | None]:
    """The sync with bucket size and overlap decided, and the step's seconds with it when that was measured.

    Only what changes no number but the order of additions is chosen here. The default stays unless something is faster by more
    than `SMALLEST_SYNC_GAIN`.
    """
    if sync.bucket_mb != "auto":
        return sync, None
    if not measured:
        return replace(sync, bucket_mb=DEFAULT_BUCKET_MB), None
    # A model smaller than the default bucket has no such row; then the row that was measured last, one bucket, is the default.
    default = next((row for row in measured if row.overlap and row.bucket_mb == DEFAULT_BUCKET_MB), measured[-1])
    fastest = min(measured, key=lambda row: row.step_seconds)
    chosen = fastest if fastest.step_seconds < (1 - SMALLEST_SYNC_GAIN) * default.step_seconds else default
    return replace(sync, bucket_mb=chosen.bucket_mb, overlap=chosen.overlap), chosen.step_seconds


def pays_to_compile(step_seconds: float, compiled_step_seconds: float, compile_seconds: float, num_steps: int) -> bool:
    """Whether the planned steps gain more than compiling costs: once now, and once more for whatever resumes or validates."""
    return (step_seconds - compiled_step_seconds) * num_steps > 2 * compile_seconds


def _validate_every(spec: TrainSpec, epochs: int, steps_per_epoch: int) -> int:
    if spec.validate_every_steps != "epoch":
        return spec.validate_every_steps
    return steps_per_epoch * math.ceil(epochs / MAX_VALIDATIONS)


def _num_validations(spec: TrainSpec, epochs: int, steps_per_epoch: int) -> int:
    steps_per_epoch = max(steps_per_epoch, 1)
    return math.ceil(epochs * steps_per_epoch / _validate_every(spec, epochs, steps_per_epoch))
