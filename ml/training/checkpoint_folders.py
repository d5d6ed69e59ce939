"""Finding, checking and clearing checkpoint folders. Needs no torch, so the launcher can use it.

`state.json` is written last and lists every other file with its size and SHA-256. A folder gets its name when it is whole, so
only what happens afterwards (a disk that lost bytes, a copy that was cut off) can make one that is not.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ml.training.folders import digest_of_file, step_of

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
HISTORY_FILE = "history.jsonl"
BEST_FILE = "best.safetensors"

WRITING_PREFIX = ".writing-"
REPLACED_PREFIX = ".replaced-"
DAMAGED_PREFIX = "damaged-"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint by a quick look: every file that its `state.json` lists is there with its size."""
    for path in _newest_first(folder):
        damage = find_damage(path, read_bytes=False)
        if damage is None:
            return path
        logger.warning("%s is damaged (%s) and is passed over", path, damage)
    return None


def verified_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose bytes are those that were written: what a training is resumed from.

    Damaged ones are renamed to `damaged-step-<n>`, so that every rank, which only looks quickly, finds the same. Reads every
    byte of what it returns.
    """
    for path in _newest_first(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        aside = path.with_name(f"{DAMAGED_PREFIX}{path.name}")
        logger.warning("%s is damaged (%s) and is passed over; it is kept as %s until the next checkpoint", path, damage, aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return None


def find_damage(checkpoint: Path, *, read_bytes: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when it is whole.

    Args:
        read_bytes: compare digests too, not only sizes.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((checkpoint / STATE_FILE).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} cannot be read: {error}"
    for name, expected in files.items():
        path = checkpoint / name
        try:
            num_bytes = path.stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if not isinstance(expected, dict):
            continue  # an older format, which whoever reads it refuses by its number
        if num_bytes != expected["bytes"]:
            return f"{name} has {num_bytes} bytes, not {expected['bytes']}"
        if read_bytes and digest_of_file(path) != expected["sha256"]:
            return f"{name} has other bytes than were written, its SHA-256 differs"
    return None


def step_of_checkpoint(path: Path | None) -> int:
    """The checkpoint's step; 0 when there is no checkpoint."""
    return _step(path) if path is not None else 0


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last`, and what a kill left half-written or damage set aside."""
    for path in _newest_first(folder)[keep_last:]:
        shutil.rmtree(path)
    for prefix in (WRITING_PREFIX, REPLACED_PREFIX, DAMAGED_PREFIX):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path)


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if step_of(path) is not None), key=_step, reverse=True)


def _step(path: Path) -> int:
    return step_of(path) or 0
