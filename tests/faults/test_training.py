"""Accidents of a training, over and over: ranks that are killed, that stop, that are asked to end. See also test_training_nodes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from ml.errors import TrainingPreempted
from ml.training.folders import WorkFolder, read_json
from ml.training.history import last_step, read_history
from ml.training.launcher import TrainOutcome, run_training
from ml.training.spec import TrainSpec
from tests.ml.training.test_launcher import INTERVAL, NUM_STEPS, check_complete, launched_spec, once_at, processes_of, rank_pid, wait_for


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainOutcome:
    return run_training(launched_spec(tmp_path_factory.mktemp("undisturbed")))


def signal_rank(work_dir: Path, rank: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank_pid(work_dir, rank), number)


def disturb(work_dir: Path, moment: random.Random, number: int, **changes) -> tuple[TrainSpec, TrainOutcome]:
    """Send a signal to a random rank at a random moment after the first checkpoint; what came of the training."""
    # Batches are made ahead: ten steps must still take longer than the delay and the launcher's look at the history.
    spec = launched_spec(work_dir, job={"step_seconds": 0.08}, **changes)
    step, rank, delay = moment.randint(INTERVAL + 1, NUM_STEPS - 10), moment.randint(0, 1), moment.uniform(0, 0.4)
    print(f"signal {number} to rank {rank} {delay:.3f} s after step {step}")
    outcome = run_training(spec, once_at(step, threading.Timer(delay, signal_rank, (work_dir, rank, number)).start))
    return spec, outcome


def check_survived(spec: TrainSpec, outcome: TrainOutcome, undisturbed: TrainOutcome) -> None:
    check_complete(spec, outcome)
    assert outcome.resumed_from_step > 0
    assert 0 <= outcome.num_recomputed_steps <= INTERVAL
    check_same_result(outcome, undisturbed)


def check_same_result(outcome: TrainOutcome, undisturbed: TrainOutcome) -> None:
    """Every step, not just the last one: a training that is resumed is the same training."""
    ours, theirs = (
        [(record["step"], record["loss"]) for record in read_history(found.history_path) if record["kind"] in ("step", "validation")]
        for found in (outcome, undisturbed)
    )
    assert ours == theirs
    weights, expected = load_file(outcome.weights_path), load_file(undisturbed.weights_path)
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in weights)


def seeded() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_killed_ranks_are_survived_without_a_trace(tmp_path: Path, undisturbed: TrainOutcome) -> None:
    moment = seeded()
    for trial in range(2):
        check_survived(*disturb(tmp_path / str(trial), moment, signal.SIGKILL), undisturbed)


@pytest.mark.slow
def test_a_stopped_rank_is_replaced_without_a_trace(tmp_path: Path, undisturbed: TrainOutcome) -> None:
    check_survived(*disturb(tmp_path, seeded(), signal.SIGSTOP, heartbeat_timeout_seconds=4), undisturbed)


def launcher_of(spec: TrainSpec) -> subprocess.Popen:
    given = spec.work_dir / "given.json"
    given.parent.mkdir(parents=True, exist_ok=True)
    given.write_text(spec.to_json())
    return subprocess.Popen(
        [sys.executable, "-m", "ml.training", "--spec", str(given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def preempt(spec: TrainSpec, moment: random.Random, whom: Callable[[subprocess.Popen], int]) -> None:
    """SIGTERM after a random step: the launcher ends with 75, and a checkpoint of the very last step is there."""
    work = WorkFolder(spec.work_dir)
    launcher = launcher_of(spec)
    try:
        step = moment.randint(3, NUM_STEPS - 15)
        print(f"SIGTERM at step {step}")
        wait_for(lambda: last_step(read_history(work.history)) >= step or launcher.poll() is not None, 120)
        os.kill(whom(launcher), signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode == TrainingPreempted.exit_code, err
    assert '"status": "preempted"' in out.splitlines()[-1]
    preempted = read_json(work.preempted)
    assert preempted is not None and preempted["step"] == last_step(read_history(work.history)) >= step
    assert processes_of(spec.work_dir) == []


def check_goes_on(spec: TrainSpec, undisturbed: TrainOutcome) -> None:
    saved = read_json(WorkFolder(spec.work_dir).preempted)
    outcome = run_training(spec)
    check_complete(spec, outcome)
    assert saved is not None and outcome.resumed_from_step == saved["step"]
    assert outcome.num_recomputed_steps == 0
    assert not WorkFolder(spec.work_dir).preempted.exists()
    check_same_result(outcome, undisturbed)


def test_sigterm_saves_a_checkpoint_and_the_next_launch_loses_nothing(tmp_path: Path, undisturbed: TrainOutcome) -> None:
    spec = launched_spec(tmp_path)
    preempt(spec, seeded(), lambda launcher: launcher.pid)
    check_goes_on(spec, undisturbed)


@pytest.mark.slow
def test_sigterm_at_a_rank_alone_is_a_preemption_too(tmp_path: Path, undisturbed: TrainOutcome) -> None:
    spec = launched_spec(tmp_path)
    preempt(spec, seeded(), lambda launcher: rank_pid(tmp_path, 1))
    check_goes_on(spec, undisturbed)


@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    spec = launched_spec(tmp_path)
    launcher = launcher_of(spec)
    try:
        wait_for(lambda: any(WorkFolder(tmp_path).attempts.glob("*/rank-0.json")), 60)
        launcher.terminate()
        _, err = launcher.communicate(timeout=30)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode == TrainingPreempted.exit_code, err
    assert processes_of(tmp_path) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=["killed", "stopped", "preempted"])
def test_twenty_of_twenty_are_survived(tmp_path: Path, undisturbed: TrainOutcome, number: int) -> None:
    moment = seeded()
    for trial in range(20):
        work_dir = tmp_path / str(trial)
        if number == signal.SIGTERM:
            spec = launched_spec(work_dir)
            preempt(spec, moment, lambda launcher: launcher.pid)
            check_goes_on(spec, undisturbed)
        else:
            check_survived(
                *disturb(work_dir, moment, number, heartbeat_timeout_seconds=4 if number == signal.SIGSTOP else 120), undisturbed
            )
