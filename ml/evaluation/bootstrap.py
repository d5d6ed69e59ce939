"""Percentile bootstrap intervals (Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13)."""

from collections.abc import Callable, Sequence

import numpy as np

from ml.artifacts import Interval
from ml.solution import Metric, Scores

CONFIDENCE = 0.95


def metric_intervals(metrics: Sequence[Metric], scores: Scores, num_resamples: int, seed: int = 0) -> dict[str, Interval]:
    """Each metric with its 95 % interval over resampled rows. All metrics see the same resamples."""
    resampled = _resample(lambda rows: [metric.compute(rows) for metric in metrics], (scores,), num_resamples, seed)
    return {metric.name: _interval(metric.compute(scores), resampled[:, index]) for index, metric in enumerate(metrics)}


def difference_interval(metric: Metric, first: Scores, second: Scores, num_resamples: int, seed: int = 0) -> Interval:
    """`metric(first) - metric(second)` with its 95 % interval, paired: both see the same resampled rows.

    Raises:
        ValueError: the two were not scored on the same rows in the same order.
    """
    if not np.array_equal(first.row_ids, second.row_ids):
        raise ValueError("a paired difference needs the same rows in the same order on both sides")

    def difference(first_rows: Scores, second_rows: Scores) -> list[float]:
        return [metric.compute(first_rows) - metric.compute(second_rows)]

    resampled = _resample(difference, (first, second), num_resamples, seed)
    return _interval(metric.compute(first) - metric.compute(second), resampled[:, 0])


def median_interval(values: Sequence[float], num_resamples: int, seed: int = 0) -> Interval:
    """The median with its 95 % interval over resampled values."""
    sample = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(sample), (num_resamples, len(sample)))
    return _interval(float(np.median(sample)), np.median(sample[rows], axis=1))


def _resample(compute: Callable[..., list[float]], sides: tuple[Scores, ...], num_resamples: int, seed: int) -> np.ndarray:
    """(num_resamples, values) of `compute` on resamples that all sides share."""
    random = np.random.default_rng(seed)
    num_rows = len(sides[0])
    return np.array([compute(*(side.take(rows) for side in sides)) for rows in random.integers(0, num_rows, (num_resamples, num_rows))])


def _interval(value: float, resampled: np.ndarray) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(value=value, low=float(low), high=float(high))
