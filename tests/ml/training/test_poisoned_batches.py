"""Batches whose loss is not a number: left out, gone back from, or the end, as the spec says."""

from pathlib import Path

import pytest

from ml.errors import TrainingError
from ml.training.folders import WorkFolder, read_json
from ml.training.history import read_history
from ml.training.job import load_job
from ml.training.loop import train
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from tests.ml.training.several_ranks import Interrupted, interrupt_at, train_in_ranks
from tests.ml.training.test_loop import losses, toy_spec, weight_difference

ROW = 17


def records(spec: TrainSpec, kind: str) -> list[dict]:
    return [record for record in read_history(WorkFolder(spec.work_dir).history) if record["kind"] == kind]


def result(spec: TrainSpec) -> dict:
    found = read_json(WorkFolder(spec.work_dir).result)
    assert found is not None
    return found


def run(spec: TrainSpec, **options) -> None:
    train(spec, load_job(spec), RankGroup(), **options)


def test_a_poisoned_batch_is_left_out_and_its_rows_are_named(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, job={"poisoned": [ROW]})
    run(spec)
    poisoned = records(spec, "poisoned")
    assert [record["rows"] for record in poisoned] == [[ROW]] * 4
    assert len({record["step"] for record in poisoned}) == 4
    assert "training rows at fault: 17" in poisoned[0]["message"]
    steps = {record["step"] for record in records(spec, "step")}
    assert steps == set(range(1, 29)) - {record["step"] for record in poisoned}
    assert all(loss == loss for loss in losses(spec))
    assert result(spec)["num_poisoned_batches"] == 4


def test_going_back_gives_what_would_have_been_without_the_batch(tmp_path: Path) -> None:
    """A rolled-back training meets the batch once; weights are those of a training that left it out, for it had changed nothing."""
    settings = {"epochs": 1, "checkpoint_every_steps": 2}
    skipped = toy_spec(tmp_path / "skip", job={"poisoned": [ROW]}, **settings)
    rolled = toy_spec(tmp_path / "roll", job={"poisoned": [ROW]}, poisoned_batch="rollback", **settings)
    run(skipped)
    run(rolled)
    assert len(records(rolled, "poisoned")) == 1
    resumed = records(rolled, "resumed")
    step = records(rolled, "poisoned")[0]["step"]
    assert [record["step"] for record in resumed] == ([(step - 1) // 2 * 2] if step > 2 else [])
    assert losses(rolled) == losses(skipped)
    assert weight_difference(rolled, skipped) == 0


def test_too_many_in_a_row_end_the_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan.*training rows at fault.*This is number 3: look at these rows, or lower"):
        run(toy_spec(tmp_path, job={"poisoned": list(range(203))}))


def test_the_policy_stop_ends_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"rows at fault: 17. This is number 1"):
        run(toy_spec(tmp_path, job={"poisoned": [ROW]}, poisoned_batch="stop"))


def test_going_back_too_often_ends_the_training(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path, job={"poisoned": [ROW]}, poisoned_batch="rollback", max_poisoned_batches=3)
    with pytest.raises(TrainingError, match="This is number 3"):
        run(spec)


def test_what_was_left_out_stays_out_after_a_resume(tmp_path: Path) -> None:
    straight, broken = toy_spec(tmp_path / "a", job={"poisoned": [ROW]}), toy_spec(tmp_path / "b", job={"poisoned": [ROW]})
    run(straight)
    first = records(straight, "poisoned")[0]["step"]
    with pytest.raises(Interrupted):
        run(broken, finish_step=interrupt_at(first + 6))
    run(broken)
    assert losses(broken) == losses(straight)
    assert weight_difference(broken, straight) == 0
    assert result(broken)["num_poisoned_batches"] == 4


def test_all_ranks_leave_out_the_same_batch(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path / "two", num_ranks=2, epochs=1, job={"poisoned": [ROW]})
    train_in_ranks([spec], 2)
    assert [record["rows"] for record in records(spec, "poisoned")] == [[ROW]]
    assert result(spec)["num_poisoned_batches"] == 1


@pytest.mark.parametrize("watch", ["accuracy", "recall"])
def test_the_watched_metric_decides_which_weights_are_best(tmp_path: Path, watch: str) -> None:
    spec = toy_spec(tmp_path, job={"noise": 0.4}, watch=watch, epochs=6)
    run(spec)
    validations = records(spec, "validation")
    best = max(validations, key=lambda record: record[watch])
    assert result(spec)["best_step"] == best["step"]
    assert result(spec)[f"best_{watch}"] == best[watch]
