import time

import numpy as np
import pytest
from scipy import stats

from ml.evaluation.bootstrap import difference_interval, median_interval, metric_intervals
from ml.solution import Metric, Scores
from ml.text_classification.metrics import classification_metrics
from tests.ml.evaluation.records import make_splits, random_scores

ACCURACY = Metric("accuracy", lambda scores: float((scores.columns["probabilities"].argmax(1) == scores.columns["target"]).mean()))


def hits(scores: Scores) -> np.ndarray:
    return (scores.columns["probabilities"].argmax(1) == scores.columns["target"]).astype(float)


def test_interval_agrees_with_scipy() -> None:
    scores = random_scores(500, 0.8, seed=1)
    found = metric_intervals([ACCURACY], scores, 4000)["accuracy"]
    expected = stats.bootstrap((hits(scores),), np.mean, n_resamples=4000, method="percentile", rng=7).confidence_interval
    assert found.value == hits(scores).mean()
    # Both are Monte Carlo estimates of the same quantiles; one row of 500 is .002.
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.006)


def test_paired_difference_agrees_with_scipy() -> None:
    first, second = random_scores(500, 0.85, seed=1), random_scores(500, 0.8, seed=2)
    found = difference_interval(ACCURACY, first, second, 4000)
    expected = stats.bootstrap(
        (hits(first), hits(second)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=7,
    ).confidence_interval
    assert found.value == pytest.approx(hits(first).mean() - hits(second).mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.008)


def test_pairing_narrows_the_interval_of_models_that_err_alike() -> None:
    first = random_scores(1000, 0.8, seed=1)
    almost = Scores(first.row_ids, first.columns | {"probabilities": first.columns["probabilities"].copy()})
    almost.columns["probabilities"][:3] = almost.columns["probabilities"][:3, ::-1]
    paired = difference_interval(ACCURACY, first, almost, 500)
    unpaired = difference_interval(ACCURACY, first, random_scores(1000, 0.8, seed=2), 500)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


def test_a_model_does_not_differ_from_itself() -> None:
    scores = random_scores(100, 0.7, seed=3)
    found = difference_interval(ACCURACY, scores, scores, 100)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_other_rows_cannot_be_paired() -> None:
    scores = random_scores(10, 0.7, seed=3)
    with pytest.raises(ValueError, match="same rows"):
        difference_interval(ACCURACY, scores, scores.take(np.arange(10)[::-1]), 100)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    scores = random_scores(300, 0.8, seed=4)
    first, again, other = (metric_intervals([ACCURACY], scores, 200, seed)["accuracy"] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_interval_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    intervals = [metric_intervals([ACCURACY], random_scores(200, 0.8, seed=seed), 200)["accuracy"] for seed in range(200)]
    covered = sum(interval.low <= 0.8 <= interval.high for interval in intervals)
    # Binomial(200, .95) lies within 180 to 198 in all but one case in a thousand; the percentile method covers a little less.
    assert 178 <= covered <= 199


def test_median_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).lognormal(size=201)
    found = median_interval(list(values), 5000)
    expected = stats.bootstrap((values,), np.median, n_resamples=5000, method="percentile", rng=7).confidence_interval
    assert found.value == np.median(values)
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=0.03)


def test_thousand_resamples_of_all_metrics_take_seconds_at_most() -> None:
    started = time.process_time()
    metric_intervals(classification_metrics(make_splits()), random_scores(2000, 0.8, seed=5), 1000)
    assert time.process_time() - started < 5
