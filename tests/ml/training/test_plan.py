import json
from dataclasses import replace
from pathlib import Path

import pytest

from ml.training.plan import BucketTime, CompileTime, Measured, Plan, auto_epochs, choose_buckets, decide_plan, pays_to_compile
from ml.training.schedule import learning_rate_at
from ml.training.spec import GradientSync, TrainSpec

FAST = Measured({"fp32": 0.01}, 0.004)


def plan(num_rows: int, measured: Measured = FAST, seconds_left: float = 1e6, **spec) -> Plan:
    spec = TrainSpec(job="m:C", work_dir=Path("w"), **spec)
    return decide_plan(spec, num_rows=num_rows, num_validation_rows=100, measured=measured, seconds_left=seconds_left)


BUCKETS = (
    BucketTime(1.0, True, 0.50, 8e7),
    BucketTime(5.0, True, 0.40, 8e7),
    BucketTime(25.0, True, 0.45, 8e7),
    BucketTime(80.0, False, 0.60, 8e7),
)


def test_small_data_get_more_epochs_and_large_data_the_least() -> None:
    counts = [auto_epochs(num_batches) for num_batches in (1, 8, 32, 110, 782)]
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
    measured = Measured({"fp32": 1.0, "bf16": 0.5}, 0.4, BUCKETS, CompileTime(0.5, 0.4, 20.0, True), ("something was not measured",))
    decided = plan(50_000, measured, seconds_left=200)
    assert Plan.from_json(json.loads(json.dumps(decided.to_json()))) == decided
    assert decided.to_json()["gradient_sync"]["bucket_mb"] == 5
    assert decided.to_json()["gradient_sync"]["measured"][0] == {
        "bucket_mb": 1.0,
        "overlap": True,
        "step_seconds": 0.50,
        "bytes_per_step": 8e7,
    }


def test_the_fastest_buckets_are_taken_where_they_gain() -> None:
    auto = GradientSync(hook="fp16")
    assert choose_buckets(auto, BUCKETS) == (replace(auto, bucket_mb=5.0), 0.40)
    near = (BUCKETS[0], replace(BUCKETS[1], step_seconds=0.445), *BUCKETS[2:])
    assert choose_buckets(auto, near) == (replace(auto, bucket_mb=25.0), 0.45)
    after = (*BUCKETS[:3], replace(BUCKETS[3], step_seconds=0.1))
    assert choose_buckets(auto, after) == (replace(auto, bucket_mb=80.0, overlap=False), 0.1)


def test_buckets_that_were_not_measured_or_are_given_stay() -> None:
    assert choose_buckets(GradientSync(), ()) == (GradientSync(bucket_mb=25.0), None)
    assert choose_buckets(GradientSync(bucket_mb=3.0), BUCKETS) == (GradientSync(bucket_mb=3.0), None)
    # A small model has no bucket of the default size; then one bucket is what DDP would make.
    small = (BucketTime(1.0, True, 0.099, 8e6), BucketTime(8.0, False, 0.1, 8e6))
    assert choose_buckets(GradientSync(), small)[0] == GradientSync(bucket_mb=8.0, overlap=False)


def test_what_was_decided_holds_for_what_the_spec_leaves_open() -> None:
    decided = plan(1_000, Measured({"fp32": 1.0}, 0.1, (*BUCKETS[:3], replace(BUCKETS[3], step_seconds=0.1))))
    spec = TrainSpec(job="m:C", work_dir=Path("w"), gradient_sync=GradientSync(hook="fp16", bucket_views=False))
    assert decided.sync_for(spec) == GradientSync(hook="fp16", bucket_views=False, bucket_mb=80.0, overlap=False)
    given = replace(spec, gradient_sync=GradientSync(bucket_mb=3.0))
    assert decided.sync_for(given) == given.gradient_sync


def test_the_plan_counts_with_the_speed_of_what_was_chosen() -> None:
    measured = Measured({"fp32": 1.0, "bf16": 0.5}, 0.1)
    assert plan(1_000, measured).step_seconds == 0.5
    compiled = replace(measured, compiled=CompileTime(0.5, 0.3, 10.0, True))
    assert (plan(1_000, compiled).step_seconds, plan(1_000, compiled).is_compiled) == (0.3, True)
    unused = replace(measured, compiled=CompileTime(0.5, 0.3, 10.0, False))
    assert (plan(1_000, unused).step_seconds, plan(1_000, unused).is_compiled) == (0.5, False)
    assert plan(1_000, replace(compiled, buckets=BUCKETS)).step_seconds == 0.40


def test_compiling_must_gain_more_than_it_costs() -> None:
    assert pays_to_compile(1.0, 0.8, 30.0, 1_000)
    assert not pays_to_compile(1.0, 0.8, 30.0, 100)
    assert not pays_to_compile(1.0, 1.2, 1.0, 10**6)


def test_a_token_budget_decides_the_number_of_steps() -> None:
    spec = TrainSpec(job="m:C", work_dir=Path("w"), epochs=2, max_tokens_per_batch=100)

    def batches_of(num_rows: int) -> int:
        return -(-num_rows // 16)

    def decide(seconds_left: float) -> Plan:
        measured = Measured({"fp32": 1.0}, 0.0)
        return decide_plan(
            spec, num_rows=1_600, num_validation_rows=10, measured=measured, seconds_left=seconds_left, batches_of=batches_of
        )

    assert (decide(1e6).steps_per_epoch, decide(1e6).num_steps) == (100, 200)
    tight = decide(100.0)
    assert tight.num_train_rows < 1_600
    assert tight.steps_per_epoch == batches_of(tight.num_train_rows)
    assert tight.estimated_seconds <= 85


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
