"""Which rows a step has, which rank gets which of them, and their batches, made ready while the steps before them run."""

from types import TracebackType

import numpy as np
import torch

from ml.training.batches import Sampler, fixed_batches, stratified_sample
from ml.training.checkpoint import Progress
from ml.training.job import Split
from ml.training.plan import Plan
from ml.training.prefetch import BatchKey, Prefetcher
from ml.training.shares import ShareBalancer, deal_rows, padded_tokens
from ml.training.spec import TrainSpec
from ml.training.stepping import Stepper, StepResult

# Rows of a global batch, rank by rank, and how many each data rank has; equal shares when None.
Dealt = tuple[np.ndarray, list[int] | None]


class Feed:
    """The rows of every step for one rank. All ranks make the same calls. Use as a context manager.

    Takes the place of the stepper's `load_batch`: batches of a step that was begun with `begin` come from a thread.

    Args:
        progress: load-aware shares go on from it, and are kept in it.
    """

    def __init__(self, spec: TrainSpec, plan: Plan, stepper: Stepper, progress: Progress):
        self._stepper = stepper
        self._job = stepper.job
        self._lengths = stepper.job.lengths["train"]
        self._progress = progress
        self._num_steps = plan.num_steps
        self._depth = spec.prefetch_batches
        rows = stratified_sample(self._job.train_strata, plan.num_train_rows, spec.seed)
        shards = getattr(self._job, "train_shards", None)
        self._sampler = Sampler(rows, self._lengths, plan.global_batch_size, spec.seed, spec.max_tokens_per_batch, shards)
        self._expect_shards = getattr(self._job, "expect_shards", None)
        self._num_data_ranks = stepper.layout.num_data_ranks
        # Only where every rank computes alone does the time of its forward pass tell of its speed.
        self._balancer = ShareBalancer(self._num_data_ranks) if spec.load_aware and stepper.layout.strategy == "ddp" else None
        if self._balancer is not None and progress.balance:
            self._balancer.restore(progress.balance)
        self._step = 0
        self._coming: dict[int, Dealt] = {}
        pin = stepper.group.device.type == "cuda"
        num_passes = spec.gradient_sync.accumulation_steps
        self._prefetcher = Prefetcher[BatchKey](self._make, self._depth * num_passes, pin)

    def begin(self, step: int) -> Dealt:
        """The rows of a step (counted from 0), rank by rank, and the number of each data rank's; those of the next steps are asked for."""
        self._step = step
        self._coming = {known: dealt for known, dealt in self._coming.items() if known >= step}
        for coming in range(step, min(step + self._depth + 1, self._num_steps)):
            if coming in self._coming:
                continue
            self._coming[coming] = self._deal(self._sampler.rows(coming))
            if self._expect_shards is not None:
                self._expect_shards(self._sampler.shards_ahead(coming))
            for part, _ in self._stepper.passes(*self._coming[coming]):
                self._prefetcher.ask(BatchKey.of(coming, part))
        return self._coming[step]

    def load(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """A batch on the CPU: of the step that was begun, or of validation."""
        if split != "train":
            return self._job.batch(split, rows)
        return self._prefetcher.take(BatchKey.of(self._step, rows))

    def finish(self, result: StepResult) -> None:
        """The step that was begun is done: ranks that turned out faster get more of the next ones."""
        if self._balancer is None:
            return
        passes = self._stepper.passes(*self._coming[self._step])
        share = np.concatenate([part[:num_counting] for part, num_counting in passes])
        if self._balancer.exchange(
            self._stepper.group, self._stepper.data_rank, padded_tokens(share, self._lengths), result.forward_seconds
        ):
            self.forget()
        self._progress.balance = self._balancer.state()

    def forget(self) -> None:
        """What was asked for will not be taken: the next step is another one, or its rows go to other ranks."""
        self._coming.clear()
        self._prefetcher.forget()

    def __enter__(self) -> "Feed":
        self._stepper.load_batch = self.load
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stepper.load_batch = self._job.batch
        self._prefetcher.close()

    def _deal(self, rows: np.ndarray) -> Dealt:
        if self._num_data_ranks == 1:
            return rows, None
        fractions = None if self._balancer is None else self._balancer.fractions
        return deal_rows(rows, self._lengths, self._num_data_ranks, fractions)

    def _make(self, key: BatchKey) -> dict[str, torch.Tensor]:
        return self._job.batch("train", key.row_array)


def validation_batches(spec: TrainSpec, lengths: np.ndarray) -> list[np.ndarray]:
    """All rows, in batches as large as a rank's share of a training batch."""
    if spec.max_tokens_per_batch is None:
        return fixed_batches(lengths, spec.batch_size_per_rank)
    fitting = max(spec.max_tokens_per_batch // spec.num_ranks, int(lengths.max()))
    return fixed_batches(lengths, spec.batch_size_per_rank, fitting)
