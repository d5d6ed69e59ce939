"""Copies committed checkpoints away while training goes on."""

import logging
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ml.errors import TrainingError
from ml.training.checkpoint_folders import find_damage, newest_checkpoint, step_of_checkpoint
from ml.training.folders import WorkFolder

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
FINISH_SECONDS = 60.0


class CheckpointSink(Protocol):
    """Where checkpoints outlive the machine (`ml.solution.CheckpointStore` in the pipeline)."""

    def push(self, step: int, folder: Path) -> None:
        """Copy a whole checkpoint folder."""
        ...

    def pull_latest(self, destination: Path) -> int | None:
        """Copy the newest whole checkpoint to `destination/step-<n>`; its step, or None when there is none."""
        ...


class CheckpointUploads:
    """A thread that pushes the newest checkpoint whenever there is a new one and the last push is done.

    A failed push is logged and made good by that of the next checkpoint. A checkpoint whose bytes are not those that were
    written is not pushed. At the end, a training that is not done pushes its last one: its machine may be about to go.
    """

    def __init__(self, work: WorkFolder, sink: CheckpointSink, *, pushed_step: int):
        self._work = work
        self._sink = sink
        self._pushed_step = pushed_step
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint-uploads", daemon=True)

    def __enter__(self) -> "CheckpointUploads":
        shutil.rmtree(self._work.uploading, ignore_errors=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning("the last checkpoint was still being copied after %.0f s; not waiting for it", FINISH_SECONDS)

    def _run(self) -> None:
        while not self._ending.wait(POLL_SECONDS):
            self._push_newest()
        if not self._work.result.exists():
            self._push_newest()

    def _push_newest(self) -> None:
        newest = newest_checkpoint(self._work.checkpoints)
        if newest is not None and step_of_checkpoint(newest) > self._pushed_step:
            self._push(newest)

    def _push(self, checkpoint: Path) -> None:
        step = step_of_checkpoint(checkpoint)
        copy = self._work.uploading / checkpoint.name
        try:
            # Links, because training deletes its older checkpoints when it likes.
            shutil.copytree(checkpoint, copy, copy_function=os.link)
            if damage := find_damage(copy):
                raise TrainingError(f"its copy here is damaged: {damage}")
            self._sink.push(step, copy)
        except Exception as error:
            # Whatever went wrong there, training here goes on.
            logger.warning("checkpoint of step %d could not be copied away (%s); trying again with the next", step, error)
        self._pushed_step = step
        shutil.rmtree(copy, ignore_errors=True)
