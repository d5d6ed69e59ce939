"""What may go from the state folder of one machine: copies of runs, work folders, scratch folders, long logs.

The stored data, the databases and the credentials of the embedded services lie in the same folder and are never touched.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path

from ml.retention import CleanUpReport, CleanUpRequest, Garbage, sum_up


def clean_local_state(state_dir: Path, request: CleanUpRequest, run_ids: Set[str]) -> CleanUpReport:
    """Delete what has had its time, unless it is a dry run.

    Args:
        run_ids: runs that the object store keeps; their local copies stay.
    """
    now = time.time()
    garbage: list[Garbage] = []

    def go(kind: str, path: Path, size_bytes: int, reason: str, delete: Callable[[], object]) -> None:
        if not request.dry_run:
            delete()
        garbage.append(Garbage(kind, str(path.relative_to(state_dir)), size_bytes, reason))

    latest = (state_dir / "runs" / "latest").resolve().name
    for kind, parent in (("local run", "runs"), ("training folder", "training"), ("scratch folder", "scratch")):
        for folder in _folders(state_dir / parent):
            if (kind == "local run" and (folder.name in run_ids or folder.name == latest)) or _is_locked(folder / "lock"):
                continue
            size_bytes, changed = _measure(folder)
            if now - changed > request.grace.total_seconds():
                reason = "its run is gone from the store" if kind == "local run" else "left behind by a run that was given up"
                go(kind, folder, size_bytes, reason, lambda folder=folder: shutil.rmtree(folder, ignore_errors=True))

    limit = int(request.log_megabytes * 10**6)
    for path in sorted((state_dir / "logs").glob("*.log*")):
        status = path.stat()
        # Turned over, and not written to any more.
        if path.suffix != ".log" and now - status.st_mtime > request.keep_run_days * 86_400:
            go("log", path, status.st_size, f"older than {request.keep_run_days:g} days", path.unlink)
        elif status.st_size > limit:
            reason = f"beyond the last {request.log_megabytes:g} MB"
            go("log", path, status.st_size - limit, reason, lambda path=path: keep_end(path, limit))
    return sum_up(garbage, dry_run=request.dry_run)


def keep_end(path: Path, num_bytes: int) -> None:
    """Shorten a log to its last lines, in place: a process that has it open for appending writes on at its new end.

    A line that is written at this very moment may be lost.
    """
    with path.open("r+b") as file:
        file.seek(-num_bytes, os.SEEK_END)
        end = file.read()
        file.seek(0)
        file.write(end[end.find(b"\n") + 1 :])
        file.truncate()


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes in a folder, and when anything in it changed last (seconds since 1970)."""
    size_bytes, changed = 0, folder.stat().st_mtime
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        changed = max(changed, status.st_mtime)
        size_bytes += status.st_size if path.is_file() else 0
    return size_bytes, changed


def _is_locked(path: Path) -> bool:
    """Whether a living process holds the file's lock (see ml.training.folders)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
