"""Tells people how a training goes: a line in the log every few seconds, and a progress bar on the Prefect run page."""

import logging
import time
from typing import Any

from tasks.progress import ProgressBar

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Called with every line of the training history (see `ml.training.history`)."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._last_line = 0.0
        self._bar = ProgressBar("training", "training steps done, of those planned; it stops earlier when nothing improves any more")

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "event":
            self._num_steps = record.get("num_steps", self._num_steps)
            logger.info("training: %s", record["message"])
        elif record["kind"] == "validation":
            logger.info(
                "training: step %d, validation loss %.4f, accuracy %s", record["step"], record["loss"], _percent(record.get("accuracy"))
            )
            self._move_bar(record)  # the last step ends with one
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share = f" of {self._num_steps}" if self._num_steps else ""
            logger.info("training: step %d%s, loss %.4f, %.0f rows/s", record["step"], share, record["loss"], record["rows_per_second"])
            self._move_bar(record)

    def _move_bar(self, record: dict[str, Any]) -> None:
        if self._num_steps:
            self._bar.show(record["step"], self._num_steps)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"
