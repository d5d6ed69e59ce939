"""The training loop of one rank. Every rank runs the same code on the same plan; the first one also writes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ml.errors import TrainingError
from ml.training.batches import Sampler, epoch_batches, fixed_batches, stratified_sample
from ml.training.checkpoint import Progress, load_checkpoint, read_state, save_checkpoint, save_weights
from ml.training.checkpoint_folders import newest_checkpoint
from ml.training.folders import WorkFolder, read_json, write_json
from ml.training.history import HistoryWriter
from ml.training.job import TrainingJob
from ml.training.plan import Plan, decide_plan
from ml.training.probe import measure
from ml.training.ranks import RankGroup, Stopwatch
from ml.training.schedule import learning_rate_at
from ml.training.spec import TrainSpec
from ml.training.stepping import Stepper


def train(
    spec: TrainSpec,
    job: TrainingJob,
    group: RankGroup,
    *,
    beat: Callable[[], None] = lambda: None,
    seconds_left: float | None = None,
    finish_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train to the end of the plan, or until validation stops getting better, and write the result.

    Goes on from the newest checkpoint in the work folder, if there is one.

    Args:
        beat: called after every piece of work, as a sign of life.
        seconds_left: of the budget; all of it when not given.
        finish_step: called with the number of finished steps, after each.

    Raises:
        TrainingError: the loss is not finite, or the folder holds another training.
    """
    work = WorkFolder(spec.work_dir)
    stepper = Stepper(spec, job, group)
    optimizer = stepper.new_optimizer(spec.optimizer.learning_rate)
    checkpoint = newest_checkpoint(work.checkpoints)
    if checkpoint is not None:
        progress, plan = read_state(checkpoint)
        load_checkpoint(checkpoint, work, stepper.model, optimizer, group, spec.seed)
    else:
        progress, plan = Progress(), _agreed_plan(spec, work, stepper, seconds_left, beat)
    if plan.fingerprint != spec.fingerprint:
        raise TrainingError(
            f"{work.root} holds another training (other settings or data, or another number of rows per step); "
            "give this one a folder of its own, or delete that one"
        )
    with HistoryWriter(work.history if group.is_first else Path(os.devnull)) as history:
        if checkpoint is None:
            _describe(plan, history)
        _Run(spec, work, plan, progress, stepper, optimizer, history, beat, finish_step).to_the_end()


