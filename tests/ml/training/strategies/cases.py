"""A few steps of a model spread over ranks, run in real processes that talk over gloo."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ml.training.job import load_job
from ml.training.ranks import RankGroup
from ml.training.spec import GradientSync, Optimizer, Parallelism, TrainSpec
from ml.training.stepping import Stepper
from tests.ml.training.gloo_ranks import run_ranks

JOBS = "tests.ml.training.strategies.jobs"
# Of uneven numbers: of some, ranks get nothing.
STEPS = [np.arange(7), np.arange(20, 25), np.array([31]), np.arange(40, 50), np.arange(3, 16)]
VALIDATION = [np.arange(5), np.arange(5, 9), np.arange(9, 13)]

ADAMW = Optimizer("adamw", learning_rate=1e-3, gradient_clip=0.5)
SMALL_BUCKETS = GradientSync(bucket_mb=0.001)


@dataclass(frozen=True)
class Case:
    """A training of a few steps; `strategy` says how in several ranks. In one rank it is the reference.

    Args:
        shares: number of a step -> rows of each data rank.
        subfolder: of the folder that all cases share; the job reads what was prepared there.
    """

    name: str
    job: str
    strategy: Any = "ddp"
    arguments: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = ADAMW
    sync: GradientSync = SMALL_BUCKETS
    parallelism: dict[str, Any] = field(default_factory=dict)
    shares: dict[int, tuple[int, ...]] = field(default_factory=dict)
    subfolder: str = "."

    def spec(self, folder: Path, num_ranks: int) -> TrainSpec:
        job = self.job if ":" in self.job else f"{JOBS}:{self.job}"
        return TrainSpec(
            job=job,
            job_arguments=self.arguments,
            work_dir=folder / self.subfolder,
            num_ranks=num_ranks,
            parallelism=Parallelism(**({"strategy": self.strategy} | self.parallelism)),
            gradient_sync=self.sync,
            optimizer=self.optimizer,
            precision="fp32",
        )


@dataclass(frozen=True)
class Ran:
    losses: list[float]
    norms: list[float]
    validations: list[tuple[float, float | None, float | None]]
    weights: dict[str, torch.Tensor]


def run_case(case: Case, folder: Path, group: RankGroup) -> Ran:
    """Steps, a validation amid them, and the weights at the end."""
    spec = case.spec(folder, group.num_ranks)
    stepper = Stepper(spec, load_job(spec), group)
    optimizer = stepper.new_optimizer(spec.optimizer.learning_rate)
    losses, norms, validations = [], [], []
    for index, rows in enumerate(STEPS):
        result = stepper.train_step(rows, optimizer, "fp32", spec.optimizer.learning_rate, shares=case.shares.get(index))
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        if index % 2:
            found = stepper.evaluate("validation", VALIDATION, "fp32")
            validations.append((found.loss, found.accuracy, found.recall))
    return Ran(losses, norms, validations, stepper.weights())


def run_all(group: RankGroup, folder: Path, runs: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """All that is run in the same ranks: starting them takes longer."""
    for run, arguments in runs:
        run(group, folder, *arguments)


def run_cases(group: RankGroup, folder: Path, cases: list[Case]) -> None:

    for case in cases:
        ran = run_case(case, folder, group)
        if group.is_first:
            save_file(ran.weights, folder / f"{case.name}.safetensors")
            values = {"losses": ran.losses, "norms": ran.norms, "validations": ran.validations}
            (folder / f"{case.name}.json").write_text(json.dumps(values))


def read_case(folder: Path, name: str) -> Ran:
    values = json.loads((folder / f"{name}.json").read_text())
    validations = [tuple(found) for found in values["validations"]]
    return Ran(values["losses"], values["norms"], validations, load_file(folder / f"{name}.safetensors"))


def in_ranks(num_ranks: int, folder: Path, run: Callable[..., None], *arguments: Any) -> None:
    """`run(group, folder, *arguments)` in so many processes."""
    run_ranks(run, num_ranks, folder, *arguments, timeout_seconds=400)
