"""One rank among others: what the loop needs from torch.distributed, and its sign of life."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ml.training.folders import AttemptFolder, write_json


class RankGroup:
    """The ranks of one training, seen from one of them. With a single rank nothing is communicated."""

    def __init__(self, rank: int = 0, num_ranks: int = 1, device: torch.device | None = None):
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device or torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over all ranks, in float64."""
        if self.num_ranks == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        if self.num_ranks == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def from_first(self, value: Any) -> Any:
        """The first rank's value in all ranks; JSON."""
        if self.num_ranks == 1:
            return value
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, 0)
        if not self.is_first:
            data = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, 0)
        return json.loads(bytes(data.cpu().tolist()))

    def gather(self, state: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of every rank, in order of rank. All have the same shape and type."""
        if self.num_ranks == 1:
            return [state]
        parts = [torch.empty_like(state, device=self.device) for _ in range(self.num_ranks)]
        dist.all_gather(parts, state.to(self.device))
        return [part.cpu() for part in parts]

    def wait_for_all(self) -> None:
        if self.num_ranks > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given: before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def joined_ranks(attempt: AttemptFolder) -> Iterator[RankGroup]:
    """Join the ranks that torchrun started: NCCL when every local rank has a GPU of its own, else gloo.

    The ranks find each other through a file, so no port is opened beyond the loopback interface.
    """
    rank, num_ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", local_rank % num_gpus) if num_gpus else torch.device("cpu")
    if num_gpus:
        torch.cuda.set_device(device)
    if num_ranks == 1:
        yield RankGroup(rank, 1, device)
        return
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if num_gpus >= num_ranks else "gloo"
    store = dist.FileStore(str(attempt.store), num_ranks)  # pyright: ignore[reportPrivateImportUsage] - documented, not re-exported
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    try:
        yield RankGroup(rank, num_ranks, device)
    finally:
        # After an error the others may be gone, and tearing down together would wait for them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def announce(attempt: AttemptFolder, rank: int) -> None:
    """Say which process this rank is, so that the launcher can end it even when torchrun is gone."""
    write_json(attempt.rank_process(rank), {"pid": os.getpid(), "started": psutil.Process().create_time()})


def heartbeat(path: Path) -> Callable[[], None]:
    """A function that touches the file; cheap enough for every step."""

    def beat() -> None:
        path.touch()

    return beat


class Stopwatch:
    """Seconds since a start, going on from what was counted before."""

    def __init__(self, before: float = 0.0):
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
