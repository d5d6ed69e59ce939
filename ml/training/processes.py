"""Processes that never outlive who started them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil

from ml.training.folders import AttemptFolder, read_json

PARENT_VARIABLE = "MILLSTREAM_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 1.0


def die_with_parent() -> None:
    """Have the system kill this process as soon as its parent is gone, however the parent went.

    The parent is the process named by `MILLSTREAM_PARENT_PID`; if it is gone already, this process ends at once. Children
    that are started from here find this process in the variable.
    """
    parent = int(os.environ[PARENT_VARIABLE])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def end_group(leader: subprocess.Popen, attempt: AttemptFolder, num_ranks: int, grace_seconds: float) -> None:
    """End torchrun and all of its ranks: TERM, then KILL after the grace. Returns when none is left."""
    try:
        if leader.poll() is None and grace_seconds > 0:
            # torchrun passes the signal on to its ranks.
            leader.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                leader.wait(grace_seconds)
    finally:
        # Also when somebody lost patience and pressed Ctrl-C again.
        leader.kill()
        leader.wait()
        ranks = rank_processes(attempt, num_ranks)
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ranks, timeout=10)


def rank_process(attempt: AttemptFolder, rank: int) -> psutil.Process | None:
    """A rank of this machine, if it is alive. A pid that was given to another process since is not taken for it."""
    record = read_json(attempt.rank_process(rank))
    if record is None:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record["pid"])
        if process.create_time() == record["started"] and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def rank_processes(attempt: AttemptFolder, num_ranks: int) -> list[psutil.Process]:
    """The ranks of an attempt that are still alive."""
    return [process for rank in range(num_ranks) if (process := rank_process(attempt, rank)) is not None]


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. A handler that the program has of its own is left in place; so are other threads' signals."""
    asked = threading.Event()
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
