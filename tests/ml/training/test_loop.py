from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ml.errors import TrainingError
from ml.training.batches import epoch_batches, fixed_batches
from ml.training.checkpoint import load_weights
from ml.training.checkpoint_folders import newest_checkpoint, step_of_checkpoint
from ml.training.folders import WorkFolder, read_json
from ml.training.history import read_history, resumptions
from ml.training.job import load_job
from ml.training.loop import train
from ml.training.probe import measure
from ml.training.ranks import RankGroup
from ml.training.spec import Optimizer, TrainSpec
from ml.training.stepping import Stepper
from tests.ml.training.several_ranks import Interrupted, interrupt_at, train_in_ranks

JOB = "tests.ml.training.toy_job:ToyJob"


OF_OPTIMIZER = {field.name for field in fields(Optimizer)}


def toy_spec(work_dir: Path, *, num_ranks: int = 1, epochs: int = 4, job: dict | None = None, **changes) -> TrainSpec:
    """203 rows in steps of 32: the last batch of an epoch has 11 rows, so ranks get 6 and 5."""
    settings = {"precision": "fp32", "checkpoint_every_steps": 5, "patience": 100, "epochs": epochs} | changes
    optimizer = Optimizer(**({"learning_rate": 3e-3} | {name: settings.pop(name) for name in OF_OPTIMIZER if name in settings}))
    return TrainSpec(
        job=JOB,
        job_arguments=job or {},
        work_dir=work_dir,
        num_ranks=num_ranks,
        batch_size_per_rank=32 // num_ranks,
        optimizer=optimizer,
        **settings,
    )


def train_here(spec: TrainSpec, **options) -> None:
    train(spec, load_job(spec), RankGroup(), **options)


def losses(spec: TrainSpec, kind: str = "step") -> list[float]:
    return [record["loss"] for record in read_history(WorkFolder(spec.work_dir).history) if record["kind"] == kind]


def loss_difference(a: TrainSpec, b: TrainSpec) -> float:
    """Largest relative difference of any step's or validation's loss of two trainings."""
    return max(abs(x - y) / abs(x) for kind in ("step", "validation") for x, y in zip(losses(a, kind), losses(b, kind), strict=True))


def weight_difference(a: TrainSpec, b: TrainSpec) -> float:
    """Largest difference of any final weight, relative to the largest weight of its tensor."""
    weights_a, weights_b = (load_file(WorkFolder(spec.work_dir).result_weights) for spec in (a, b))
    assert weights_a.keys() == weights_b.keys()
    return max(float((tensor - weights_b[name]).abs().max() / tensor.abs().max()) for name, tensor in weights_a.items())


class TwoRanks:
    """What was trained in two ranks, all in one start of them."""

    def __init__(self, folder: Path):
        dropout = {"dropout": 0.2}
        self.exact = toy_spec(folder / "exact", num_ranks=2, job=EXACT)
        self.single = toy_spec(folder / "single", num_ranks=2, epochs=2)
        self.straight = toy_spec(folder / "straight", num_ranks=2, epochs=2, job=dropout)
        self.broken = toy_spec(folder / "broken", num_ranks=2, epochs=2, job=dropout)
        self.left_for_one = toy_spec(folder / "left", num_ranks=2, epochs=2)
        specs = [self.exact, self.single, self.straight, self.broken, self.broken, self.left_for_one]
        train_in_ranks(specs, num_ranks=2, interrupt={3: 12, 5: 12})


EXACT = {"double": True, "weights": [1.0, 3.0]}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    return TwoRanks(tmp_path_factory.mktemp("two-ranks"))


def test_the_number_of_ranks_changes_nothing(two_ranks: TwoRanks, tmp_path: Path) -> None:
    one_exact, one_single = toy_spec(tmp_path / "exact", job=EXACT), toy_spec(tmp_path / "single", epochs=2)
    train_here(one_exact)
    train_here(one_single)
    assert loss_difference(one_exact, two_ranks.exact) <= 1e-10
    assert weight_difference(one_exact, two_ranks.exact) <= 1e-10
    # No bound on single weights here: AdamW divides a gradient that is nothing but rounding by its own size.
    assert loss_difference(one_single, two_ranks.single) <= 1e-5


def test_a_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    job = {"dropout": 0.2}
    straight, broken = toy_spec(tmp_path / "straight", job=job), toy_spec(tmp_path / "broken", job=job)
    train_here(straight)
    with pytest.raises(Interrupted):
        train_here(broken, finish_step=interrupt_at(13))
    work = WorkFolder(broken.work_dir)
    checkpoint = newest_checkpoint(work.checkpoints)
    assert step_of_checkpoint(checkpoint) == 10
    assert not work.result.exists()
    torch.manual_seed(99)  # whatever happened to the generator in between
    train_here(broken)
    assert resumptions(read_history(work.history)) == (10, 3)
    assert loss_difference(straight, broken) == 0
    assert weight_difference(straight, broken) == 0


def test_ranks_resume_with_their_own_random_state(two_ranks: TwoRanks) -> None:
    assert loss_difference(two_ranks.straight, two_ranks.broken) == 0
    assert weight_difference(two_ranks.straight, two_ranks.broken) == 0


