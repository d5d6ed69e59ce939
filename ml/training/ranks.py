"""One rank among others: what the loop needs from torch.distributed, and its sign of life."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

from ml.errors import TrainingError
from ml.training.folders import AttemptFolder, write_json
from ml.training.spec import TrainSpec


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
def joined_ranks(spec: TrainSpec, store_file: Path | None) -> Iterator[RankGroup]:
    """Join the ranks that torchrun started: NCCL when every local rank has a GPU of its own, else gloo.

    Args:
        store_file: through which the ranks find each other on one machine, so that no port is opened beyond the loopback
            interface; None on several machines, and where others called torchrun: then through the store that torchrun names.

    Raises:
        TrainingError: NCCL is asked for and a rank has no GPU of its own.
    """
    rank, num_ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", local_rank % num_gpus) if num_gpus else torch.device("cpu")
    if num_gpus:
        torch.cuda.set_device(device)
    backend = choose_backend(spec.nodes.backend, num_gpus, int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))
    if num_ranks == 1:
        yield RankGroup(rank, 1, device)
        return
    # However the others fare, no wait is for ever: a collective that takes longer raises an error in the rank that waits.
    options: dict[str, Any] = {"timeout": timedelta(seconds=spec.collective_timeout_seconds)}
    if backend == "nccl":
        options["device_id"] = device
    if store_file is not None:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(str(store_file), num_ranks)  # pyright: ignore[reportPrivateImportUsage] - documented, not re-exported
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, **options)
    else:
        dist.init_process_group(backend, init_method="env://", **options)
    try:
        yield RankGroup(rank, num_ranks, device)
    finally:
        # After an error the others may be gone, and tearing down together would wait for them. The threads of gloo now and
        # then abort a process that tears them down; the system closes their sockets as well.
        if backend == "nccl" and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def choose_backend(wanted: Literal["auto", "gloo", "nccl"], num_gpus: int, num_local_ranks: int) -> str:
    """NCCL where every rank of this machine has a GPU of its own, else gloo.

    Raises:
        TrainingError: NCCL is asked for and there are fewer GPUs.
    """
    if wanted == "nccl" and num_gpus < num_local_ranks:
        raise TrainingError(
            f"backend nccl needs a GPU for each rank; this machine has {num_gpus} for {num_local_ranks} ranks. "
            "Use backend auto or gloo, or fewer ranks a machine"
        )
    if wanted == "auto":
        return "nccl" if num_gpus >= num_local_ranks else "gloo"
    return wanted


def announce(attempt: AttemptFolder, local_rank: int, rank: int) -> None:
    """Say which process this rank is, so that the launcher can end it even when torchrun is gone.

    Args:
        local_rank: counted within this machine; names the file.
    """
    attempt.rank_beat(local_rank).unlink(missing_ok=True)
    write_json(attempt.rank_process(local_rank), {"pid": os.getpid(), "started": psutil.Process().create_time(), "rank": rank})


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
