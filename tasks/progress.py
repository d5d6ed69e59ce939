"""A progress bar on the Prefect run page. What it shows is never worth a run: that it cannot be drawn is only logged."""

import logging
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

logger = logging.getLogger(__name__)


class ProgressBar:
    """One bar, drawn when it is first moved; on the page of the task, or of the flow, that moves it first.

    Args:
        key: lower case letters, digits and dashes; the Artifacts page of the UI shows the last bar of each key.
    """

    def __init__(self, key: str, description: str):
        self._key = key
        self._description = description
        self._id: UUID | None = None

    def show(self, done: float, total: float) -> None:
        """Move the bar to `done` of `total`."""
        percent = min(100.0, 100.0 * done / total) if total else 100.0
        try:
            if self._id is None:
                self._id = create_progress_artifact(percent, key=self._key, description=self._description)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._id, percent)
        except Exception as error:  # whatever the Prefect client raises when its server is away
            logger.warning("the progress bar %s could not be drawn: %s", self._key, error)
