"""Trains a small network in real ranks that talk over gloo, once per way of averaging gradients, and writes down the losses."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ml.training.gradient_sync import apply_hook, ddp_options
from ml.training.ranks import RankGroup
from ml.training.spec import GradientSync
from tests.ml.training.gloo_ranks import run_ranks

ROWS, WIDTH, NUM_CLASSES = 8, 384, 5
NUM_STEPS = 20
LEARNING_RATE = 0.02


@dataclass(frozen=True)
class Found:
    """
    Args:
        losses: of each step, over the rows of all ranks.
        handed_over: bytes that a rank gave to all-reduce in the last step.
        num_calls: of all-reduce in the last step.
    """

    losses: list[float]
    handed_over: int
    num_calls: int


def build_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, NUM_CLASSES))


def rows_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same few rows again and again, so that the loss falls."""
    random = torch.Generator().manual_seed(step % 3)
    inputs = torch.randn(ROWS, WIDTH, generator=random)
    return inputs, torch.randint(0, NUM_CLASSES, (ROWS,), generator=random)


def train_alone() -> list[float]:
    """The reference: one process, no communication."""
    model = build_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(NUM_STEPS):
        inputs, targets = rows_of(step)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_in_ranks(folder: Path, syncs: dict[str, GradientSync], num_ranks: int = 2, poisoned: tuple[str, ...] = ()) -> dict[str, Found]:
    """
    Args:
        poisoned: names of trainings whose first rank has a gradient that is no number in step 14, which is then skipped.
    """
    run_ranks(_train_all, num_ranks, folder, syncs, poisoned, timeout_seconds=250)
    return {name: Found(**found) for name, found in json.loads((folder / "found.json").read_bytes()).items()}


def _train_all(group: RankGroup, folder: Path, syncs: dict[str, GradientSync], poisoned: tuple[str, ...]) -> None:
    found = {name: asdict(_train(sync, group.rank, group.num_ranks, name in poisoned)) for name, sync in syncs.items()}
    if group.is_first:
        (folder / "found.json").write_text(json.dumps(found))


def _train(sync: GradientSync, rank: int, num_ranks: int, poisoned: bool) -> Found:
    model = build_network()
    ddp = DistributedDataParallel(model, **ddp_options(sync))
    apply_hook(ddp, sync, "gloo")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    with _counted_all_reduces() as counts:
        for step in range(NUM_STEPS):
            counts.clear()
            inputs, targets = (tensor[rank::num_ranks] for tensor in rows_of(step))
            total = torch.zeros(())
            optimizer.zero_grad()
            parts = list(zip(inputs.chunk(sync.accumulation_steps), targets.chunk(sync.accumulation_steps), strict=True))
            for index, (part_inputs, part_targets) in enumerate(parts):
                is_last = index == len(parts) - 1
                with contextlib.nullcontext() if is_last else ddp.no_sync():
                    loss = nn.functional.cross_entropy(ddp(part_inputs), part_targets, reduction="sum") / ROWS
                    (loss * num_ranks * (float("nan") if poisoned and step == 14 and rank == 0 else 1.0)).backward()
                total += loss.detach()
            sizes = list(counts)
            dist.all_reduce(total)
            losses.append(float(total))
            if all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None):
                optimizer.step()
    return Found(losses, sum(sizes), len(sizes))


@contextlib.contextmanager
def _counted_all_reduces():
    """Bytes of each tensor that is given to all-reduce by Python code: by the hooks. DDP without a hook does it in C++."""
    sizes: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments, **options):
        sizes.append(tensor.numel() * tensor.element_size())
        return original(tensor, *arguments, **options)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = original
