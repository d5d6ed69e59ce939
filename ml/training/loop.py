"""The training loop of one rank. Every rank runs the same code on the same plan; the first one also writes."""

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ml.errors import TrainingError
from ml.training.checkpoint import Checkpointer, Progress, load_checkpoint, read_state, write_weights
from ml.training.checkpoint_folders import HISTORY_FILE, newest_checkpoint, step_of_checkpoint
from ml.training.feeding import Feed, validation_batches
from ml.training.folders import WorkFolder, write_json
from ml.training.gradient_sync import resume_note
from ml.training.history import HistoryWriter, resume_history
from ml.training.job import TrainingJob
from ml.training.meters import RankMeters, metrics_file
from ml.training.plan import Plan
from ml.training.probe import apply_plan
from ml.training.ranks import RankGroup, Stopwatch
from ml.training.schedule import learning_rate_at
from ml.training.spec import TrainSpec
from ml.training.starting import count_arithmetic, describe_plan, starting_plan, starting_stepper
from ml.training.stepping import Stepper, StepResult, Validation

NUM_ROWS_NAMED = 20


@dataclass(frozen=True)
class Calls:
    """What the loop calls while it runs.

    Args:
        beat: after every piece of work, as a sign of life.
        finish_step: with the number of finished steps, after each.
        stop_asked: whether this machine is about to go. When one rank says so, all save a checkpoint after the step, the first
            one leaves a note (`WorkFolder.preempted`), and all end; the next call goes on from there.
    """

    beat: Callable[[], None] = lambda: None
    finish_step: Callable[[int], None] = lambda step: None
    stop_asked: Callable[[], bool] = lambda: False


