"""The caller's side of a training: starts the ranks through torchrun, watches them, restarts them, leaves none behind."""

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml.errors import TrainingError, TrainingPreempted, WorkerLostError
from ml.training.checkpoint_folders import HISTORY_FILE, newest_checkpoint, step_of_checkpoint, verified_checkpoint
from ml.training.folders import AttemptFolder, WorkFolder, read_json
from ml.training.history import HistoryTail, HistoryWriter, Report, read_history, restore_history, resumptions
from ml.training.nodes import Place, find_place, node_of, num_local_ranks, rendezvous_arguments
from ml.training.processes import PARENT_VARIABLE, end_group, heeding_sigterm, usable_cores
from ml.training.refusals import check_spec
from ml.training.spec import TrainSpec
from ml.training.uploads import CheckpointSink, CheckpointUploads
from ml.training.watching import Failure, RankWatch, error_of_a_rank, explain_end

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
# Each look goes through the folders of all machines, which may lie on a file server.
ERROR_POLL_SECONDS = 2.0
# So late a file server may show what another machine wrote.
FILE_SERVER_SECONDS = 60.0
GRACE_SECONDS = 10.0
# What ranks get to finish a step and save a checkpoint when they are asked to end.
STOP_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class TrainOutcome:
    """What came of a training.

    Args:
        weights_path: safetensors of the best validation loss, see `checkpoint.load_weights`.
        resumed_from_step: the checkpoint that the last interruption went back to; 0 when there was none.
        num_poisoned_batches: left out, because loss or gradient were not finite.
        num_recomputed_steps: finished steps that were lost with an interruption and done again, over all interruptions.
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
    best_recall: float | None
    num_poisoned_batches: int
    resumed_from_step: int
    num_recomputed_steps: int
    seconds: float
    plan: dict[str, Any]
    warnings: tuple[str, ...]


def run_training(spec: TrainSpec, report: Report = lambda record: None, checkpoints: CheckpointSink | None = None) -> TrainOutcome:
    """Train in `spec.num_ranks` processes and return when they are done and gone.

    Of several machines each calls this for its own ranks, with the same spec but `nodes.rank`, and the same work folder.

    Goes on from the newest checkpoint in the work folder, else from that in `checkpoints`. A training that is done
    already is not done again. However this function ends, and also when its process is killed, no rank lives on.
    On an exception from `report`, on KeyboardInterrupt and on SIGTERM (unless the program handles that itself) the ranks
    finish their step and save a checkpoint first, if they can in `STOP_GRACE_SECONDS`.

    Args:
        report: called with each line of the history that is written from now on, in this thread. An exception from it ends the training.
        checkpoints: where to copy each checkpoint to, and to look for one to go on from.

    Raises:
        ConfigError: the spec asks for what cannot work here, see `check_spec`.
        TrainingError: a rank raised an error, the loss is not finite, or another launcher uses the work folder.
        TrainingPreempted: SIGTERM came, to this process or to a rank, and the training is not done.
        WorkerLostError: ranks were killed or went silent, or machines were lost, more than `spec.max_restarts` times.
    """
    check_spec(spec)
    work = WorkFolder(spec.work_dir)
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    with _locked(work.lock(node_of(spec))):
        if read_json(work.result) is not None:
            logger.info("training in %s is done already; keeping its result", work.root)
            _check_is_ours(spec, work)
            return outcome_of(work)
        with heeding_sigterm() as stop:
            return _train(spec, work, report, checkpoints, stop)


def describe_launch(spec: TrainSpec) -> dict[str, Any]:
    """The command that `run_training` would start on this machine and what it adds to the environment; nothing is started."""
    place = Place("<this machine's address>", "<its interface>") if spec.nodes.count > 1 else None
    attempts = WorkFolder(spec.work_dir).attempts
    attempt = AttemptFolder((attempts if node_of(spec) is None else attempts / f"node-{node_of(spec)}") / "<n>")
    environment = _environment(spec, place)
    return {
        "command": _command(spec, attempt, time.time(), place),
        "environment": {name: value for name, value in environment.items() if os.environ.get(name) != value},
    }


def _train(spec: TrainSpec, work: WorkFolder, report: Report, checkpoints: CheckpointSink | None, stop: threading.Event) -> TrainOutcome:
    launched = time.time()
    # Of several machines the first one does what is to be done once.
    is_first = spec.nodes.rank == 0
    if is_first:
        work.spec.write_text(spec.to_json(), encoding="utf-8")
        if verified_checkpoint(work.checkpoints) is None and checkpoints is not None:
            checkpoints.pull_latest(work.checkpoints)
    num_restarts = 0
    while True:
        # Every byte is read once, by one machine; the ranks then only look.
        checkpoint = (verified_checkpoint if is_first else newest_checkpoint)(work.checkpoints)
        if is_first and checkpoint is not None:
            restore_history(work.history, step_of_checkpoint(checkpoint), checkpoint / HISTORY_FILE)
        tail = HistoryTail(work.history, report)
        preempted_before = read_json(work.preempted)
        with contextlib.ExitStack() as stack:
            if is_first and checkpoints is not None:
                stack.enter_context(CheckpointUploads(work, checkpoints, pushed_step=step_of_checkpoint(checkpoint)))
            failure = _attempt(spec, work, tail, launched, stop)
        if failure is None:
            return outcome_of(work)
        preempted = read_json(work.preempted)
        if preempted is not None and preempted != preempted_before:
            raise TrainingPreempted(
                f"the training in {work.root} was asked to end ({preempted['why']}) and saved step {preempted['step']}; "
                "run the same again to go on from there, no step is lost"
            )
        if stop.is_set():
            saved = step_of_checkpoint(newest_checkpoint(work.checkpoints))
            raise TrainingPreempted(
                f"the training in {work.root} was asked to end (SIGTERM); its ranks were starting, or took longer than "
                f"{STOP_GRACE_SECONDS:.0f} s for a step and a checkpoint. Run the same again to go on from step {saved}"
            )
        if failure.repeats:
            raise TrainingError(failure.message)
        num_restarts += 1
        if failure.exhausted or num_restarts > spec.max_restarts:
            raise WorkerLostError(
                f"{failure.message}. Restarted {spec.max_restarts} times; run again to go on from the last checkpoint in {work.root}"
            )
        logger.warning("%s; restart %d of %d", failure.message, num_restarts, spec.max_restarts)
        if is_first:
            with HistoryWriter(work.history) as history:
                history.event(failure.message)


def _attempt(spec: TrainSpec, work: WorkFolder, tail: HistoryTail, launched: float, stop: threading.Event) -> Failure | None:
    """One launch of torchrun, watched to its end; None when the training is done."""
    place = find_place(spec.nodes) if spec.nodes.count > 1 else None
    attempt = work.new_attempt(node_of(spec))
    attempt.spec.write_text(spec.to_json(), encoding="utf-8")
    with attempt.log.open("wb") as log:
        # In a session of its own, so that a Ctrl-C in the terminal reaches this process alone, which then ends the group.
        leader = subprocess.Popen(
            _command(spec, attempt, launched, place),
            env=_environment(spec, place),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        grace_seconds = STOP_GRACE_SECONDS
        try:
            failure = _watch(spec, work, attempt, leader, tail, stop)
            if work.result.exists():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    leader.wait(GRACE_SECONDS)
                grace_seconds = GRACE_SECONDS
            elif failure is not None:
                # A rank that hangs does not heed TERM.
                grace_seconds = 0.0
        finally:
            end_group(leader, attempt, num_local_ranks(spec), grace_seconds)
    if leader.returncode == 0 and spec.nodes.count > 1:
        _wait_for_result(work)
    tail.poll()
    # torchrun may return 1 after ranks that did all they should: the result alone decides.
    if read_json(work.result) is not None:
        return None
    return failure or explain_end(spec, work, attempt, leader.returncode)


def _watch(
    spec: TrainSpec, work: WorkFolder, attempt: AttemptFolder, leader: subprocess.Popen, tail: HistoryTail, stop: threading.Event
) -> Failure | None:
    """Follow the ranks until the result is there, torchrun has ended or an end is asked for (None), or something is wrong."""
    watch = RankWatch(spec, attempt)
    errors_looked_for = time.monotonic()
    while leader.poll() is None and not work.result.exists() and not stop.is_set():
        tail.poll()
        failure = watch.look()
        # On one machine torchrun ends by itself; on several it would start a rank that raised an error again.
        if failure is None and spec.nodes.count > 1 and time.monotonic() - errors_looked_for > ERROR_POLL_SECONDS:
            failure, errors_looked_for = error_of_a_rank(work, attempt), time.monotonic()
        if failure is not None:
            return failure
        time.sleep(POLL_SECONDS)
    return None


def _wait_for_result(work: WorkFolder) -> None:
    """The ranks are done, so the first one has written it, maybe on another machine."""
    deadline = time.monotonic() + FILE_SERVER_SECONDS
    while not work.result.exists() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _command(spec: TrainSpec, attempt: AttemptFolder, launched: float, place: Place | None) -> list[str]:
    if place is None:
        meeting = [
            *("--nnodes", "1", "--nproc-per-node", str(spec.num_ranks), "--max-restarts", "0"),
            # Through files: torchrun's TCP store would listen on every interface.
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", str(attempt.rendezvous), "--rdzv-conf", "store_type=file"),
            *("--rdzv-id", attempt.root.name, "--local-addr", "127.0.0.1"),
        ]
    else:
        meeting = rendezvous_arguments(spec, place)
    return [
        *(sys.executable, "-m", "ml.training.elastic", *meeting),
        *("-m", "ml.training.worker", "--spec", str(attempt.spec), "--attempt", str(attempt.root), "--launched", str(launched)),
    ]


def _environment(spec: TrainSpec, place: Place | None) -> dict[str, str]:
    # torchrun takes defaults from PET_ variables, which an operator may have set for the torchrun that it expects here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment |= {
        PARENT_VARIABLE: str(os.getpid()),
        # Without it torchrun opens a TCP store of its own beside the file, and hangs after a killed rank.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Ranks that get TERM finish a step and save; torchrun kills them after this.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(STOP_GRACE_SECONDS)),
        # A rank that waits for one that is gone ends with an error, also on GPUs.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(max(60, int(2 * spec.collective_timeout_seconds))),
        "OMP_NUM_THREADS": str(max(1, usable_cores() // num_local_ranks(spec))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if place is not None:
        environment |= {"GLOO_SOCKET_IFNAME": place.interface, "NCCL_SOCKET_IFNAME": place.interface}
    return environment


def _check_is_ours(spec: TrainSpec, work: WorkFolder) -> None:
    found = json.loads(work.result.read_bytes())["plan"]["fingerprint"]
    if found != spec.fingerprint:
        raise TrainingError(f"{work.root} holds the result of another training; give this one a folder of its own, or delete that one")


def outcome_of(work: WorkFolder) -> TrainOutcome:
    """Of a training that is done."""
    result = json.loads(work.result.read_bytes())
    plan = result.pop("plan")
    resumed_from_step, num_recomputed_steps = resumptions(read_history(work.history))
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