class _Run:
    """The loop itself, and what it keeps in hand."""

    def __init__(
        self,
        spec: TrainSpec,
        work: WorkFolder,
        plan: Plan,
        progress: Progress,
        stepper: Stepper,
        optimizer: torch.optim.Optimizer,
        history: HistoryWriter,
        beat: Callable[[], None],
        finish_step: Callable[[int], None],
    ):
        self.spec = spec
        self.work = work
        self.plan = plan
        self.progress = progress
        self.stepper = stepper
        self.optimizer = optimizer
        self.history = history
        self.beat = beat
        self.finish_step = finish_step
        self.clock = Stopwatch(progress.seconds)
        lengths = stepper.job.lengths
        self.sampler = Sampler(_train_rows(plan, stepper.job, spec.seed), lengths["train"], plan.global_batch_size, spec.seed)
        self.validation_batches = fixed_batches(lengths["validation"], spec.batch_size_per_rank)

    def to_the_end(self) -> None:
        progress, plan = self.progress, self.plan
        while progress.step < plan.num_steps and progress.num_validations_without_gain < self.spec.patience:
            self._step()
            is_last = progress.step == plan.num_steps
            if is_last or progress.step % plan.validate_every_steps == 0:
                self._validate()
            if not is_last and progress.step % self.spec.checkpoint_every_steps == 0:
                progress.seconds = self.clock.seconds
                save_checkpoint(self.work, progress, plan, self.stepper.model, self.optimizer, self.stepper.group)
                self.beat()
            self.finish_step(progress.step)
        if progress.step < plan.num_steps:
            self.history.event(
                f"stopped at step {progress.step} of {plan.num_steps}: the validation loss has not improved "
                f"for {self.spec.patience} validations; keeping the weights of step {progress.best_step}"
            )
        progress.seconds = self.clock.seconds
        self._write_result()

    def _step(self) -> None:
        start = time.perf_counter()
        progress, plan = self.progress, self.plan
        rows = self.sampler.rows(progress.step)
        rate = learning_rate_at(
            progress.step, peak=self.spec.optimizer.learning_rate, num_warmup_steps=plan.num_warmup_steps, num_steps=plan.num_steps
        )
        result = self.stepper.train_step(rows, self.optimizer, plan.precision, rate)
        if not result.finite:
            advice = "lower train.learning_rate" + (", or set train.precision to fp32" if plan.precision != "fp32" else "")
            raise TrainingError(
                f"step {progress.step + 1} of {plan.num_steps}: the loss is {result.loss} and the norm of the gradient "
                f"{result.gradient_norm} at a learning rate of {rate:.2g} ({plan.precision}); {advice}"
            )
        progress.step += 1
        self.beat()
        self.history.write(
            "step",
            step=progress.step,
            epoch=round(progress.step / plan.steps_per_epoch, 4),
            loss=result.loss,
            learning_rate=rate,
            rows_per_second=round(len(rows) / (time.perf_counter() - start), 2),
            seconds=round(self.clock.seconds, 3),
        )

    def _validate(self) -> None:
        progress = self.progress
        found = self.stepper.evaluate("validation", self.validation_batches, self.plan.precision, self.beat)
        loss, accuracy = found.loss, found.accuracy
        self.history.write(
            "validation",
            step=progress.step,
            epoch=round(progress.step / self.plan.steps_per_epoch, 4),
            loss=loss,
            accuracy=accuracy,
            recall=found.recall,
            seconds=round(self.clock.seconds, 3),
        )
        if not loss < progress.best_loss:
            progress.num_validations_without_gain += 1
            return
        progress.best_step, progress.best_loss, progress.best_accuracy = progress.step, loss, accuracy
        progress.num_validations_without_gain = 0
        if self.stepper.group.is_first:
            best = self.work.best_weights(progress.step)
            save_weights(self.stepper.model, best)
            for older in self.work.best.glob("step-*.safetensors"):
                if older != best:
                    older.unlink()

    def _write_result(self) -> None:
        """Weights first, `result.json` last: its existence means that the training is done."""
        progress = self.progress
        if progress.best_step == 0:
            raise TrainingError(f"no validation gave a finite loss in {progress.step} steps; lower train.learning_rate")
        if self.stepper.group.is_first:
            weights = self.work.result_weights
            weights.parent.mkdir(parents=True, exist_ok=True)
            weights.unlink(missing_ok=True)
            os.link(self.work.best_weights(progress.best_step), weights)
            result = {
                "num_steps": progress.step,
                "best_step": progress.best_step,
                "best_loss": progress.best_loss,
                "best_accuracy": progress.best_accuracy,
                "num_parameters": sum(parameter.numel() for parameter in self.stepper.model.parameters()),
                "seconds": progress.seconds,
                "plan": self.plan.to_json(),
            }
            write_json(self.work.result, result)
        self.stepper.group.wait_for_all()


def _agreed_plan(spec: TrainSpec, work: WorkFolder, stepper: Stepper, seconds_left: float | None, beat: Callable[[], None]) -> Plan:
    """The plan that was decided before a kill, else a new one; the first rank's in all ranks."""
    group = stepper.group
    found = group.from_first(read_json(work.plan) if group.is_first else None)
    if found is not None:
        return Plan.from_json(found)
    start = time.monotonic()
    lengths = stepper.job.lengths
    every_row = np.arange(len(lengths["train"]))
    measured = measure(stepper, epoch_batches(every_row, lengths["train"], spec.global_batch_size, spec.seed, 0), beat)
    left = (spec.budget_seconds if seconds_left is None else seconds_left) - (time.monotonic() - start)
    plan = decide_plan(
        spec, num_rows=len(lengths["train"]), num_validation_rows=len(lengths["validation"]), measured=measured, seconds_left=left
    )
    plan = Plan.from_json(group.from_first(plan.to_json()))
    if group.is_first:
        write_json(work.plan, plan.to_json())
    return plan


def _train_rows(plan: Plan, job: TrainingJob, seed: int) -> np.ndarray:
    return stratified_sample(job.train_strata, plan.num_train_rows, seed)


def _describe(plan: Plan, history: HistoryWriter) -> None:
    measured = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in plan.step_seconds_measured.items())
    history.event(
        f"{plan.epochs} epochs of {plan.num_train_rows} rows, {plan.num_steps} steps of {plan.global_batch_size} rows in {plan.precision} "
        f"(measured per step: {measured}), about {plan.estimated_seconds:.0f} s",
        num_steps=plan.num_steps,
    )
    for warning in plan.warnings:
        history.event(warning)
