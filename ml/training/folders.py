"""The layout of a training's work folder. Every path in it is built here.

lock                          held by the one launcher that may use the folder; lock-<node> where several machines train together
spec.json                     what is trained
plan.json                     what was decided from the data and the machine; never changes once written
history.jsonl                 one line per step, validation and event
checkpoints/step-<8 digits>/  complete by construction: renamed into place when whole
best/step-<8 digits>.safetensors   best weights so far; checkpoints hold hard links to them
uploading/step-<n>/           hard links to a checkpoint that is being copied away, so that pruning cannot disturb it
attempts/<n>/                 one launch of torchrun: its spec and log, and per rank of this machine `.json` (pid), `.beat`, `.error.json`
attempts/node-<r>/<n>/        the same of one of several machines
metrics/rank-<n>.jsonl        what the machine did, see `meters`
compiled/                     code that torch.compile made
preempted.json                the training was asked to end and saved this step; gone again once it goes on
result/                       weights.safetensors, and result.json, whose existence means that the training is done
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

_STEP_NAME = re.compile(r"step-(\d+)")


class WorkFolder:
    """Paths below one work folder."""

    def __init__(self, root: Path):
        self.root = root
        self.spec = root / "spec.json"
        self.plan = root / "plan.json"
        self.history = root / "history.jsonl"
        self.checkpoints = root / "checkpoints"
        self.best = root / "best"
        self.uploading = root / "uploading"
        self.attempts = root / "attempts"
        self.metrics = root / "metrics"
        self.compiled_code = root / "compiled"
        self.preempted = root / "preempted.json"
        self.result_weights = root / "result" / "weights.safetensors"
        self.result = root / "result" / "result.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def best_weights(self, step: int) -> Path:
        return self.best / f"step-{step:08d}.safetensors"

    def lock(self, node: int | None) -> Path:
        """
        Args:
            node: of several machines; None where there is one.
        """
        return self.root / ("lock" if node is None else f"lock-{node}")

    def new_attempt(self, node: int | None = None) -> "AttemptFolder":
        attempts = self.attempts if node is None else self.attempts / f"node-{node}"
        numbers = [int(path.name) for path in attempts.glob("*") if path.name.isdigit()]
        folder = attempts / f"{max(numbers, default=0) + 1:04d}"
        folder.mkdir(parents=True)
        return AttemptFolder(folder)


class AttemptFolder:
    """What one launch of torchrun and its ranks leave behind. Ranks are counted within the machine."""

    def __init__(self, root: Path):
        self.root = root
        self.spec = root / "spec.json"
        self.log = root / "torchrun.log"
        self.rendezvous = root / "rendezvous"
        self.store = root / "store"

    def rank_process(self, rank: int) -> Path:
        return self.root / f"rank-{rank}.json"

    def rank_beat(self, rank: int) -> Path:
        return self.root / f"rank-{rank}.beat"

    def rank_error(self, rank: int) -> Path:
        return self.root / f"rank-{rank}.error.json"


def step_of(path: Path) -> int | None:
    """The step in a name like `step-00000050`; None for anything else, such as a folder that is still being written."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file, the new one or none, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def read_json(path: Path) -> Any | None:
    """The file's content, or None when there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def digest_of_file(path: Path) -> str:
    """SHA-256 of its bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    sync_file(path)
