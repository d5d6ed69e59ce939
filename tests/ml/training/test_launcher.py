"""The real thing: torchrun, gloo, signals. Each start of the ranks takes several seconds."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ml.errors import TrainingError, WorkerLostError
from ml.training.checkpoint_folders import newest_checkpoint, step_of_checkpoint
from ml.training.folders import WorkFolder
from ml.training.history import last_step, read_history
from ml.training.launcher import TrainOutcome, run_training
from ml.training.spec import TrainSpec
from tests.ml.training.test_loop import toy_spec

INTERVAL = 10
NUM_STEPS = 56


def launched_spec(work_dir: Path, *, job: dict | None = None, **changes) -> TrainSpec:
    """56 steps of about 30 ms in two ranks, a checkpoint every 10."""
    settings = {"num_ranks": 2, "epochs": 8, "checkpoint_every_steps": INTERVAL, "validate_every_steps": 14} | changes
    return toy_spec(work_dir, job={"dropout": 0.1, "step_seconds": 0.03} | (job or {}), **settings)


class FolderSink:
    """Checkpoints in another folder; keeps count, and fails as often as told."""

    def __init__(self, folder: Path, num_failures: int = 0):
        self.folder = folder
        self.num_failures = num_failures
        self.pushed: list[int] = []

    def push(self, step: int, folder: Path) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise ConnectionError("the store is away")
        shutil.copytree(folder, self.folder / f"step-{step}")
        self.pushed.append(step)

    def pull_latest(self, destination: Path) -> int | None:
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return None
        shutil.copytree(newest, destination / newest.name)
        return step_of_checkpoint(newest)


def rank_pid(work_dir: Path, rank: int) -> int:
    newest = max(WorkFolder(work_dir).attempts.glob(f"*/rank-{rank}.json"))
    return json.loads(newest.read_bytes())["pid"]


def once_at(step: int, action: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    done = []

    def report(record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] >= step and not done:
            done.append(step)
            action()

    return report


def processes_of(work_dir: Path) -> list[psutil.Process]:
    """Every living process that has the work folder in its command line, this one left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and str(work_dir) in " ".join(process.cmdline()):
                found.append(process)
    return found


def messages_of(outcome: TrainOutcome) -> list[str]:
    return [record["message"] for record in read_history(outcome.history_path) if "message" in record]


def check_complete(spec: TrainSpec, outcome: TrainOutcome) -> None:
    records = read_history(outcome.history_path)
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, NUM_STEPS + 1))
    assert [record["step"] for record in records if record["kind"] == "validation"] == [14, 28, 42, 56]
    assert outcome.num_steps == NUM_STEPS
    assert outcome.weights_path.is_file()
    assert processes_of(spec.work_dir) == []


