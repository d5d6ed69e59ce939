"""Trains with meters in one or two real processes over gloo, with something wrong that is chosen, and gives what they measured."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ml.errors import TrainingError
from ml.training.flops import calibrate
from ml.training.folders import WorkFolder
from ml.training.history import read_history
from ml.training.job import RowLosses, Split
from ml.training.loop import train
from ml.training.meters import RankMeters, metrics_file, read_metrics
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from ml.training.stepping import Stepper
from tests.ml.training.gloo_ranks import run_ranks
from tests.ml.training.toy_job import ToyJob

Line = dict[str, Any]


@dataclass(frozen=True)
class Trouble:
    """What goes wrong.

    Args:
        batch_seconds: it takes longer to make a batch.
        slow_rank, forward_seconds: this rank's forward pass takes longer.
        network_seconds: each bucket of gradients takes longer to travel.
        hoard_bytes: memory that is kept at each step.
        memory_limit_bytes: of each rank.
        idle_seconds: the forward pass waits for something else than the processor.
        nan_steps: forward passes, counted from 0, with a loss that is not a number.
    """

    batch_seconds: float = 0.0
    slow_rank: int = -1
    forward_seconds: float = 0.0
    network_seconds: float = 0.0
    hoard_bytes: int = 0
    memory_limit_bytes: int | None = None
    idle_seconds: float = 0.0
    nan_steps: list[int] = field(default_factory=list)


class TroubledJob(ToyJob):
    """A toy with the forward pass of a larger model (busy, not asleep), so that it is the larger part of a step."""

    def __init__(self, work_dir: Path, rank: int, trouble: dict[str, Any], forward_seconds: float = 0.004, **arguments: Any):
        super().__init__(work_dir, **arguments)
        self.rank = rank
        self.trouble = Trouble(**trouble)
        self.forward_seconds = forward_seconds
        self.hoard: list[torch.Tensor] = []
        self.num_steps = 0

    def batch(self, split: Split, rows: Any) -> dict[str, torch.Tensor]:
        if split == "train":
            time.sleep(self.trouble.batch_seconds)
        return super().batch(split, rows)

    def row_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        found = super().row_losses(model, batch)
        if not torch.is_grad_enabled():
            return found
        trouble = self.trouble
        _work(self.forward_seconds + trouble.forward_seconds * (self.rank == trouble.slow_rank))
        time.sleep(trouble.idle_seconds)
        if trouble.hoard_bytes:
            self.hoard.append(torch.ones(trouble.hoard_bytes // 4))
        self.num_steps += 1
        if self.num_steps in trouble.nan_steps:
            return replace(found, loss=found.loss * float("nan"))
        return found


def _work(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def train_metered(*specs: TrainSpec, num_ranks: int = 1) -> list[tuple[list[Line], dict[int, list[Line]]]]:
    """History and meter lines of trainings, one after the other: here, or of several ranks in spawned ones."""
    for spec in specs:
        spec.work_dir.mkdir(parents=True, exist_ok=True)
    if num_ranks == 1:
        for spec in specs:
            _train(spec, 0, 1)
    else:
        run_ranks(_train_all, num_ranks, specs)
    return [(read_history(WorkFolder(spec.work_dir).history), read_metrics(_folder(spec))) for spec in specs]


def _folder(spec: TrainSpec) -> Path:
    return spec.work_dir / "metrics-of-the-test"


def _train_all(group: RankGroup, specs: tuple[TrainSpec, ...]) -> None:
    for spec in specs:
        _train(spec, group.rank, group.num_ranks)


def _train(spec: TrainSpec, rank: int, num_ranks: int) -> None:
    """Until it is done, or until a loss that is not finite ends it."""
    job = TroubledJob(spec.work_dir, rank=rank, **spec.job_arguments)
    meters = _meters(spec, job, rank, num_ranks)
    with _slow_network(job.trouble.network_seconds), _metered_steps(meters), contextlib.suppress(TrainingError):
        train(spec, job, RankGroup(rank, num_ranks))
    meters.close()


def _meters(spec: TrainSpec, job: TroubledJob, rank: int, num_ranks: int) -> RankMeters:
    """Calibrated as one of the ranks that is not slow would be, alone."""
    model, device = job.build_model(0), torch.device("cpu")
    rows = list(range(16))
    batch = ToyJob.batch(job, "validation", rows)  # pyright: ignore[reportArgumentType]
    calibration = calibrate(lambda: job.row_losses(model, batch).loss, list(model.parameters()), num_positions=int(batch["mask"].numel()))
    return RankMeters(
        metrics_file(_folder(spec), rank),
        rank,
        device,
        num_ranks=num_ranks,
        num_threads=1,
        calibration=calibration,
        peak_flops=1e11,
        memory_limit_bytes=job.trouble.memory_limit_bytes,
        seconds_between_lines=0.25,
    )


@contextlib.contextmanager
def _metered_steps(meters: RankMeters) -> Iterator[None]:
    original = Stepper.train_step
    count = 0

    def train_step(self: Stepper, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        result = original(self, *arguments, **options)
        count += 1
        meters.step(count, result)
        return result

    Stepper.train_step = train_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stepper.train_step = original


@contextlib.contextmanager
def _slow_network(seconds: float) -> Iterator[None]:
    original = DistributedDataParallel.__init__

    def exchange(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        time.sleep(seconds)
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])  # type: ignore[union-attr]

    def create(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if seconds:
            self.register_comm_hook(None, exchange)

    DistributedDataParallel.__init__ = create  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.__init__ = original
