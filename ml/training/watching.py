"""How the launcher sees that its ranks are alive, and finds out why they ended."""

import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ml.training.folders import AttemptFolder, WorkFolder, read_json
from ml.training.nodes import join_seconds, num_local_ranks
from ml.training.processes import rank_process
from ml.training.spec import TrainSpec

# Importing torch and building a large model take longer than a step, more so on a busy machine.
START_SECONDS = 300.0
NUM_LOG_LINES_SHOWN = 15

_FAILED_RANK = re.compile(r"^\s*rank\s*:\s*(\d+).*?^\s*exitcode\s*:\s*(-?\d+)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended without a result.

    Args:
        repeats: trying again would end the same way.
        exhausted: torchrun tried again itself, as often as it may.
    """

    message: str
    repeats: bool = False
    exhausted: bool = False


class RankWatch:
    """Signs of life of this machine's ranks. The files' clock may be that of a file server: only its changes count."""

    def __init__(self, spec: TrainSpec, attempt: AttemptFolder):
        self._spec = spec
        self._attempt = attempt
        self._seen: dict[int, tuple[tuple[float, float], float]] = {}

    def look(self) -> Failure | None:
        """Who has been silent for too long."""
        now = time.monotonic()
        for rank in range(num_local_ranks(self._spec)):
            signs = (_modified(self._attempt.rank_process(rank)), _modified(self._attempt.rank_beat(rank)))
            if rank not in self._seen or self._seen[rank][0] != signs:
                self._seen[rank] = (signs, now)
            limit = self._limit(rank, has_beaten=signs[1] > 0)
            if now - self._seen[rank][1] > limit:
                return Failure(f"{self._whom_to_blame(rank)} gave no sign of life for {limit:.0f} s and was ended")
        return None

    def _limit(self, rank: int, *, has_beaten: bool) -> float:
        spec = self._spec
        several = spec.nodes.count > 1
        if has_beaten and not (several and rank_process(self._attempt, rank) is None):
            return spec.heartbeat_timeout_seconds
        # Of several machines, torchrun waits for the others before it starts the ranks, at first and after one was lost.
        return max(START_SECONDS, spec.heartbeat_timeout_seconds) + (join_seconds() if several else 0.0)

    def _whom_to_blame(self, rank: int) -> str:
        """One that hangs silences all others, which wait for it. A stopped process gives itself away."""
        for other in range(num_local_ranks(self._spec)):
            process = rank_process(self._attempt, other)
            if process is not None and process.status() == psutil.STATUS_STOPPED:
                return f"rank {_global_rank(self._attempt, other)} (stopped, pid {process.pid})"
        return f"rank {_global_rank(self._attempt, rank)}"


def error_of_a_rank(work: WorkFolder, attempt: AttemptFolder) -> Failure | None:
    """An error that a rank of any machine raised since this attempt began, and that is not just the loss of another rank."""
    begun = attempt.spec.stat().st_mtime
    for path in sorted([*attempt.root.glob("rank-*.error.json"), *work.attempts.glob("node-*/*/rank-*.error.json")]):
        if path.stat().st_mtime < begun:
            continue
        error = read_json(path)
        if error is not None and not error["lost_peer"]:
            return Failure(f"rank {error['rank']} failed: {error['message']} (log: {path.parent / attempt.log.name})", repeats=True)
    return None


def explain_end(spec: TrainSpec, work: WorkFolder, attempt: AttemptFolder, return_code: int) -> Failure:
    """Tell a rank that raised an error from one that was killed. Ranks that only miss another one explain nothing."""
    raised = error_of_a_rank(work, attempt)
    if raised is not None:
        return raised
    several = spec.nodes.count > 1
    log = attempt.log.read_text(encoding="utf-8", errors="replace")
    killed = [(rank, -int(exit_code)) for rank, exit_code in _FAILED_RANK.findall(log) if int(exit_code) < 0]
    if killed:
        # torchrun ends the other ranks by TERM and lists them too, in any order.
        rank, number = min(killed, key=lambda item: item[1] == signal.SIGTERM)
        return Failure(f"rank {rank} was killed by signal {number} (log: {attempt.log})", exhausted=several)
    if several:
        return _explain_meeting(spec, attempt, log, return_code)
    errors = [error for rank in range(spec.num_ranks) if (error := read_json(attempt.rank_error(rank))) is not None]
    if errors:
        return Failure(f"rank {errors[0]['rank']} lost another rank: {errors[0]['message']} (log: {attempt.log})")
    return Failure(f"torchrun ended with exit code {return_code} and no rank said why (log: {attempt.log}):\n{_end_of(log)}")


def _explain_meeting(spec: TrainSpec, attempt: AttemptFolder, log: str, return_code: int) -> Failure:
    """Why torchrun ended, of several machines, when no rank of this one was killed."""
    nodes = spec.nodes
    wanted = nodes.min_count or nodes.count
    where = f"{nodes.master_addr}:{nodes.master_port}"
    if "RendezvousTimeoutError" in log:
        message = f"of {wanted} machines not all came to {where} within {join_seconds()} s"
        return Failure(f"{message}; start the launcher on each (log: {attempt.log})", exhausted=True)
    if "RendezvousConnectionError" in log:
        met = any(attempt.rank_process(rank).exists() for rank in range(num_local_ranks(spec)))
        what = "was lost" if met else f"did not answer within {join_seconds()} s"
        advice = "" if met else "; start its launcher, and see that the port is free and not filtered"
        return Failure(f"node 0 at {where} {what}{advice} (log: {attempt.log})", exhausted=not met)
    if "RendezvousClosedError" in log:
        return Failure(f"another machine gave up, see its log (log of this one: {attempt.log})", exhausted=True)
    errors = [error for rank in range(num_local_ranks(spec)) if (error := read_json(attempt.rank_error(rank))) is not None]
    if errors:
        return Failure(f"rank {errors[0]['rank']} lost another rank: {errors[0]['message']} (log: {attempt.log})", exhausted=True)
    return Failure(f"torchrun ended with exit code {return_code} and no rank said why (log: {attempt.log}):\n{_end_of(log)}")


def _end_of(log: str) -> str:
    return "\n".join(log.splitlines()[-NUM_LOG_LINES_SHOWN:])


def _global_rank(attempt: AttemptFolder, rank: int) -> int:
    record = read_json(attempt.rank_process(rank))
    return rank if record is None else record["rank"]


def _modified(path: Path) -> float:
    """When the file changed last (unix time); 0 where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
