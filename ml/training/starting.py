"""What happens between a rank's start and its first step: the model is laid out, the plan is made or found, the arithmetic counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ml.errors import ConfigError
from ml.training.batches import count_batches, epoch_batches, stratified_sample
from ml.training.compiling import undo_compile
from ml.training.flops import Calibration, calibrate_step, peak_flops
from ml.training.folders import WorkFolder, read_json, write_json
from ml.training.history import HistoryWriter
from ml.training.job import TrainingJob
from ml.training.plan import Plan, decide_plan
from ml.training.probe import measure
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from ml.training.stepping import Stepper


@dataclass(frozen=True)
class Arithmetic:
    """What the meters need to know of model and device; None where it cannot be known."""

    calibration: Calibration | None
    peak_flops: float | None


def starting_stepper(spec: TrainSpec, job: TrainingJob, group: RankGroup, work: WorkFolder, known: Plan | None) -> Stepper:
    """The model, laid out over the ranks as it was when the training began, if these ranks allow that.

    Args:
        known: the plan of the checkpoint.
    """
    plan = known or _plan_on_disk(work, group)
    if plan is None or spec.parallelism.strategy != "auto":
        return Stepper(spec, job, group)
    try:
        return Stepper(spec, job, group, plan.parallelism)
    except ConfigError:
        # Other ranks than those it was chosen for. What was saved can be read in any layout.
        return Stepper(spec, job, group)


def starting_plan(spec: TrainSpec, work: WorkFolder, stepper: Stepper, seconds_left: float | None, beat: Callable[[], None]) -> Plan:
    """The plan that was decided before a kill, else a new one; the first rank's in all ranks."""
    group = stepper.group
    found = _plan_on_disk(work, group)
    if found is not None:
        return found
    start = time.monotonic()
    lengths, strata = stepper.job.lengths, stepper.job.train_strata
    left = spec.budget_seconds if seconds_left is None else seconds_left
    batches = epoch_batches(
        np.arange(len(lengths["train"])),
        lengths["train"],
        spec.global_batch_size,
        spec.seed,
        0,
        spec.max_tokens_per_batch,
        getattr(stepper.job, "train_shards", None),
    )
    measured = measure(stepper, batches, beat, seconds_left=left, compiled_code=work.compiled_code)

    def batches_of(num_rows: int) -> int:
        sample = stratified_sample(strata, num_rows, spec.seed)
        return count_batches(sample, lengths["train"], spec.global_batch_size, spec.max_tokens_per_batch)

    plan = decide_plan(
        spec,
        num_rows=len(lengths["train"]),
        num_validation_rows=len(lengths["validation"]),
        measured=measured,
        seconds_left=left - (time.monotonic() - start),
        batches_of=None if spec.max_tokens_per_batch is None else batches_of,
    )
    plan = replace(plan, parallelism=stepper.parallelism, strategy_reason=stepper.choice)
    plan = Plan.from_json(group.from_first(plan.to_json()))
    if group.is_first:
        write_json(work.plan, plan.to_json())
    return plan


def count_arithmetic(stepper: Stepper, plan: Plan) -> Arithmetic:
    """FLOPs of a token and the peak of the device. Leaves the model uncompiled, see `probe.apply_plan`."""
    job, group, layout = stepper.job, stepper.group, stepper.layout
    if plan.is_compiled:
        # Compiled code hides its operations from the counter. It is kept on disk, so compiling anew is quick.
        undo_compile(stepper.model)
    peak = peak_flops(group.device, plan.precision)
    if layout.strategy != "ddp":
        # No rank can run the model alone: 6 N (Hoffmann et al. 2022, appendix F), of which each rank does its part.
        return Arithmetic(Calibration(6.0 * stepper.num_parameters / (layout.tensor * layout.pipeline)), peak)
    by_length = np.argsort(job.lengths["train"], kind="stable")
    middle = len(by_length) // 2
    rows = by_length[max(middle - stepper.spec.global_batch_size // 2, 0) :][: stepper.spec.global_batch_size]
    return Arithmetic(calibrate_step(stepper, rows, plan.precision), peak)


def describe_plan(plan: Plan, stepper: Stepper, history: HistoryWriter) -> None:
    measured = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in plan.step_seconds_measured.items())
    history.event(
        f"{plan.epochs} epochs of {plan.num_train_rows} rows, {plan.num_steps} steps of {plan.global_batch_size} rows in {plan.precision} "
        f"(measured per step: {measured}), about {plan.estimated_seconds:.0f} s",
        num_steps=plan.num_steps,
    )
    if stepper.group.num_ranks > 1:
        history.event(plan.strategy_reason or stepper.layout.describe())
    for sentence in (*plan.warnings, *plan.notes):
        history.event(sentence)


def _plan_on_disk(work: WorkFolder, group: RankGroup) -> Plan | None:
    found = group.from_first(read_json(work.plan) if group.is_first else None)
    return None if found is None else Plan.from_json(found)
