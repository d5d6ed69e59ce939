"""What is measured, and when it is left out. The clock is the test's own: each step takes as long as the test says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ml.training import probe
from ml.training.plan import CompileTime, Measured, choose_buckets, decide_plan
from ml.training.probe import PROBE_SHARE, apply_plan, measure
from ml.training.spec import GradientSync, TrainSpec

BATCHES = [np.arange(start, start + 8) for start in range(0, 80, 8)]
# 3 MiB of gradient: buckets of 1 MiB, and one for all.
MODEL_WIDTH = 886


class Group:
    """Several ranks, all alike."""

    device = torch.device("cpu")

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks

    def largest(self, value: float) -> float:
        return value

    def synchronize(self) -> None:
        pass


class TimedStepper:
    """Takes so many seconds a step as `seconds` says of the sync in use."""

    def __init__(self, seconds: Callable[[GradientSync], float], *, num_ranks: int = 2, width: int = MODEL_WIDTH, **spec: Any):
        self.spec = TrainSpec(job="m:C", work_dir=Path("w"), num_ranks=num_ranks, **{"precision": "fp32", "compile": "off"} | spec)
        self.group = Group(num_ranks)
        self.model = nn.Linear(width, width, bias=False)
        self.job = SimpleNamespace(lengths={"train": np.arange(1, 81)})
        self.is_bucketed = num_ranks > 1
        self.sync = self.spec.gradient_sync
        self.seconds = seconds
        self.now = 0.0
        self.num_steps = 0

    def rewrap(self, sync: GradientSync) -> None:
        self.sync = sync

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=learning_rate)

    def train_step(self, rows: np.ndarray, optimizer: Any, precision: str, learning_rate: float) -> None:
        assert learning_rate == 0.0
        self.num_steps += 1
        self.now += self.seconds(self.sync)

    def evaluate(self, split: str, batches: list, precision: str) -> None:
        self.now += 0.3


def measured_with(stepper: TimedStepper, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Measured:
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: stepper.now))
    return measure(stepper, BATCHES, lambda: None, **options)  # type: ignore[arg-type]


def test_buckets_are_compared_and_the_best_is_in_use_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = TimedStepper(lambda sync: 0.8 if sync.bucket_mb == 1.0 else 1.0)
    measured = measured_with(stepper, monkeypatch)
    assert measured.step_seconds == {"fp32": pytest.approx(1.0)}
    assert measured.validation_batch_seconds == pytest.approx(0.3)
    assert [(row.bucket_mb, row.overlap) for row in measured.buckets] == [(1.0, True), (pytest.approx(2.995, abs=0.01), False)]
    assert [row.step_seconds for row in measured.buckets] == [pytest.approx(0.8), pytest.approx(1.0)]
    assert {row.bytes_per_step for row in measured.buckets} == {MODEL_WIDTH**2 * 4}
    assert stepper.sync == choose_buckets(stepper.spec.gradient_sync, measured.buckets)[0] == GradientSync(bucket_mb=1.0)


def test_large_models_have_more_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_with(TimedStepper(lambda sync: 1.0, width=2600), monkeypatch)
    assert [row.bucket_mb for row in measured.buckets] == [1.0, 5.0, 25.0, pytest.approx(25.79, abs=0.01)]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_ranks": 1},
        {"width": 20},
        {"gradient_sync": GradientSync(bucket_mb=5.0)},
        {"gradient_sync": GradientSync(overlap=False)},
    ],
    ids=["one rank", "tiny model", "given", "no overlap wanted"],
)
def test_nothing_is_compared_where_it_cannot_matter(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = TimedStepper(lambda sync: 1.0, **changes)
    measured = measured_with(stepper, monkeypatch)
    assert (measured.buckets, measured.notes, stepper.sync) == ((), (), stepper.spec.gradient_sync)
    assert stepper.num_steps == 5  # a warm-up and four timed


@pytest.mark.parametrize("seconds_left", [10.0, 350.0, 1_000.0, 100_000.0])
def test_comparing_takes_a_small_share_of_the_time_left(seconds_left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = TimedStepper(lambda sync: 1.0)
    measured = measured_with(stepper, monkeypatch, seconds_left=seconds_left)
    assert stepper.now - 5 - 0.3 <= PROBE_SHARE * seconds_left
    assert bool(measured.buckets) == (seconds_left >= 350)
    assert any("were not compared" in note for note in measured.notes) == (seconds_left < 350)


def test_a_drift_of_the_machine_does_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = TimedStepper(lambda sync: 1.0)
    # Every step takes a little longer than the one before.
    stepper.seconds = lambda sync: 1.0 + 0.01 * stepper.num_steps
    one, whole = measured_with(stepper, monkeypatch).buckets
    assert one.step_seconds == pytest.approx(whole.step_seconds, rel=0.01)


class Compiles:
    """Stands for the compiler: the compiled model is so much faster, after so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, speed_up: float, seconds: float, reason: str | None = None):
        self.compiled = False
        self.speed_up, self.seconds, self.reason = speed_up, seconds, reason
        monkeypatch.setattr(probe, "try_compiled", self.try_compiled)
        monkeypatch.setattr(probe, "undo_compile", self.undo)
        monkeypatch.setattr(probe, "has_compiler", lambda device: True)

    def stepper(self, **spec: Any) -> TimedStepper:
        self.timed = TimedStepper(lambda sync: 1.0 / (self.speed_up if self.compiled else 1.0), **spec)
        return self.timed

    def try_compiled(self, model: nn.Module, run: Callable[[], object]) -> str | None:
        self.compiled = True
        self.timed.now += self.seconds
        run()
        return self.reason

    def undo(self, model: nn.Module) -> None:
        self.compiled = False


