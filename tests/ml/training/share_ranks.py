"""Gradients of one batch under unequal shares, in real ranks over gloo."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ml.training.job import load_job
from ml.training.ranks import RankGroup
from ml.training.shares import ShareBalancer, deal_rows
from ml.training.spec import Optimizer, TrainSpec
from ml.training.stepping import Stepper
from tests.ml.training.gloo_ranks import run_ranks

Gradients = dict[str, torch.Tensor]


def toy_spec(work_dir: Path, num_ranks: int, double: bool) -> TrainSpec:
    return TrainSpec(
        job="tests.ml.training.toy_job:ToyJob",
        work_dir=work_dir,
        job_arguments={"double": double, "weights": (1.0, 2.5)},
        num_ranks=num_ranks,
        optimizer=Optimizer(name="sgd", gradient_clip=1e9),
        precision="fp32",
    )


def gradients_of(stepper: Stepper, rows: np.ndarray, shares: list[int] | None) -> tuple[float, Gradients]:
    """Loss and gradient of a batch; no weight changes."""
    result = stepper.train_step(rows, stepper.new_optimizer(0.0), "fp32", 0.0, shares=shares)
    return result.loss, {name: parameter.grad.clone() for name, parameter in stepper.model.named_parameters() if parameter.grad is not None}


def gradients_in_ranks(folder: Path, rows: np.ndarray, fractions: list[list[float]]) -> dict[bool, list[tuple[float, Gradients]]]:
    """In float32 (False) and float64 (True), and for each choice of fractions, what two ranks find together."""
    folder.mkdir(parents=True)
    run_ranks(_find_gradients, 2, str(folder), rows.tolist(), fractions)
    found: dict[bool, list[tuple[float, Gradients]]] = {}
    for double in (False, True):
        tensors = [load_file(folder / f"{double}-{index}.safetensors") for index in range(len(fractions))]
        found[double] = [(float(one.pop("loss")), one) for one in tensors]
    return found


def fractions_while_training(folder: Path, num_steps: int) -> list[list[list[float]]]:
    """Per rank, its fractions after each step, where rank 1 reports to be twice as slow: ranks must agree without asking."""
    folder.mkdir(parents=True)
    run_ranks(_balance, 2, str(folder), num_steps)
    return [load_file(folder / f"{rank}.safetensors")["fractions"].tolist() for rank in range(2)]


def _find_gradients(group: RankGroup, folder: str, rows: list[int], fractions: list[list[float]]) -> None:
    for double in (False, True):
        spec = toy_spec(Path(folder), group.num_ranks, double)
        job = load_job(spec)
        stepper = Stepper(spec, job, group)
        for index, given in enumerate(fractions):
            dealt, counts = deal_rows(np.array(rows), job.lengths["train"], group.num_ranks, np.array(given))
            loss, gradients = gradients_of(stepper, dealt, counts)
            if group.is_first:
                save_file({**gradients, "loss": torch.tensor(loss, dtype=torch.float64)}, Path(folder) / f"{double}-{index}.safetensors")


def _balance(group: RankGroup, folder: str, num_steps: int) -> None:
    spec = replace(toy_spec(Path(folder), group.num_ranks, double=False), batch_size_per_rank=24)
    job = load_job(spec)
    stepper = Stepper(spec, job, group)
    balancer = ShareBalancer(group.num_ranks)
    optimizer = stepper.new_optimizer(0.1)
    # Each rank's own clock would differ; the second one's is made to say half the speed.
    random = np.random.default_rng(group.rank)
    seen = []
    for step in range(num_steps):
        rows = np.random.default_rng(step).choice(203, 48, replace=False)
        dealt, counts = deal_rows(rows, job.lengths["train"], group.num_ranks, balancer.fractions)
        result = stepper.train_step(dealt, optimizer, "fp32", 0.1, shares=counts)
        seconds = result.num_tokens / (500 if group.rank else 1000) * random.normal(1, 0.05)
        balancer.exchange(group, group.rank, result.num_tokens, seconds)
        seen.append(balancer.fractions.tolist())
    save_file({"fractions": torch.tensor(seen, dtype=torch.float64)}, Path(folder) / f"{group.rank}.safetensors")
