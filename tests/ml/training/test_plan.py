from pathlib import Path

import pytest

from ml.training.plan import Measured, Plan, auto_epochs, decide_plan
from ml.training.schedule import learning_rate_at
from ml.training.spec import TrainSpec

FAST = Measured({"fp32": 0.01}, 0.004)


def plan(num_rows: int, measured: Measured = FAST, seconds_left: float = 1e6, **spec) -> Plan:
    spec = TrainSpec(job="m:C", work_dir=Path("w"), **spec)
    return decide_plan(spec, num_rows=num_rows, num_validation_rows=100, measured=measured, seconds_left=seconds_left)


def test_small_data_get_more_epochs_and_large_data_the_least() -> None:
    counts = [auto_epochs(num_rows, 64) for num_rows in (50, 500, 2_000, 7_000, 50_000)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    assert counts[0] > counts[-1]


def test_enough_time_changes_nothing() -> None:
    decided = plan(7_000, epochs=3)
    assert (decided.epochs, decided.num_train_rows, decided.warnings) == (3, 7_000, ())
    assert decided.num_steps == 3 * 110
    assert decided.num_warmup_steps == 33


def test_a_tight_budget_costs_epochs_before_rows() -> None:
    wanted = plan(7_000)
    tight = plan(7_000, seconds_left=wanted.estimated_seconds / wanted.epochs * 1.5)
    assert tight.epochs < wanted.epochs
    assert tight.num_train_rows == 7_000
    assert "do not fit" in tight.warnings[0]


def test_a_budget_below_one_epoch_samples_rows_and_says_so() -> None:
    slow = Measured({"fp32": 1.0}, 0.4)
    decided = plan(50_000, slow, seconds_left=200)
    assert decided.epochs == 1
    assert 64 * 100 < decided.num_train_rows < 64 * 200
    assert decided.estimated_seconds <= 200
    assert any("50000 training rows do not fit" in warning for warning in decided.warnings)


def test_epochs_that_were_asked_for_are_kept_and_rows_are_cut() -> None:
    decided = plan(50_000, Measured({"fp32": 1.0}, 0.4), seconds_left=200, epochs=5)
    assert decided.epochs == 5
    assert decided.estimated_seconds <= 200


def test_no_budget_at_all_still_trains_on_a_few_batches() -> None:
    decided = plan(50_000, Measured({"fp32": 1.0}, 0.4), seconds_left=-5)
    assert decided.num_train_rows == 4 * 64


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"fp32": 1.0, "bf16": 0.6}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.99}, "fp32"),
        ({"fp32": 1.0, "bf16": 2.0}, "fp32"),
        ({"fp32": 1.0}, "fp32"),
    ],
)
def test_bf16_is_chosen_where_it_was_measured_to_gain(measured: dict, chosen: str) -> None:
    assert plan(1_000, Measured(measured, 0.1)).precision == chosen


def test_a_plan_survives_json() -> None:
    decided = plan(50_000, Measured({"fp32": 1.0, "bf16": 0.5}, 0.4), seconds_left=200)
    assert Plan.from_json(decided.to_json()) == decided


def test_validations_are_limited_in_number() -> None:
    assert plan(640, epochs=20).validate_every_steps == 20
    assert plan(640, epochs=3).validate_every_steps == 10
    assert plan(640, epochs=3, validate_every_steps=7).validate_every_steps == 7


def test_fingerprint_tells_trainings_apart_but_not_machines() -> None:
    spec = TrainSpec(job="m:C", work_dir=Path("a"), num_ranks=2, batch_size_per_rank=32)
    assert spec.fingerprint == TrainSpec(job="m:C", work_dir=Path("b"), num_ranks=1, batch_size_per_rank=64, budget_seconds=5).fingerprint
    assert spec.fingerprint != TrainSpec(job="m:C", work_dir=Path("a"), seed=1).fingerprint
    assert spec.fingerprint != TrainSpec(job="m:C", work_dir=Path("a"), num_ranks=1, batch_size_per_rank=32).fingerprint
    assert TrainSpec.from_json(spec.to_json()) == spec


def test_learning_rate_rises_to_the_peak_and_falls_to_nearly_nothing() -> None:
    rates = [learning_rate_at(step, peak=1.0, num_warmup_steps=10, num_steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates.index(max(rates)) == 9
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(1 / 90)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate_at(0, peak=1.0, num_warmup_steps=0, num_steps=1) == 1.0
