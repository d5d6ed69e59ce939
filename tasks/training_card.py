"""The live card of a training on the Prefect run page. What it shows is never worth a run: that it cannot be drawn is only logged."""

import logging
import math
from pathlib import Path
from time import monotonic, thread_time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from ml.report.training_card import render_card
from ml.training.meters import read_metrics
from tasks.options import artifact_key

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CARDS = 10.0
# Drawing takes a core for a moment, and a core is what a rank on the same machine has.
MAX_SHARE_OF_TIME = 0.01
MAX_STEPS_KEPT = 600
NUM_FIRST_STEPS_KEPT = 40

Line = dict[str, Any]


class TrainingCard:
    """One Markdown artifact that is changed in place: the server keeps one version of it, however often it is drawn.

    Args:
        name: of the model.
        metrics_dir: where the ranks write their meters; the card does without when there is none.

    Attributes:
        history: what it has been told.
    """

    def __init__(self, name: str, metrics_dir: Path | None):
        self._name = name
        self._metrics_dir = metrics_dir
        self.history = KeptHistory()
        self._id: UUID | None = None
        self._due = monotonic() + SECONDS_BETWEEN_CARDS / 2

    def add(self, line: Line) -> None:
        """Take in a line of the training history, and draw the card when it is time to."""
        self.history.add(line)
        if monotonic() >= self._due:
            self.draw()

    def draw(self) -> None:
        """Draw the card now. The next one waits long enough that drawing takes no more than a percent of a core."""
        start = thread_time()
        try:
            metrics = read_metrics(self._metrics_dir) if self._metrics_dir is not None else {}
            self._show(render_card(self._name, self.history.lines, metrics, num_steps=self.history.num_steps))
        except Exception as error:  # whatever the Prefect client raises when its server is away, or a picture that cannot be drawn
            logger.warning("the card of the training could not be drawn: %s", error)
        self._due = monotonic() + max(SECONDS_BETWEEN_CARDS, (thread_time() - start) / MAX_SHARE_OF_TIME)

    def _show(self, markdown: str) -> None:
        if self._id is None:
            self._id = create_markdown_artifact(  # type: ignore[assignment]
                markdown, key=artifact_key(self._name, "live-training"), description="How the training goes, drawn anew while it runs."
            )
        else:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._id, ArtifactUpdate(data=markdown))


class KeptHistory:
    """The lines of a history, with long ones thinned out: of the steps after the first ones, two become one with their mean loss."""

    def __init__(self) -> None:
        self.num_steps: int | None = None
        self._steps: list[Line] = []
        self._validations: list[Line] = []
        self._poisoned: list[Line] = []

    @property
    def lines(self) -> list[Line]:
        """In order of steps."""
        plan = [] if self.num_steps is None else [{"kind": "event", "message": "plan", "num_steps": self.num_steps}]
        return plan + sorted([*self._steps, *self._validations, *self._poisoned], key=lambda line: line["step"])

    def add(self, line: Line) -> None:
        own = {"step": self._steps, "validation": self._validations, "poisoned": self._poisoned}.get(line["kind"])
        if own is None:
            self.num_steps = line.get("num_steps", self.num_steps)
            return
        # What is done again after an interruption takes the place of what was there. A batch that was poisoned stays one.
        for kept in (self._steps, self._validations):
            while own is not self._poisoned and kept and kept[-1]["step"] >= line["step"] + (kept is not own):
                kept.pop()
        own.append(line)
        if len(self._steps) > MAX_STEPS_KEPT:
            first, rest = self._steps[:NUM_FIRST_STEPS_KEPT], self._steps[NUM_FIRST_STEPS_KEPT:]
            pairs = zip(rest[::2], rest[1::2], strict=False)
            self._steps = first + [late | {"loss": _mean(early["loss"], late["loss"])} for early, late in pairs] + rest[len(rest) & ~1 :]


def _mean(first: float, second: float) -> float:
    return (first + second) / 2 if math.isfinite(first) else first
