"""The caller's side of a training: starts the ranks through torchrun, watches them, restarts them, leaves none behind."""

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ml.errors import TrainingError, WorkerLostError
from ml.training.checkpoint_folders import HISTORY_FILE, newest_checkpoint, step_of_checkpoint
from ml.training.folders import AttemptFolder, WorkFolder, read_json
from ml.training.history import HistoryTail, HistoryWriter, Report, rewind
from ml.training.processes import PARENT_VARIABLE, end_group, rank_processes, usable_cores
from ml.training.spec import TrainSpec
from ml.training.uploads import CheckpointSink, CheckpointUploads

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
# Importing torch and building a large model take longer than a step, more so on a busy machine.
START_SECONDS = 300.0
NUM_LOG_LINES_SHOWN = 15

_FAILED_RANK = re.compile(r"^\s*rank\s*:\s*(\d+).*?^\s*exitcode\s*:\s*(-?\d+)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class TrainOutcome:
    """What came of a training.

    Args:
        weights_path: safetensors of the best validation loss, see `checkpoint.load_weights`.
        resumed_from_step: the checkpoint that the last interruption went back to; 0 when there was none.
        num_recomputed_steps: finished steps that were lost with an interruption and done again, over all of them.
        seconds: time spent training, interruptions and start-up not counted.
    """

    history_path: Path
    weights_path: Path
    num_parameters: int
    num_train_rows: int
    num_steps: int
    best_step: int
    best_loss: float
    best_accuracy: float | None
    resumed_from_step: int
    num_recomputed_steps: int
    seconds: float
    plan: dict[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended without a result. `repeats` when trying again would end the same way."""

    message: str
    repeats: bool


def run_training(spec: TrainSpec, report: Report = lambda record: None, checkpoints: CheckpointSink | None = None) -> TrainOutcome:
    """Train in `spec.num_ranks` processes and return when they are done and gone.

    Goes on from the newest checkpoint in the work folder, else from that in `checkpoints`. A training that is done
    already is not done again. However this function ends, and also when its process is killed, no rank lives on.

    Args:
        report: called with each line of the history that is written from now on, in this thread. An exception from it ends the training.
        checkpoints: where to copy each checkpoint to, and to look for one to go on from.

    Raises:
        TrainingError: a rank raised an error, the loss is not finite, or another launcher uses the work folder.
        WorkerLostError: ranks were killed or went silent more than `spec.max_restarts` times.
    """
    work = WorkFolder(spec.work_dir)
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    with _locked(work.lock):
        if read_json(work.result) is None:
            return _train(spec, work, report, checkpoints)
        logger.info("training in %s is done already; keeping its result", work.root)
        _check_is_ours(spec, work)
        return _outcome(work, resumed_from_step=0, num_recomputed_steps=0)


def _train(spec: TrainSpec, work: WorkFolder, report: Report, checkpoints: CheckpointSink | None) -> TrainOutcome:
    launched = time.time()
    work.spec.write_text(spec.to_json(), encoding="utf-8")
    if newest_checkpoint(work.checkpoints) is None and checkpoints is not None:
        checkpoints.pull_latest(work.checkpoints)
    resumed_from_step = num_recomputed_steps = num_restarts = 0
    failure: Failure | None = None
    while True:
        checkpoint = newest_checkpoint(work.checkpoints)
        lost = rewind(work.history, step_of_checkpoint(checkpoint), checkpoint / HISTORY_FILE if checkpoint else None)
        resumed_from_step = step_of_checkpoint(checkpoint)
        num_recomputed_steps += lost
        tail = HistoryTail(work.history, report)
        _note_start(work, failure, resumed_from_step, lost)
        with contextlib.ExitStack() as stack:
            if checkpoints is not None:
                stack.enter_context(CheckpointUploads(work, checkpoints, pushed_step=resumed_from_step))
            failure = _attempt(spec, work, tail, launched)
        if failure is None:
            return _outcome(work, resumed_from_step=resumed_from_step, num_recomputed_steps=num_recomputed_steps)
        if failure.repeats:
            raise TrainingError(failure.message)
        num_restarts += 1
        if num_restarts > spec.max_restarts:
            raise WorkerLostError(
                f"{failure.message}. Restarted {spec.max_restarts} times; run again to go on from the last checkpoint in {work.root}"
            )
        logger.warning("%s; restart %d of %d", failure.message, num_restarts, spec.max_restarts)


def _attempt(spec: TrainSpec, work: WorkFolder, tail: HistoryTail, launched: float) -> Failure | None:
    """One launch of torchrun, watched to its end; None when the training is done."""
    attempt = work.new_attempt()
    with attempt.log.open("wb") as log:
        # In a session of its own, so that a Ctrl-C in the terminal reaches this process alone, which then ends the group.
        leader = subprocess.Popen(
            _command(spec, work, attempt, launched),
            env={**os.environ, **_environment(spec)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        grace_seconds = GRACE_SECONDS
        try:
            silent = _watch(spec, work, attempt, leader, tail)
            # A rank that hangs does not heed TERM.
            grace_seconds = GRACE_SECONDS if silent is None else 0.0
        finally:
            end_group(leader, rank_processes(attempt, spec.num_ranks), grace_seconds)
    tail.poll()
    # torchrun may return 1 after ranks that did all they should: the result alone decides.
    if read_json(work.result) is not None:
        return None
    return silent or _explain(spec, attempt, leader.returncode)


def _watch(spec: TrainSpec, work: WorkFolder, attempt: AttemptFolder, leader: subprocess.Popen, tail: HistoryTail) -> Failure | None:
    """Follow the ranks until the result is there or torchrun has ended (None), or a rank has been silent for too long."""
    started = time.time()
    while leader.poll() is None and not work.result.exists():
        tail.poll()
        for rank in range(spec.num_ranks):
            try:
                last_sign, limit = attempt.rank_beat(rank).stat().st_mtime, spec.heartbeat_timeout_seconds
            except FileNotFoundError:
                last_sign, limit = started, max(START_SECONDS, spec.heartbeat_timeout_seconds)
            if time.time() - last_sign > limit:
                return Failure(f"{_silent_ranks(spec, attempt, rank)} gave no sign of life for {limit:.0f} s and was ended", repeats=False)
        time.sleep(POLL_SECONDS)
    return None


def _silent_ranks(spec: TrainSpec, attempt: AttemptFolder, rank: int) -> str:
    """The rank to blame: one that hangs silences all others, which wait for it. A stopped process gives itself away."""
    for other in range(spec.num_ranks):
        record = read_json(attempt.rank_process(other))
        with contextlib.suppress(psutil.NoSuchProcess):
            if record is not None and psutil.Process(record["pid"]).status() == psutil.STATUS_STOPPED:
                return f"rank {other} (stopped, pid {record['pid']})"
    return f"rank {rank}"


def _explain(spec: TrainSpec, attempt: AttemptFolder, return_code: int) -> Failure:
    """Tell a rank that raised an error from one that was killed. Ranks that only miss another one explain nothing."""
    errors = [error for rank in range(spec.num_ranks) if (error := read_json(attempt.rank_error(rank))) is not None]
    for error in errors:
        if not error["lost_peer"]:
            return Failure(f"rank {error['rank']} failed: {error['message']} (log: {attempt.log})", repeats=True)
    log = attempt.log.read_text(encoding="utf-8", errors="replace")
    killed = [(rank, -int(exit_code)) for rank, exit_code in _FAILED_RANK.findall(log) if int(exit_code) < 0]
    if killed:
        # torchrun ends the other ranks by TERM and lists them too, in any order.
        rank, number = min(killed, key=lambda item: item[1] == signal.SIGTERM)
        return Failure(f"rank {rank} was killed by signal {number} (log: {attempt.log})", repeats=False)
    if errors:
        return Failure(f"rank {errors[0]['rank']} lost another rank: {errors[0]['message']} (log: {attempt.log})", repeats=False)
    tail = "\n".join(log.splitlines()[-NUM_LOG_LINES_SHOWN:])
    return Failure(f"torchrun ended with exit code {return_code} and no rank said why (log: {attempt.log}):\n{tail}", repeats=False)


def _command(spec: TrainSpec, work: WorkFolder, attempt: AttemptFolder, launched: float) -> list[str]:
    return [
        *(sys.executable, "-m", "ml.training.elastic"),
        *("--nnodes", "1", "--nproc-per-node", str(spec.num_ranks), "--max-restarts", "0"),
        # Through files: torchrun's TCP store would listen on every interface.
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", str(attempt.rendezvous), "--rdzv-conf", "store_type=file"),
        *("--rdzv-id", attempt.root.name, "--local-addr", "127.0.0.1"),
        *("-m", "ml.training", "--spec", str(work.spec), "--attempt", str(attempt.root), "--launched", str(launched)),
    ]


def _environment(spec: TrainSpec) -> dict[str, str]:
    return {
        PARENT_VARIABLE: str(os.getpid()),
        # Without it torchrun opens a TCP store of its own beside the file, and hangs after a killed rank.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(max(1, usable_cores() // spec.num_ranks)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _note_start(work: WorkFolder, failure: Failure | None, resumed_from_step: int, num_lost: int) -> None:
    with HistoryWriter(work.history) as history:
        if failure is not None:
            history.event(failure.message)
        if resumed_from_step or num_lost:
            history.event(f"going on from step {resumed_from_step}; {num_lost} steps are done again")


def _check_is_ours(spec: TrainSpec, work: WorkFolder) -> None:
    found = json.loads(work.result.read_bytes())["plan"]["fingerprint"]
    if found != spec.fingerprint:
        raise TrainingError(f"{work.root} holds the result of another training; give this one a folder of its own, or delete that one")


def _outcome(work: WorkFolder, *, resumed_from_step: int, num_recomputed_steps: int) -> TrainOutcome:
    result = json.loads(work.result.read_bytes())
    plan = result.pop("plan")
    return TrainOutcome(
        history_path=work.history,
        weights_path=work.result_weights,
        num_train_rows=plan["num_train_rows"],
        resumed_from_step=resumed_from_step,
        num_recomputed_steps=num_recomputed_steps,
        plan=plan,
        warnings=tuple(plan["warnings"]),
        **result,
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock; the system frees it when this process ends, however it ends."""
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise TrainingError(
                f"another training already runs in {path.parent} (process {file.read().strip() or 'unknown'}); "
                "wait for it to end, or end that process"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
