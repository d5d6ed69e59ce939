"""Real processes that talk over gloo, without torchrun: faster to start."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ml.training.ranks import RankGroup

COLLECTIVE_SECONDS = 120


def run_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any, timeout_seconds: float = 180) -> None:
    """`function(group, *arguments)` in so many processes, each with one thread; fails with what a rank raised.

    Args:
        function: of a module, so that a new process can import it.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, num_ranks, folder, function, arguments) for rank in range(num_ranks)]
        processes = [context.Process(target=_be_a_rank, args=each, daemon=True) for each in given]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_seconds)
        exit_codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("error-*.txt")))
        assert exit_codes == [0] * num_ranks, errors


def _be_a_rank(rank: int, num_ranks: int, folder: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)  # pyright: ignore[reportPrivateImportUsage]
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        function(RankGroup(rank, num_ranks), *arguments)
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    # All ranks are done. Tearing gloo down races with its own threads, now and then ("terminate called without an active
    # exception"); the launcher ignores how a rank leaves after its result is written, so the tests do not ask either.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
