"""One measuring at a time on a machine, whoever asks: two at once would measure each other."""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml.errors import ServiceError

logger = logging.getLogger(__name__)

WAIT_SECONDS = 3600.0
_POLL_SECONDS = 0.5
_MESSAGE_EVERY_SECONDS = 30.0


@contextmanager
def machine_lock(path: Path | None = None, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the machine for measuring. The lock goes with the process, so none is left behind by a kill.

    Raises:
        ServiceError: somebody else held it all the time.
    """
    path = path or Path(tempfile.gettempdir()) / "millstream-measuring.lock"
    descriptor = _open(path)
    try:
        _acquire(descriptor, path, wait_seconds)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Read-only is enough for a lock, and lets other users of the machine share it."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)


def _acquire(descriptor: int, path: Path, wait_seconds: float) -> None:
    started = time.monotonic()
    next_message = started
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - started
        if waited > wait_seconds:
            raise ServiceError(
                f"another run has been measuring on this machine for {waited:.0f} seconds (lock {path}); "
                "end it or wait for it, then run again: finished stages are reused"
            )
        if time.monotonic() >= next_message:
            logger.info("waiting for another run that is measuring on this machine (lock %s)", path)
            next_message += _MESSAGE_EVERY_SECONDS
        time.sleep(_POLL_SECONDS)
