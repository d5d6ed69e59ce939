"""What one rank loads and computes; what several do together is in `strategies/`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ml.errors import ConfigError
from ml.training.job import load_job
from ml.training.layout import Layout
from ml.training.ranks import RankGroup
from ml.training.spec import GradientSync, Optimizer, Parallelism, TrainSpec
from ml.training.stepping import Stepper

SPEC = TrainSpec(
    job="tests.ml.training.toy_job:ToyJob",
    work_dir=Path(),
    num_ranks=1,
    job_arguments={"double": True, "weights": [1.0, 3.0]},
    optimizer=Optimizer("sgd", learning_rate=0.1, gradient_clip=1e-3, weight_decay=0.0),
)


def stepper_of(spec: TrainSpec = SPEC, **options) -> Stepper:
    return Stepper(spec, load_job(spec), RankGroup(), **options)


def seen_by(stepper: Stepper, rank: int, layout: Layout, rows: np.ndarray, shares: list[int] | None = None) -> list[list[int]]:
    """What another rank of another layout would count of each of its passes."""
    stepper.layout, stepper.data_rank = layout, layout.data_rank(rank)
    return [part[:count].tolist() for part, count in stepper.passes(rows, shares)]


def test_every_row_is_counted_by_one_data_rank() -> None:
    stepper, rows = stepper_of(), np.arange(10, 17)
    layout = Layout("fsdp+tensor", shard=3, tensor=2)
    seen = [seen_by(stepper, rank, layout, rows) for rank in range(6)]
    assert seen[0] == seen[1] == [[10, 13, 16]]
    assert [seen[rank] for rank in (2, 4)] == [[[11, 14]], [[12, 15]]]
    assert seen_by(stepper, 4, layout, rows, [2, 0, 5]) == [[12, 13, 14, 15, 16]]
    assert seen_by(stepper, 2, layout, rows, [2, 0, 5]) == [[]]


def test_every_rank_has_as_many_passes_as_the_others() -> None:
    stepper, rows = stepper_of(replace(SPEC, gradient_sync=GradientSync(accumulation_steps=3))), np.arange(5)
    layout = Layout("ddp", replicate=2)
    assert [seen_by(stepper, rank, layout, rows) for rank in range(2)] == [[[0], [2], [4]], [[1], [3], []]]
    assert all(len(part) for part, _ in stepper.passes(rows))


def test_the_gradient_is_clipped_to_the_norm() -> None:
    stepper = stepper_of()
    optimizer = stepper.new_optimizer(0.1)
    before = stepper.weights()
    result = stepper.train_step(np.arange(20), optimizer, "fp32", 0.1)
    assert result.gradient_norm > 1e-3
    moved = sum(float((tensor - before[name]).pow(2).sum()) for name, tensor in stepper.weights().items()) ** 0.5
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-6)


def test_the_loss_is_the_weighted_mean_of_the_rows() -> None:
    stepper, rows = stepper_of(), np.arange(13)
    job = stepper.job
    with torch.no_grad():
        losses = job.row_losses(stepper.model, job.batch("train", rows)).loss.numpy()
    weights = job.row_weights("train", rows)
    result = stepper.train_step(rows, stepper.new_optimizer(0.0), "fp32", 0.0, ask_to_stop=True)
    assert result.loss == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-12)
    assert (result.num_rows, result.num_tokens, result.asked_to_stop) == (13, int(job.lengths["train"][rows].sum()), True)


def test_one_rank_needs_no_plan_and_auto_says_why() -> None:
    assert stepper_of(replace(SPEC, parallelism=Parallelism("fsdp"))).layout == Layout()
    stepper = stepper_of()
    assert stepper.parallelism.strategy == "ddp"
    assert stepper.choice.startswith("one rank: a rank needs about")


def test_a_job_without_a_plan_is_refused_before_its_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job(SPEC)
    monkeypatch.setattr(job, "build_model", lambda seed: pytest.fail("built"))
    with pytest.raises(ConfigError, match=r"tensor: this model declares no tensor plan .*; ddp works with 2 ranks"):
        Stepper(replace(SPEC, parallelism=Parallelism("tensor")), job, RankGroup(0, 2))


def test_batches_may_come_from_elsewhere() -> None:
    stepper, asked = stepper_of(), []

    def prefetched(split, rows):
        asked.append(rows.tolist())
        return stepper.job.batch(split, rows)

    stepper.load_batch = prefetched
    stepper.train_step(np.arange(4), stepper.new_optimizer(0.1), "fp32", 0.1)
    assert asked == [[0, 1, 2, 3]]