@pytest.mark.parametrize(
    ("wanted", "epochs", "seconds_left", "tried", "used"),
    [
        ("off", 10_000, 1e6, False, False),
        ("auto", 10, 1e6, False, False),  # 100 steps: a short training
        ("auto", 10_000, 600.0, False, False),  # a long one, but for the budget
        ("auto", 10_000, 1e6, True, True),
        ("on", 1, 600.0, True, True),
    ],
)
def test_compiling_is_tried_for_long_trainings_only(
    wanted: str, epochs: int, seconds_left: float, tried: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiles(monkeypatch, speed_up=1.25, seconds=40.0)
    stepper = compiler.stepper(num_ranks=1, compile=wanted, epochs=epochs)
    measured = measured_with(stepper, monkeypatch, seconds_left=seconds_left)
    assert (measured.compiled is not None, compiler.compiled) == (tried, used)
    if measured.compiled is not None:
        assert measured.compiled.compile_seconds == pytest.approx(40.8)
        assert (measured.compiled.step_seconds, measured.compiled.compiled_step_seconds) == (pytest.approx(1.0), pytest.approx(0.8))


def test_compiling_that_gains_too_little_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiles(monkeypatch, speed_up=1.001, seconds=60.0)
    measured = measured_with(compiler.stepper(num_ranks=1, compile="auto", epochs=1_000), monkeypatch, seconds_left=1e6)
    assert measured.compiled is not None
    assert not measured.compiled.used
    assert not compiler.compiled


def test_a_compiler_that_fails_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiles(monkeypatch, speed_up=2.0, seconds=1.0, reason="it could not be compiled")
    measured = measured_with(compiler.stepper(num_ranks=1, compile="on"), monkeypatch)
    assert (measured.compiled, measured.notes, compiler.compiled) == (None, ("it could not be compiled",), False)


def test_a_restart_runs_as_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(probe, "compile_in_place", compiled.append)
    stepper = TimedStepper(lambda sync: 0.8 if sync.bucket_mb == 1.0 else 1.0)
    measured = measured_with(stepper, monkeypatch)
    plan = decide_plan(stepper.spec, num_rows=80, num_validation_rows=10, measured=measured, seconds_left=1e6)
    restarted = TimedStepper(lambda sync: 1.0)
    apply_plan(restarted, plan)  # type: ignore[arg-type]
    assert restarted.sync == GradientSync(bucket_mb=1.0)
    assert compiled == []
    assert plan.step_seconds == pytest.approx(0.8)
    alone = TimedStepper(lambda sync: 1.0, num_ranks=1)
    apply_plan(alone, replace(plan, compiled=CompileTime(1.0, 0.5, 10.0, True)))  # type: ignore[arg-type]
    assert compiled == [alone.model]
    assert alone.sync == alone.spec.gradient_sync