def test_a_killed_rank_is_restarted_from_the_last_checkpoint(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    moment = random.Random(seed)
    step, rank = moment.randint(INTERVAL + 1, NUM_STEPS - 10), moment.randint(0, 1)
    print(f"seed {seed}: rank {rank} is killed after step {step}")
    spec, sink = launched_spec(tmp_path / "work"), FolderSink(tmp_path / "away", num_failures=1)

    outcome = run_training(spec, once_at(step, lambda: os.kill(rank_pid(spec.work_dir, rank), signal.SIGKILL)), sink)

    check_complete(spec, outcome)
    assert outcome.resumed_from_step >= step // INTERVAL * INTERVAL > 0
    assert 0 <= outcome.num_recomputed_steps <= INTERVAL
    messages = messages_of(outcome)
    assert any(f"rank {rank} was killed by signal 9" in message for message in messages)
    assert any(f"going on from step {outcome.resumed_from_step}" in message for message in messages)

    # Checkpoints went away as well, despite the failed push, and another machine goes on from there.
    assert sink.pushed == sorted(sink.pushed) and sink.pushed[-1] >= INTERVAL
    elsewhere = launched_spec(tmp_path / "elsewhere", num_ranks=1)
    elsewhere_outcome = run_training(elsewhere, checkpoints=sink)
    check_complete(elsewhere, elsewhere_outcome)
    assert elsewhere_outcome.resumed_from_step == sink.pushed[-1]
    # What was lost before still counts; nothing was lost in moving.
    assert elsewhere_outcome.num_recomputed_steps == outcome.num_recomputed_steps

    # Done is done: nothing is started again, and another training may not use the folder.
    assert run_training(spec).best_loss == outcome.best_loss
    with pytest.raises(TrainingError, match="result of another training"):
        run_training(launched_spec(spec.work_dir, learning_rate=1e-3))


def test_nothing_outlives_a_killed_launcher_and_the_next_one_goes_on(tmp_path: Path) -> None:
    spec = launched_spec(tmp_path)
    (tmp_path / "given.json").write_text(spec.to_json())
    launcher = subprocess.Popen([sys.executable, "-m", "tests.ml.training.launcher_process", str(tmp_path / "given.json")])
    work = WorkFolder(tmp_path)
    try:
        wait_for(lambda: last_step(read_history(work.history)) > INTERVAL, 120)
        with pytest.raises(TrainingError, match=f"already runs in .* \\(process {launcher.pid}\\)"):
            run_training(spec)
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: processes_of(tmp_path) == [], 15)

    reached = last_step(read_history(work.history))
    checkpoint = step_of_checkpoint(newest_checkpoint(work.checkpoints))
    outcome = run_training(spec)
    check_complete(spec, outcome)
    assert outcome.resumed_from_step == checkpoint > 0
    assert outcome.num_recomputed_steps == reached - checkpoint <= INTERVAL


def test_a_rank_that_hangs_is_replaced(tmp_path: Path) -> None:
    spec = launched_spec(tmp_path, heartbeat_timeout_seconds=6)
    outcome = run_training(spec, once_at(15, lambda: os.kill(rank_pid(tmp_path, 1), signal.SIGSTOP)))
    check_complete(spec, outcome)
    assert outcome.resumed_from_step >= INTERVAL
    messages = messages_of(outcome)
    assert any("rank 1 (stopped" in message and "no sign of life for 6 s" in message for message in messages)


def test_an_error_in_a_rank_is_told_and_not_tried_again(tmp_path: Path) -> None:
    spec = launched_spec(tmp_path, job={"fault": {"do": "raise", "batch": 20, "rank": 1}})
    with pytest.raises(TrainingError, match=r"rank 1 failed: the batch of step \d+ could not be made: ValueError: the toy broke") as caught:
        run_training(spec)
    assert not isinstance(caught.value, WorkerLostError)
    assert not caught.value.retryable
    assert len(list(WorkFolder(tmp_path).attempts.iterdir())) == 1
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_ranks_that_are_lost_too_often_are_given_up(tmp_path: Path) -> None:
    spec = launched_spec(tmp_path, max_restarts=1)

    def kill(record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] % INTERVAL == 5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank_pid(tmp_path, 0), signal.SIGKILL)

    with pytest.raises(WorkerLostError, match=r"rank 0 was killed by signal 9.*Restarted 1 times") as caught:
        run_training(spec, kill)
    assert caught.value.retryable
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_an_exception_in_the_caller_ends_all_ranks(tmp_path: Path) -> None:
    def interrupt(record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(launched_spec(tmp_path), interrupt)
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_a_killed_torchrun_takes_its_ranks_along_and_is_replaced(tmp_path: Path) -> None:
    spec = launched_spec(tmp_path)

    def kill_torchrun() -> None:
        parent = psutil.Process(rank_pid(tmp_path, 0)).parent()
        assert parent is not None
        parent.kill()

    outcome = run_training(spec, once_at(15, kill_torchrun))
    check_complete(spec, outcome)
    assert outcome.resumed_from_step >= INTERVAL


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.1)