def test_another_number_of_ranks_may_resume(two_ranks: TwoRanks) -> None:
    train_here(toy_spec(two_ranks.left_for_one.work_dir, epochs=2))
    assert resumptions(read_history(WorkFolder(two_ranks.left_for_one.work_dir).history))[1] == 2
    assert loss_difference(two_ranks.single, two_ranks.left_for_one) <= 1e-5


def test_a_training_that_is_asked_to_end_saves_and_goes_on_without_a_loss(tmp_path: Path) -> None:
    job = {"dropout": 0.2}
    straight, broken = toy_spec(tmp_path / "straight", job=job), toy_spec(tmp_path / "broken", job=job)
    train_here(straight)
    work, asked = WorkFolder(broken.work_dir), iter([False] * 12 + [True])
    assert train(broken, load_job(broken), RankGroup(), stop_asked=lambda: next(asked)) is False
    assert not work.result.exists()
    assert step_of_checkpoint(newest_checkpoint(work.checkpoints)) == 13
    preempted = read_json(work.preempted)
    assert preempted is not None and preempted["step"] == 13
    train_here(broken)
    assert resumptions(read_history(work.history)) == (13, 0)
    assert loss_difference(straight, broken) == 0
    assert weight_difference(straight, broken) == 0


def test_training_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    # Half the labels are wrong: the network can only learn them by heart, and the validation loss rises.
    spec = toy_spec(tmp_path, epochs=60, job={"noise": 0.5, "width": 32}, patience=2, validate_every_steps=7)
    train_here(spec)
    work = WorkFolder(tmp_path)
    result = read_json(work.result)
    assert result is not None
    validations = [record for record in read_history(work.history) if record["kind"] == "validation"]
    best = min(validations, key=lambda record: record["loss"])
    assert result["num_steps"] < result["plan"]["num_steps"]
    assert (result["best_step"], result["best_loss"]) == (best["step"], best["loss"])
    assert result["num_steps"] == best["step"] + 2 * 7
    assert any("stopped at step" in record.get("message", "") for record in read_history(work.history))

    job = load_job(spec)
    stepper = Stepper(spec, job, RankGroup())
    load_weights(stepper.model, work.result_weights)
    found = stepper.evaluate("validation", fixed_batches(job.lengths["validation"], 32), "fp32")
    assert found.loss == pytest.approx(best["loss"], rel=1e-6)
    assert (found.accuracy, found.recall) == (best["accuracy"], best["recall"])


def test_early_stopping_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    settings = {"epochs": 60, "job": {"noise": 0.5, "width": 32}, "patience": 3, "validate_every_steps": 7}
    straight, broken = toy_spec(tmp_path / "straight", **settings), toy_spec(tmp_path / "broken", **settings)
    train_here(straight)
    result = read_json(WorkFolder(straight.work_dir).result)
    assert result is not None
    with pytest.raises(Interrupted):
        train_here(broken, finish_step=interrupt_at(result["num_steps"] - 2))
    train_here(broken)
    assert loss_difference(straight, broken) == 0
    assert weight_difference(straight, broken) == 0


def test_probing_leaves_weights_and_random_state_as_they_were(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, job={"dropout": 0.3}, weight_decay=0.1)
    job = load_job(spec)
    stepper = Stepper(spec, job, RankGroup())
    before = {name: tensor.clone() for name, tensor in stepper.model.state_dict().items()}
    random_state = torch.get_rng_state()
    measured = measure(stepper, epoch_batches(np.arange(203), job.lengths["train"], 32, 0, 0), lambda: None)
    assert measured.step_seconds["fp32"] > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stepper.model.state_dict().items())


def test_a_budget_that_is_too_small_trains_on_a_stratified_sample(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, epochs=1, job={"num_rows": 2000, "step_seconds": 0.02})
    train_here(spec, seconds_left=0.9)
    result = read_json(WorkFolder(tmp_path).result)
    assert result is not None
    plan = result["plan"]
    assert plan["num_train_rows"] < plan["num_available_rows"] == 2000
    assert result["num_steps"] == plan["num_steps"] == -(-plan["num_train_rows"] // 32)
    assert "do not fit" in plan["warnings"][0]
    messages = [record["message"] for record in read_history(WorkFolder(tmp_path).history) if record["kind"] == "event"]
    assert plan["warnings"][0] in messages


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, job={"fault": {"do": "nan", "batch": 15, "rank": 0}})
    with pytest.raises(TrainingError, match=r"step \d+ of 28: the loss is nan.*lower train\.learning_rate"):
        train_here(spec)


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_here(toy_spec(tmp_path), finish_step=interrupt_at(7))
    with pytest.raises(TrainingError, match="holds another training"):
        train_here(toy_spec(tmp_path, learning_rate=1e-3))


def test_the_plan_outlives_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_here(toy_spec(tmp_path), finish_step=interrupt_at(2), seconds_left=1000)
    decided = read_json(WorkFolder(tmp_path).plan)
    train_here(toy_spec(tmp_path), seconds_left=0)
    result = read_json(WorkFolder(tmp_path).result)
    assert result is not None
    assert result["plan"] == decided


def test_a_job_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no_such_module:Job"):
        load_job(TrainSpec(job="no_such_module:Job", work_dir=tmp_path))
