"""Tells people how a training goes: a line in the log every few seconds, a progress bar and a live card on the Prefect run page."""

import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ml.training.folders import WorkFolder
from ml.training.meters import read_metrics
from ml.training_metrics import write_textfile
from tasks.progress import ProgressBar
from tasks.training_card import TrainingCard

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Called with every line of the training history (see `ml.training.history`). Use as a context manager.

    Args:
        name: of the model.
        work_dir: of the training, where the ranks' meters lie.
        prometheus_dir: gets `training-<name>.prom` while the training runs, for node_exporter's textfile collector.
    """

    def __init__(self, name: str, work_dir: Path, prometheus_dir: Path) -> None:
        self._name = name
        self._metrics = WorkFolder(work_dir).metrics
        self._prometheus = prometheus_dir / f"training-{name}.prom"
        self._prometheus_due = 0.0
        self._card = TrainingCard(name, self._metrics)
        self._num_steps = 0
        self._last_line = 0.0
        self._bar = ProgressBar("training", "training steps done, of those planned; it stops earlier when nothing improves any more")

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "event":
            self._num_steps = record.get("num_steps", self._num_steps)
            logger.info("training: %s", record["message"])
        elif record["kind"] in ("poisoned", "resumed"):
            logger.warning("training: %s", record["message"])
        elif record["kind"] == "validation":
            loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
            logger.info("training: step %d, validation loss %s, accuracy %s", record["step"], loss, _percent(record.get("accuracy")))
            self._move_bar(record)  # the last step ends with one
        elif record["kind"] == "step" and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share = f" of {self._num_steps}" if self._num_steps else ""
            logger.info("training: step %d%s, loss %.4f, %.0f rows/s", record["step"], share, record["loss"], record["rows_per_second"])
            self._move_bar(record)
        self._card.add(record)
        self._write_prometheus()

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Draw the card once more, with the end of the training on it; figures of what is over are not figures of now."""
        self._card.draw()
        self._prometheus.unlink(missing_ok=True)

    def _write_prometheus(self) -> None:
        if time.monotonic() < self._prometheus_due:
            return
        self._prometheus_due = time.monotonic() + SECONDS_BETWEEN_LINES
        try:
            write_textfile(self._prometheus, self._name, self._card.history.lines, read_metrics(self._metrics))
        except OSError as error:
            logger.warning("the figures for Prometheus could not be written: %s", error)

    def _move_bar(self, record: dict[str, Any]) -> None:
        if self._num_steps:
            self._bar.show(record["step"], self._num_steps)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"
