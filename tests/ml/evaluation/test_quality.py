from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ml.config import EvaluateConfig
from ml.errors import DataError
from ml.evaluation.quality import evaluate_bundle, evaluate_scores, scores_from_frame, scores_to_frame
from ml.solution import Metric, Scores, load_solution
from ml.storage.artifacts import ArtifactStore
from tests.ml.evaluation.records import make_splits, random_scores
from tests.tiny_bundles import WORDS, build_tiny_bundle

CONFIG = EvaluateConfig(max_rows=60, bootstrap_resamples=200)
SPEC = load_solution("sentiment")


@pytest.fixture
def frame() -> pd.DataFrame:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS[2:], size=random.integers(1, 20))) for _ in range(150)]
    return pd.DataFrame({"row_id": [f"r{index}" for index in range(150)], "text": texts, "target": random.integers(0, 2, 150)})


def test_a_bundle_is_scored_and_its_scores_are_stored(artifact_store: ArtifactStore, tmp_path: Path, frame: pd.DataFrame) -> None:
    build_tiny_bundle(tmp_path)
    quality, scores = evaluate_bundle(tmp_path, SPEC, frame, "validation", make_splits(), CONFIG, None, artifact_store)
    assert quality.num_rows == len(scores) == 60
    assert quality.primary_drop_points is None
    assert next(iter(quality.metrics)) == "accuracy"
    accuracy = quality.metrics["accuracy"]
    assert accuracy.value == (scores.columns["probabilities"].argmax(1) == scores.columns["target"]).mean()
    assert accuracy.low < accuracy.value < accuracy.high
    stored = scores_from_frame(artifact_store.get_frame(quality.scores))
    np.testing.assert_array_equal(stored.columns["probabilities"], scores.columns["probabilities"])


def test_all_models_are_judged_on_the_same_rows(artifact_store: ArtifactStore, tmp_path: Path, frame: pd.DataFrame) -> None:
    for seed in (0, 1):
        build_tiny_bundle(tmp_path / str(seed), seed=seed)
    splits = make_splits()
    _, reference = evaluate_bundle(tmp_path / "0", SPEC, frame, "test", splits, CONFIG, None, artifact_store)
    quality, other = evaluate_bundle(tmp_path / "1", SPEC, frame, "test", splits, CONFIG, reference, artifact_store)
    assert list(other.row_ids) == list(reference.row_ids)
    drop = quality.primary_drop_points
    assert drop is not None
    metric = SPEC.metrics(splits)[0]
    assert drop.value == pytest.approx(100 * (metric.compute(reference) - metric.compute(other)))
    assert drop.low <= drop.value <= drop.high


def test_the_baseline_is_judged_on_the_rows_of_the_reference(artifact_store: ArtifactStore) -> None:
    everything = random_scores(400, 0.7, seed=1)
    reference = random_scores(400, 0.9, seed=2).take(np.array([5, 3, 200, 17]))
    quality = evaluate_scores(everything, SPEC, "validation", make_splits(), CONFIG, reference, artifact_store)
    assert quality.num_rows == 4
    stored = scores_from_frame(artifact_store.get_frame(quality.scores))
    assert list(stored.row_ids) == ["row-5", "row-3", "row-200", "row-17"]


def test_the_drop_is_a_loss_also_where_lower_is_better(artifact_store: ArtifactStore) -> None:
    error_rate = Metric(
        "error", lambda scores: float((scores.columns["probabilities"].argmax(1) != scores.columns["target"]).mean()), False
    )
    spec = replace(SPEC, metrics=lambda splits: (error_rate,))
    good, bad = random_scores(2000, 0.9, seed=1), random_scores(2000, 0.7, seed=2)
    quality = evaluate_scores(bad, spec, "validation", make_splits(), CONFIG, good, artifact_store)
    assert quality.primary_drop_points is not None
    assert 15 < quality.primary_drop_points.low < quality.primary_drop_points.high < 25


def test_scores_of_other_rows_are_refused(artifact_store: ArtifactStore) -> None:
    reference = random_scores(50, 0.9, seed=2)
    with pytest.raises(DataError, match=r"10 of 50 validation rows .* row-40"):
        evaluate_scores(reference.take(np.arange(40)), SPEC, "validation", make_splits(), CONFIG, reference, artifact_store)


def test_an_empty_split_is_a_clear_error(artifact_store: ArtifactStore, tmp_path: Path, frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="validation split has no rows"):
        evaluate_bundle(tmp_path, SPEC, frame.head(0), "validation", make_splits(), CONFIG, None, artifact_store)


def test_scores_survive_the_table_with_types_and_shapes() -> None:
    scores = Scores(
        np.array(["a", "b"], dtype=object),
        {
            "target": np.array([1, 0]),
            "probabilities": np.random.default_rng(0).random((2, 12)),
            "one": np.array([[0.5], [0.25]]),
            "rank": np.array([1, 3], dtype=np.int32),
        },
    )
    back = scores_from_frame(scores_to_frame(scores))
    assert list(back.row_ids) == ["a", "b"]
    assert set(back.columns) == set(scores.columns)
    for name, values in scores.columns.items():
        np.testing.assert_array_equal(back.columns[name], values)
        assert back.columns[name].dtype == values.dtype
