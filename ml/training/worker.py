"""One rank from start to end, and what it says when it fails: `-m ml.training.worker`, started by torchrun.

Exit codes: 0 done, 1 error (told in the attempt's folder), 75 asked to end (SIGTERM), after a checkpoint. Not 0, because torchrun
takes that for a training that is done: the torchrun of a machine that goes on starts its ranks again after 75.
"""

from ml.training.processes import die_with_parent

if __name__ == "__main__":
    # Before torch is imported, which takes seconds in which the launcher may die.
    die_with_parent()

import argparse
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ml.errors import MillstreamError, TrainingPreempted
from ml.training.folders import AttemptFolder, WorkFolder, write_json
from ml.training.job import load_job
from ml.training.loop import train
from ml.training.ranks import announce, heartbeat, joined_ranks
from ml.training.spec import TrainSpec

ERROR = 1
PREEMPTED = TrainingPreempted.exit_code


class StopSignal:
    """SIGTERM, as a question that the loop asks before each step: so a step is finished and saved before the process ends.

    Before the first step there is nothing to save, and the signal ends the process at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._heeded = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def __call__(self) -> bool:
        self._heeded = True
        return self._asked

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._heeded:
            os._exit(128 + number)


def main() -> None:
    """Train as this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--attempt", type=Path, required=True)
    parser.add_argument("--launched", type=float, required=True)
    arguments = parser.parse_args()
    spec, attempt = TrainSpec.from_json(arguments.spec.read_bytes()), AttemptFolder(arguments.attempt)
    end_process(run_rank(spec, attempt, arguments.launched, attempt.store if spec.nodes.count == 1 else None))


def run_rank(spec: TrainSpec, attempt: AttemptFolder, launched: float, store_file: Path | None) -> int:
    """Train as the rank that the environment names (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`); the exit code.

    Args:
        launched: unix time, from which the budget counts.
        store_file: see `joined_ranks`.
    """
    stop_signal = StopSignal()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    announce(attempt, local_rank, rank)
    try:
        return 0 if _train(spec, attempt.rank_beat(local_rank), launched, store_file, stop_signal) else PREEMPTED
    except Exception as error:
        traceback.print_exc()
        write_json(attempt.rank_error(local_rank), describe_error(error, rank))
        return ERROR


def end_process(exit_code: int) -> None:
    """At once: the usual way out would wait for other ranks, and the threads of gloo now and then abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def describe_error(error: Exception, rank: int) -> dict[str, str | int | bool]:
    """What the launcher needs: the message, and whether it only says that another rank is gone."""
    message = str(error) if isinstance(error, MillstreamError) else f"{type(error).__name__}: {error}"
    return {"rank": rank, "message": message, "lost_peer": _says_that_a_peer_is_gone(error), "traceback": traceback.format_exc()}


def _says_that_a_peer_is_gone(error: Exception) -> bool:
    # Gloo's errors are plain RuntimeErrors; each names the file of gloo that it comes from.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _train(spec: TrainSpec, beat: Path, launched: float, store_file: Path | None, stop_signal: StopSignal) -> bool:
    """True when the training is done, false when it was asked to end."""
    work = WorkFolder(spec.work_dir)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # On several machines torchrun may start its ranks once more after the last step.
    if work.result.exists():
        return True
    with joined_ranks(spec, store_file) as group:
        if group.is_first:
            work.preempted.unlink(missing_ok=True)
        seconds_left = spec.budget_seconds - (time.time() - launched)
        return train(spec, load_job(spec), group, beat=heartbeat(beat), seconds_left=seconds_left, stop_asked=stop_signal)


if __name__ == "__main__":
    main()
