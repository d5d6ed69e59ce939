"""Runs trainings in several real processes that talk over gloo, without torchrun: faster to start."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from ml.training.job import load_job
from ml.training.loop import train
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec


class Interrupted(Exception):
    """Stands for a kill between two steps, where the process has to live on for the test."""


def interrupt_at(step: int) -> Callable[[int], None]:
    def finish_step(finished: int) -> None:
        if finished == step:
            raise Interrupted

    return finish_step


def train_in_ranks(specs: list[TrainSpec], num_ranks: int, interrupt: dict[int, int] | None = None) -> None:
    """Run the trainings one after the other in the same ranks, each from where its folder stands, as the launcher would.

    Args:
        interrupt: index of a training -> the step after which it is left as it is.
    """
    context = multiprocessing.get_context("spawn")
    store = specs[0].work_dir.parent / "store"
    texts = [spec.to_json() for spec in specs]
    processes = [context.Process(target=_run_rank, args=(rank, num_ranks, str(store), texts, interrupt or {})) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    exit_codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exit_codes == [0] * num_ranks


def _run_rank(rank: int, num_ranks: int, store_path: str, specs: list[str], interrupt: dict[int, int]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, num_ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
    for index, text in enumerate(specs):
        spec = TrainSpec.from_json(text)
        spec.work_dir.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        with contextlib.suppress(Interrupted):
            train(spec, load_job(spec), RankGroup(rank, num_ranks), finish_step=interrupt_at(interrupt.get(index, -1)))
    # All ranks are done. Tearing gloo down races with its own threads, now and then ("terminate called without an active
    # exception"); the launcher ignores how a rank leaves after its result is written, so the test does not ask either.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
