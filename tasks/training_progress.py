"""Tells people how a training goes: a line in the log every few seconds, and a progress bar on the Prefect run page."""

import logging
import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Called with every line of the training history (see `ml.training.history`)."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._last_line = 0.0
        self._artifact_id: UUID | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "event":
            self._num_steps = record.get("num_steps", self._num_steps)
            logger.info("training: %s", record["message"])
        elif record["kind"] == "validation":
            logger.info(
                "training: step %d, validation loss %.4f, accuracy %s", record["step"], record["loss"], _percent(record.get("accuracy"))
            )
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        step, total = record["step"], self._num_steps
        share = f" of {total}" if total else ""
        logger.info("training: step %d%s, loss %.4f, %.0f rows/s", step, share, record["loss"], record["rows_per_second"])
        if not total:
            return
        percent = min(100.0, 100.0 * step / total)
        if self._artifact_id is None:
            self._artifact_id = create_progress_artifact(progress=percent, key="training", description="training steps done")  # type: ignore[assignment]
        else:
            update_progress_artifact(artifact_id=self._artifact_id, progress=percent)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"
