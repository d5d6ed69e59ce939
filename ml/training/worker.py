"""One rank from start to end, and what it says when it fails."""

import argparse
import os
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from ml.errors import MillstreamError
from ml.training.folders import AttemptFolder, write_json
from ml.training.job import load_job
from ml.training.loop import train
from ml.training.ranks import announce, heartbeat, joined_ranks
from ml.training.spec import TrainSpec


def main() -> None:
    """Train as this rank. On an error, writes it for the launcher and ends with exit code 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--attempt", type=Path, required=True)
    parser.add_argument("--launched", type=float, required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    attempt = AttemptFolder(arguments.attempt)
    announce(attempt, rank)
    try:
        _train(TrainSpec.from_json(arguments.spec.read_bytes()), attempt, rank, arguments.launched)
    except Exception as error:
        traceback.print_exc()
        write_json(attempt.rank_error(rank), describe_error(error, rank))
        # At once: the usual way out would wait for the other ranks.
        os._exit(1)


def describe_error(error: Exception, rank: int) -> dict[str, str | int | bool]:
    """What the launcher needs: the message, and whether it only says that another rank is gone."""
    message = str(error) if isinstance(error, MillstreamError) else f"{type(error).__name__}: {error}"
    return {"rank": rank, "message": message, "lost_peer": _says_that_a_peer_is_gone(error), "traceback": traceback.format_exc()}


def _says_that_a_peer_is_gone(error: Exception) -> bool:
    # Gloo's errors are plain RuntimeErrors; each names the file of gloo that it comes from.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _train(spec: TrainSpec, attempt: AttemptFolder, rank: int, launched: float) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with joined_ranks(attempt) as group:
        job = load_job(spec)
        seconds_left = spec.budget_seconds - (time.time() - launched)
        train(spec, job, group, beat=heartbeat(attempt.rank_beat(rank)), seconds_left=seconds_left)
