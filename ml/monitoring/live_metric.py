"""The primary metric on real requests whose labels came later, against its value on the test split."""

from datetime import datetime

import numpy as np
from pydantic import Field

from ml.artifacts import Interval, Record
from ml.evaluation.bootstrap import metric_intervals
from ml.monitoring.logged import find_predictions, read_feedback
from ml.monitoring.reference import Reference
from ml.solution import Scores
from ml.storage.artifacts import ArtifactStore

NUM_RESAMPLES = 1000


class LiveMetric(Record):
    """The metric on late labels.

    Its interval speaks of the requests that somebody labelled: where people report only wrong answers, it lies too low.
    """

    metric: str
    num_labels: int = Field(description="labels whose answer was logged and given by the champion")
    num_unmatched: int = Field(description="labels whose answer was not: not sampled, of another version, or too long ago")
    value: Interval | None = Field(default=None, description="None with too few labels")
    test_value: float
    limit: float = Field(description="test value less the tolerance; a drop is an interval that lies below it as a whole")

    @property
    def dropped(self) -> bool | None:
        """None with too few labels."""
        return None if self.value is None else self.value.high < self.limit


def measure_live_metric(
    store: ArtifactStore,
    reference: Reference,
    since: datetime,
    until: datetime,
    answered_since: datetime,
    *,
    min_labels: int,
    tolerance_points: float,
) -> LiveMetric | None:
    """Judge the answers that feedback of [since, until) speaks of. None for a model that is no classifier."""
    metric = reference.spec.metrics(reference.splits)[0]
    test_value = reference.version.metrics.get(metric.name)
    labels = reference.splits.labels
    if reference.answers is None or test_value is None or not metric.higher_is_better:
        return None
    name, version = reference.version.name, reference.version.version
    feedback = read_feedback(store, name, since, until)
    predictions = find_predictions(store, name, list(feedback), answered_since, until)
    joined = [
        (told.label, predictions[place].reply)
        for place, told in feedback.items()
        if place in predictions and predictions[place].version == version and told.label in labels
    ]
    value = None
    if len(joined) >= min_labels:
        scores = Scores(
            np.arange(len(joined)),
            {
                "target": np.array([labels.index(label) for label, _ in joined], dtype=np.int64),
                "probabilities": np.array([[reply["probabilities"][label] for label in labels] for _, reply in joined]),
            },
        )
        value = metric_intervals([metric], scores, NUM_RESAMPLES)[metric.name]
    return LiveMetric(
        metric=metric.name,
        num_labels=len(joined),
        num_unmatched=len(feedback) - len(joined),
        value=value,
        test_value=test_value,
        limit=test_value - tolerance_points / 100,
    )
