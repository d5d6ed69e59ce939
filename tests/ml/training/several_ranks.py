"""Runs whole trainings in several ranks, and interrupts them."""

import contextlib
from collections.abc import Callable

from ml.training.job import load_job
from ml.training.loop import train
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from tests.ml.training.gloo_ranks import run_ranks


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
    run_ranks(_train_each, num_ranks, specs, interrupt or {})


def _train_each(group: RankGroup, specs: list[TrainSpec], interrupt: dict[int, int]) -> None:
    for index, spec in enumerate(specs):
        spec.work_dir.mkdir(parents=True, exist_ok=True)
        group.wait_for_all()
        with contextlib.suppress(Interrupted):
            train(spec, load_job(spec), group, finish_step=interrupt_at(interrupt.get(index, -1)))
