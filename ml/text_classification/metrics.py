"""Metrics of a classifier, computed from the confusion matrix so that a bootstrap of them stays fast.

Precision, recall and F1 are macro averages: each class counts the same, however rare. F1 is the harmonic mean of
precision and recall of a class, averaged over classes; it has nothing to do with accuracy. As in scikit-learn with
`zero_division=0`, a ratio without a denominator is 0, and a class that neither occurs nor is predicted is left out
of the average.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ml.solution import Metric, Scores

if TYPE_CHECKING:
    from ml.artifacts import SplitDataset


def classification_metrics(splits: "SplitDataset") -> tuple[Metric, ...]:
    """accuracy (the primary one), precision, recall and f1 (macro); for two classes also those of the positive class.

    Each metric reads the columns `target` (N,) and `probabilities` (N, C); the predicted class is the most probable,
    the first of them on a tie. Values lie in [0, 1]. Without rows a metric raises ValueError.
    """
    confusion_of = _remember_last(confusion_matrix)

    def metric(name: str, compute: Callable[[np.ndarray], float]) -> Metric:
        return Metric(name, lambda scores: compute(confusion_of(scores)))

    metrics = [
        metric("accuracy", lambda confusion: float(np.trace(confusion) / confusion.sum())),
        metric("precision", lambda confusion: _macro(confusion, 0)),
        metric("recall", lambda confusion: _macro(confusion, 1)),
        metric("f1", lambda confusion: _macro(confusion, 2)),
    ]
    if len(splits.labels) == 2 and splits.positive_label is not None:
        positive = splits.labels.index(splits.positive_label)
        metrics += [
            metric("precision_positive", lambda confusion: float(_per_class(confusion)[0][positive])),
            metric("recall_positive", lambda confusion: float(_per_class(confusion)[1][positive])),
            metric("f1_positive", lambda confusion: float(_per_class(confusion)[2][positive])),
        ]
    return tuple(metrics)


def confusion_matrix(scores: Scores) -> np.ndarray:
    """(C, C) int64 counts: rows are the true class, columns the predicted one.

    Raises:
        ValueError: there are no rows.
    """
    if len(scores) == 0:
        raise ValueError("metrics of no rows do not exist; score at least one row")
    probabilities = scores.columns["probabilities"]
    num_classes = probabilities.shape[1]
    # Comparing two columns takes half the time of argmax, and a bootstrap does it a thousand times.
    predicted = probabilities[:, 1] > probabilities[:, 0] if num_classes == 2 else probabilities.argmax(axis=1)
    counts = np.bincount(scores.columns["target"] * num_classes + predicted, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def _remember_last(compute: Callable[[Scores], np.ndarray]) -> Callable[[Scores], np.ndarray]:
    """All metrics of one bootstrap resample read one matrix, so it is computed once and not once per metric."""
    last: tuple[Scores, np.ndarray] | None = None

    def remembered(scores: Scores) -> np.ndarray:
        nonlocal last
        found = last
        if found is None or found[0] is not scores:
            found = last = (scores, compute(scores))
        return found[1]

    return remembered


def _per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, each (C,)."""
    hits = np.diagonal(confusion)
    num_predicted = confusion.sum(axis=0)
    num_true = confusion.sum(axis=1)
    return _ratio(hits, num_predicted), _ratio(hits, num_true), _ratio(2 * hits, num_predicted + num_true)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return numerator / np.maximum(denominator, 1)


def _macro(confusion: np.ndarray, kind: int) -> float:
    present = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    return float(_per_class(confusion)[kind][present].mean())
