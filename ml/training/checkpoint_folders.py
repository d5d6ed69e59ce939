"""Finding and clearing checkpoint folders. Needs no torch, so the launcher can use it."""

import logging
import shutil
from pathlib import Path

from ml.training.folders import read_json, step_of

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
HISTORY_FILE = "history.jsonl"
BEST_FILE = "best.safetensors"
NUM_KEPT = 2


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: every file that its `state.json` lists is there with its size."""
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        if _is_whole(path):
            return path
        logger.warning("%s is damaged (a file is missing or cut off) and is passed over", path)
    return None


def step_of_checkpoint(path: Path | None) -> int:
    """The checkpoint's step; 0 when there is no checkpoint."""
    return _step(path) if path is not None else 0


def prune_checkpoints(folder: Path) -> None:
    """Delete all but the newest `NUM_KEPT`, and what a kill left half-written."""
    for path in sorted(_checkpoints(folder), key=_step, reverse=True)[NUM_KEPT:]:
        shutil.rmtree(path)
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if step_of(path) is not None]


def _step(path: Path) -> int:
    return step_of(path) or 0


def _is_whole(path: Path) -> bool:
    state = read_json(path / STATE_FILE)
    if state is None:
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in state["files"].items())
