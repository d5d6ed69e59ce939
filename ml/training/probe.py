"""A few real steps before the training, timed: what the plan is made from. Weights and random state are left as they were.

Every time is the slowest rank's, so all ranks come to the same decisions.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ml.training.compiling import compile_in_place, has_compiler, keep_compiled_code_in, try_compiled, undo_compile
from ml.training.gradient_sync import MIB, gradient_bytes
from ml.training.plan import DEFAULT_BUCKET_MB, BucketTime, CompileTime, Measured, Plan, auto_epochs, choose_buckets, pays_to_compile
from ml.training.precision import Precision, fastest_precision, precision_candidates
from ml.training.stepping import Stepper

NUM_TIMED_BATCHES = 4
BUCKET_SIZES_MB = (1.0, 5.0, 25.0, 100.0)
# Below this there is one bucket whatever is chosen, and it takes no time.
SMALLEST_GRADIENT_BYTES = MIB
# Share of the time left that looking for the best buckets may take. Compiling may take as much again.
PROBE_SHARE = 0.03
# DDP lays its buckets out anew after the first backward pass.
BUCKET_WARMUP_STEPS = 2
BUCKET_TIMED_STEPS = 3
BUCKET_PASSES = 2
# On a CPU compiling takes a minute or so and gains little; not tried for a training shorter than this.
LONG_TRAINING_SECONDS = 1800.0


def measure(
    stepper: Stepper,
    batches: list[np.ndarray],
    beat: Callable[[], None],
    *,
    seconds_left: float | None = None,
    compiled_code: Path | None = None,
) -> Measured:
    """Time steps on batches spread evenly over the range of lengths, after a warm-up. All ranks take part.

    Args:
        batches: the global batches of one epoch.
        seconds_left: of the budget; the search for buckets and compiling take a small share of it. None: no limit.
        compiled_code: folder to keep compiled code in.
    """
    return _Probe(stepper, batches, beat, seconds_left, compiled_code).measure()


def apply_plan(stepper: Stepper, plan: Plan, compiled_code: Path | None = None) -> None:
    """Make the stepper run as the plan says: also after a restart, which measures nothing."""
    if stepper.is_bucketed:
        stepper.rewrap(plan.sync_for(stepper.spec))
    if plan.is_compiled:
        if compiled_code is not None:
            keep_compiled_code_in(compiled_code)
        compile_in_place(stepper.model)


class _Probe:
    def __init__(
        self, stepper: Stepper, batches: list[np.ndarray], beat: Callable[[], None], seconds_left: float | None, compiled_code: Path | None
    ):
        self.stepper = stepper
        self.group = stepper.group
        self.spec = stepper.spec
        self.beat = beat
        self.compiled_code = compiled_code
        # The ranks' clocks differ by a little, their decisions must not.
        self.seconds_left = float("inf") if seconds_left is None else self.group.largest(max(seconds_left, 0.0))
        by_length = sorted(batches, key=lambda rows: float(stepper.job.lengths["train"][rows].mean()))
        self.count = min(NUM_TIMED_BATCHES, len(by_length))
        self.chosen = [by_length[int((i + 0.5) / self.count * len(by_length))] for i in range(self.count)]
        self.middle = self.chosen[self.count // 2]
        self.num_steps = len(batches) * (auto_epochs(len(batches)) if self.spec.epochs == "auto" else self.spec.epochs)
        # A learning rate of zero leaves every weight exactly as it is.
        self.optimizer = stepper.new_optimizer(learning_rate=0.0)
        self.notes: list[str] = []

    def measure(self) -> Measured:
        device = self.group.device
        random_state = torch.get_rng_state()
        device_random_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        seconds = self._precisions()
        precision = fastest_precision(seconds) if self.spec.precision == "auto" else self.spec.precision
        validation_seconds = self._validation(precision)
        compiled = self._compiled(precision, seconds[precision])
        buckets = self._buckets(precision, compiled.compiled_step_seconds if compiled and compiled.used else seconds[precision])
        if buckets:
            self.stepper.rewrap(choose_buckets(self.spec.gradient_sync, buckets)[0])

        torch.set_rng_state(random_state)
        if device_random_state is not None:
            torch.cuda.set_rng_state(device_random_state, device)
        return Measured(seconds, validation_seconds, buckets, compiled, tuple(self.notes))

    def _precisions(self) -> dict[Precision, float]:
        wanted = self.spec.precision
        candidates: list[Precision] = precision_candidates(self.group.device) if wanted == "auto" else [wanted]
        for precision in candidates:
            self._step(self.chosen[-1], precision)
        # In turn, so that whatever else the machine does strikes all of them alike.
        timed: list[dict[Precision, float]] = [{name: self._step(rows, name) for name in candidates} for rows in self.chosen]
        return {precision: sum(times[precision] for times in timed) / self.count for precision in candidates}

    def _validation(self, precision: Precision) -> float:
        rows = self.middle
        shares = [rows[rank :: self.group.num_ranks] for rank in range(self.group.num_ranks) if rank < len(rows)]
        return self._seconds_of(lambda: self.stepper.evaluate("train", shares, precision))

    def _compiled(self, precision: Precision, step_seconds: float) -> CompileTime | None:
        """Compile where it may pay, and leave the model compiled when it does."""
        wanted, device = self.spec.compile, self.group.device
        is_long = device.type == "cuda" or min(self.num_steps * step_seconds, self.seconds_left) >= LONG_TRAINING_SECONDS
        if wanted == "off" or (wanted == "auto" and not (is_long and has_compiler(device) and self._is_whole())):
            return None
        if self.compiled_code is not None:
            keep_compiled_code_in(self.compiled_code)
        reasons: list[str | None] = []
        longest = self.chosen[-1]
        compile_seconds = self._seconds_of(lambda: reasons.append(try_compiled(self.stepper.model, lambda: self._step(longest, precision))))
        # A rank that failed raised amid a step; the others then fail too, or this says it to all.
        if self.group.largest(float(reasons[0] is not None)):
            undo_compile(self.stepper.model)
            self.notes.append(reasons[0] or "another rank could not compile the model, which runs as it is")
            return None
        for rows in self.chosen:
            self._step(rows, precision)
        compiled_seconds = statistics.mean(self._step(rows, precision) for rows in self.chosen)
        fitting = min(self.num_steps, self.seconds_left / step_seconds)
        used = wanted == "on" or pays_to_compile(step_seconds, compiled_seconds, compile_seconds, int(fitting))
        if not used:
            undo_compile(self.stepper.model)
        return CompileTime(step_seconds, compiled_seconds, compile_seconds, used)

    def _is_whole(self) -> bool:
        """Every rank has the whole model. Compiling a part of one is only done when it is asked for."""
        return self.group.num_ranks == 1 or self.stepper.is_bucketed

    def _buckets(self, precision: Precision, step_seconds: float) -> tuple[BucketTime, ...]:
        """Steps with buckets of several sizes, and with all of the gradient in one after the backward pass."""
        sync = self.spec.gradient_sync
        shapes = [
            (tuple(parameter.shape), parameter.element_size()) for parameter in self.stepper.model.parameters() if parameter.requires_grad
        ]
        item_bytes = max((size for _, size in shapes), default=4)
        travelling = gradient_bytes([shape for shape, _ in shapes], item_bytes, sync, self.group.num_ranks)
        if sync.bucket_mb != "auto" or not sync.overlap or self.group.num_ranks == 1 or travelling.whole <= SMALLEST_GRADIENT_BYTES:
            return ()
        if not self.stepper.is_bucketed:
            return ()
        # A bucket larger than the model is the same as one bucket.
        candidates = [replace(sync, bucket_mb=size) for size in BUCKET_SIZES_MB if size * MIB < travelling.whole]
        candidates.append(replace(sync, bucket_mb=round(travelling.whole / MIB, 3), overlap=False))
        one_pass = len(candidates) * (BUCKET_WARMUP_STEPS + BUCKET_TIMED_STEPS) * step_seconds
        num_passes = min(BUCKET_PASSES, int(PROBE_SHARE * min(self.seconds_left, 1e9) / one_pass))
        if not num_passes:
            self.notes.append(
                f"bucket sizes were not compared: {one_pass:.0f} s of steps are more than {PROBE_SHARE:.0%} of the "
                f"{self.seconds_left:.0f} s left"
            )
            return ()
        times: list[list[float]] = [[] for _ in candidates]
        for number in range(num_passes):
            # There and back again, so that a drift of the machine strikes all of them alike.
            order = range(len(candidates)) if number % 2 == 0 else reversed(range(len(candidates)))
            for index in order:
                self.stepper.rewrap(candidates[index])
                for _ in range(BUCKET_WARMUP_STEPS):
                    self._step(self.middle, precision)
                times[index] += [self._step(self.middle, precision) for _ in range(BUCKET_TIMED_STEPS)]
        medians = [statistics.median(found) for found in times]
        # All on one batch, which is not the mean one: the plan wants seconds of a mean step, known with the default buckets.
        usual = next((index for index, candidate in enumerate(candidates) if candidate.bucket_mb == DEFAULT_BUCKET_MB), -1)
        scale = step_seconds / medians[usual]
        return tuple(
            BucketTime(float(candidate.bucket_mb), candidate.overlap, seconds * scale, travelling.sent)
            for candidate, seconds in zip(candidates, medians, strict=True)
        )

    def _step(self, rows: np.ndarray, precision: Precision) -> float:
        return self._seconds_of(lambda: self.stepper.train_step(rows, self.optimizer, precision, learning_rate=0.0))

    def _seconds_of(self, action: Callable[[], object]) -> float:
        """The slowest rank's."""
        self.group.synchronize()
        start = time.perf_counter()
        action()
        self.group.synchronize()
        seconds = self.group.largest(time.perf_counter() - start)
        self.beat()
        return seconds