def train(
    spec: TrainSpec,
    job: TrainingJob,
    group: RankGroup,
    *,
    beat: Callable[[], None] = lambda: None,
    seconds_left: float | None = None,
    finish_step: Callable[[int], None] = lambda step: None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> bool:
    """Train to the end of the plan, or until validation stops getting better, and write the result.

    Goes on from the newest checkpoint in the work folder, if there is one.

    Args:
        seconds_left: of the budget; all of it when not given.
        beat, finish_step, stop_asked: see `Calls`.

    Returns:
        Whether the training is done; false when it was asked to end.

    Raises:
        TrainingError: loss or gradient were not finite too often, or the folder holds another training.
        ConfigError: the model cannot be split over these ranks as the spec says.
    """
    work = WorkFolder(spec.work_dir)
    checkpoint = newest_checkpoint(work.checkpoints)
    progress, known = read_state(checkpoint) if checkpoint is not None else (Progress(), None)
    stepper = starting_stepper(spec, job, group, work, known)
    optimizer = stepper.new_optimizer(spec.optimizer.learning_rate)
    plan = known or starting_plan(spec, work, stepper, seconds_left, beat)
    if plan.fingerprint != spec.fingerprint:
        raise TrainingError(
            f"{work.root} holds another training (other settings or data, or another number of rows per step); "
            "give this one a folder of its own, or delete that one"
        )
    figures = count_arithmetic(stepper, plan)
    apply_plan(stepper, plan, work.compiled_code)
    if checkpoint is not None:
        load_checkpoint(checkpoint, stepper.state_tensors(optimizer), group, work=work, seed=spec.seed)
        stepper.scaler(plan.precision).load(progress.scaler)
    if group.is_first:
        resume_history(work.history, step_of_checkpoint(checkpoint), checkpoint / HISTORY_FILE if checkpoint else None)
    with contextlib.ExitStack() as stack:
        history = stack.enter_context(HistoryWriter(work.history if group.is_first else Path(os.devnull)))
        if checkpoint is None:
            describe_plan(plan, stepper, history)
        elif note := resume_note(spec.gradient_sync):
            history.event(note)
        meters = RankMeters(
            metrics_file(work.metrics, group.rank),
            group.rank,
            group.device,
            num_ranks=group.num_ranks,
            num_threads=torch.get_num_threads(),
            calibration=figures.calibration,
            peak_flops=figures.peak_flops,
        )
        stack.callback(meters.close)
        checkpointer = stack.enter_context(
            Checkpointer(work, group, keep_last=spec.keep_last_checkpoints, asynchronous=spec.asynchronous_checkpoints)
        )
        feed = stack.enter_context(Feed(spec, plan, stepper, progress))
        calls = Calls(beat, finish_step, stop_asked)
        return _Run(spec, work, plan, progress, stepper, optimizer, feed, history, meters, checkpointer, calls).to_the_end()


@dataclass
class _Run:
    """The loop itself, and what it keeps in hand."""

    spec: TrainSpec
    work: WorkFolder
    plan: Plan
    progress: Progress
    stepper: Stepper
    optimizer: torch.optim.Optimizer
    feed: Feed
    history: HistoryWriter
    meters: RankMeters
    checkpointer: Checkpointer
    calls: Calls

    def to_the_end(self) -> bool:
        progress, plan = self.progress, self.plan
        self.clock = Stopwatch(progress.seconds)
        self.validation_batches = validation_batches(self.spec, self.stepper.job.lengths["validation"])
        while progress.step < plan.num_steps and progress.num_validations_without_gain < self.spec.patience:
            asked_to_stop = self._step()
            is_last = progress.step == plan.num_steps
            if is_last or progress.step % plan.validate_every_steps == 0:
                self._validate()
            if not is_last and (asked_to_stop or progress.step % self.spec.checkpoint_every_steps == 0):
                self._save()
            self.calls.finish_step(progress.step)
            if asked_to_stop and not is_last:
                self._leave()
                return False
        if progress.step < plan.num_steps:
            self.history.event(
                f"stopped at step {progress.step} of {plan.num_steps}: the validation {self.spec.watch} has not improved "
                f"for {self.spec.patience} validations; keeping the weights of step {progress.best_step}"
            )
        progress.seconds = self.clock.seconds
        self.checkpointer.close()
        self._write_result()
        return True

    def _save(self) -> None:
        self.progress.seconds = self.clock.seconds
        self.progress.scaler = self.stepper.scaler(self.plan.precision).state()
        self.checkpointer.save(self.progress, self.plan, self.stepper.state_tensors(self.optimizer))
        self.calls.beat()

    def _leave(self) -> None:
        """Once the checkpoint of this step is whole: say so, and let all ranks go together."""
        self.checkpointer.close()
        if self.stepper.group.is_first:
            self.history.event(f"asked to end at step {self.progress.step}; saved")
            write_json(self.work.preempted, {"step": self.progress.step, "why": "SIGTERM", "time": time.time()})
        self.stepper.group.wait_for_all()

    def _step(self) -> bool:
        """One step; whether some rank was asked to stop."""
        start = time.perf_counter()
        progress, plan = self.progress, self.plan
        if progress.step in progress.poisoned_steps:
            progress.step += 1
            return False
        rows, shares = self.feed.begin(progress.step)
        rate = learning_rate_at(
            progress.step, peak=self.spec.optimizer.learning_rate, num_warmup_steps=plan.num_warmup_steps, num_steps=plan.num_steps
        )
        result = self.stepper.train_step(rows, self.optimizer, plan.precision, rate, shares=shares, ask_to_stop=self.calls.stop_asked())
        self.calls.beat()
        self.meters.step(progress.step + 1, result)
        self.feed.finish(result)
        if result.overflowed:
            progress.step += 1
            return result.asked_to_stop
        if not result.finite:
            self._meet_poison(result, rate)
            return result.asked_to_stop
        progress.step += 1
        progress.num_poisoned_in_a_row = 0
        self.history.write(
            "step",
            step=progress.step,
            epoch=round(progress.step / plan.steps_per_epoch, 4),
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            learning_rate=rate,
            rows_per_second=round(len(rows) / (time.perf_counter() - start), 2),
            seconds=round(self.clock.seconds, 3),
        )
        return result.asked_to_stop

    def _meet_poison(self, result: StepResult, rate: float) -> None:
        """Leave the batch out for good, from here or from the last checkpoint on; or end, when that happens too often."""
        progress, policy = self.progress, self.spec.poisoned_batch
        rows = ", ".join(str(row) for row in result.poisoned_rows[:NUM_ROWS_NAMED]) or "no single one"
        what = (
            f"step {progress.step + 1} of {self.plan.num_steps}: the loss is {result.loss} and the norm of the gradient "
            f"{result.gradient_norm} at a learning rate of {rate:.2g} ({self.plan.precision}); training rows at fault: {rows}"
        )
        progress.num_poisoned_in_a_row += 1
        progress.poisoned_steps.append(progress.step)
        count = len(progress.poisoned_steps) if policy == "rollback" else progress.num_poisoned_in_a_row
        if policy == "stop" or count >= self.spec.max_poisoned_batches:
            advice = "lower train.learning_rate" + (", or set train.precision to fp32" if self.plan.precision != "fp32" else "")
            raise TrainingError(f"{what}. This is number {count}: look at these rows, or {advice}")
        checkpoint = self._checkpoint_to_go_back_to() if policy == "rollback" else None
        goes_on = "the batch is left out" if checkpoint is None else f"going back to step {step_of_checkpoint(checkpoint)}"
        self.history.write(
            "poisoned",
            step=progress.step + 1,
            rows=list(result.poisoned_rows),
            loss=_or_none(result.loss),
            gradient_norm=_or_none(result.gradient_norm),
            message=f"{what}; {goes_on}",
        )
        if checkpoint is None:
            # No weight was changed by it.
            progress.step += 1
        else:
            self._go_back(checkpoint)

    def _checkpoint_to_go_back_to(self) -> Path | None:
        self.checkpointer.wait()
        return newest_checkpoint(self.work.checkpoints)

    def _go_back(self, checkpoint: Path) -> None:
        """To a checkpoint's state, but knowing which batches not to meet again."""
        progress = self.progress
        poisoned, lost = progress.poisoned_steps, progress.step - step_of_checkpoint(checkpoint)
        before, _ = read_state(checkpoint)
        tensors = self.stepper.state_tensors(self.optimizer)
        load_checkpoint(checkpoint, tensors, self.stepper.group, work=self.work, seed=self.spec.seed)
        # What was found since then is not forgotten: the best weights are still there, and the time was spent.
        progress.step = before.step
        progress.poisoned_steps = sorted({*poisoned, *before.poisoned_steps})
        self.stepper.scaler(self.plan.precision).load(before.scaler)
        self.feed.forget()
        self.history.resumed(progress.step, lost)

    def _validate(self) -> None:
        progress = self.progress
        found = self.stepper.evaluate("validation", self.validation_batches, self.plan.precision, self.calls.beat)
        self.history.write(
            "validation",
            step=progress.step,
            epoch=round(progress.step / self.plan.steps_per_epoch, 4),
            loss=_or_none(found.loss),
            accuracy=found.accuracy,
            recall=found.recall,
            seconds=round(self.clock.seconds, 3),
        )
        progress.num_validations += 1
        if not self._is_best(found):
            progress.num_validations_without_gain += 1
            return
        progress.best_step, progress.best_loss = progress.step, found.loss
        progress.best_accuracy, progress.best_recall = found.accuracy, found.recall
        progress.num_validations_without_gain = 0
        weights = self.stepper.weights()
        if self.stepper.group.is_first:
            best = self.work.best_weights(progress.step)
            write_weights(weights, best)
            for older in self.work.best.glob("step-*.safetensors"):
                if older != best:
                    older.unlink()

    def _is_best(self, found: Validation) -> bool:
        watch, progress = self.spec.watch, self.progress
        if watch == "loss":
            return found.loss < progress.best_loss
        value, best = {"accuracy": (found.accuracy, progress.best_accuracy), "recall": (found.recall, progress.best_recall)}[watch]
        if value is None:
            raise TrainingError(f"train.watch is {watch!r}, but this model tells of no classes; set it to 'loss'")
        return math.isfinite(found.loss) and (best is None or value > best)

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
                "best_recall": progress.best_recall,
                "num_poisoned_batches": len(progress.poisoned_steps),
                "num_parameters": self.stepper.num_parameters,
                "seconds": progress.seconds,
                "plan": self.plan.to_json(),
            }
            write_json(self.work.result, result)
        self.stepper.group.wait_for_all()


def _or_none(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
