"""Starts and stops the supervisor of `make up`."""

import logging
import os
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path

from services.event_log import log_event
from services.health import runs_well
from services.processes import read_process, start_process, stop_process

NAME = "supervisor"
COMMAND = (sys.executable, "-m", "services.supervisor")
STAYS_UP = "stays-up"
REVIVE_SECONDS = 2.0

# What the stack tells its parts. To the supervisor they would mean that somebody else runs these parts.
GIVEN_BY_THE_STACK = (
    "MILLSTREAM_S3_ENDPOINT",
    "MILLSTREAM_S3_ACCESS_KEY",
    "MILLSTREAM_S3_SECRET_KEY",
    "MILLSTREAM_PREDICTOR_URL",
    "MILLSTREAM_BRIDGE_URL",
    "MILLSTREAM_BRIDGE_TOKEN",
    "PREFECT_API_URL",
    "PREFECT_HOME",
)


def start_supervisor(state_dir: Path, *, without: Collection[str] = ()) -> None:
    """Start the supervisor unless it runs.

    Args:
        without: variables of this process that it must not get.

    Raises:
        ServiceError: it cannot be started.
    """
    if not runs_well(NAME, COMMAND, lambda: is_healthy(state_dir), state_dir=state_dir):
        stop_supervisor(state_dir)
        start_process(NAME, COMMAND, state_dir=state_dir, env={"MILLSTREAM_STATE_DIR": str(state_dir.resolve())}, without=without)


def revive_supervisor(state_dir: Path) -> bool:
    """For a part of the stack: start the supervisor again when it died; whether that was so."""
    marker = stays_up_path(state_dir)
    if not marker.exists() or read_process(NAME, state_dir) is not None:
        return False
    given = marker.read_text(encoding="utf-8").split()
    start_supervisor(state_dir, without=[name for name in GIVEN_BY_THE_STACK if name not in given])
    return True


def keep_supervisor_alive(state_dir: Path) -> None:
    """Start a thread that looks after the supervisor: for the one part that does so, since nobody looks after itself."""

    def look_after() -> None:
        while True:
            try:
                if revive_supervisor(state_dir):
                    log_event("supervisor started again")
            except Exception as error:  # such as a full disk, or a race with `down`: the next look may find better
                log_event("supervisor not started again", level=logging.ERROR, error=str(error))
            time.sleep(REVIVE_SECONDS)

    threading.Thread(target=look_after, name="keep-supervisor-alive", daemon=True).start()


def stop_supervisor(state_dir: Path) -> None:
    """End it. Does nothing when there is none."""
    stop_process(NAME, state_dir)


def is_healthy(state_dir: Path) -> bool:
    return read_process(NAME, state_dir) is not None


def stays_up_path(state_dir: Path) -> Path:
    """Exists while the stack is to stay up; holds the names of the variables that its user gave."""
    return state_dir / STAYS_UP


def mark_stays_up(state_dir: Path) -> None:
    stays_up_path(state_dir).write_text("\n".join(name for name in GIVEN_BY_THE_STACK if os.environ.get(name)), encoding="utf-8")
