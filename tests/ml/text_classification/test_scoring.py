import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ml.predictor import Predictor, load_predictor
from ml.text_classification import scoring
from ml.text_classification.scoring import score_texts
from tests.tiny_bundles import WORDS, build_tiny_bundle


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("bundle")
    build_tiny_bundle(folder)
    return load_predictor(folder)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS[2:], size=random.integers(1, 30))) for _ in range(101)]
    return pd.DataFrame({"row_id": [f"r{index}" for index in range(101)], "text": texts, "target": random.integers(0, 2, 101)})


def test_rows_keep_their_order_and_equal_what_a_lone_request_gets(predictor: Predictor, frame: pd.DataFrame) -> None:
    scores = score_texts(predictor, frame)
    assert list(scores.row_ids) == list(frame["row_id"])
    assert (scores.columns["target"] == frame["target"]).all()
    alone = [predictor.predict([{"text": text}])[0]["probabilities"]["positive"] for text in frame["text"]]
    np.testing.assert_allclose(scores.columns["probabilities"][:, 1], alone, atol=1e-6)


def test_types_and_shapes_are_as_promised(predictor: Predictor, frame: pd.DataFrame) -> None:
    columns = score_texts(predictor, frame).columns
    assert columns["target"].dtype == np.int64
    assert columns["probabilities"].dtype == np.float64
    assert columns["probabilities"].shape == (101, 2)
    np.testing.assert_allclose(columns["probabilities"].sum(axis=1), 1)


def test_texts_of_like_length_share_a_batch(predictor: Predictor, frame: pd.DataFrame) -> None:
    batches: list[list[int]] = []

    class Watching(Predictor):
        def outputs(self, requests):
            batches.append([len(request["text"]) for request in requests])
            return super().outputs(requests)

    score_texts(Watching(predictor.bundle, predictor.codec, predictor.run_graph), frame)
    assert [len(batch) for batch in batches] == [32, 32, 32, 5]
    assert all(max(first) <= min(second) for first, second in itertools.pairwise(batches))


def test_long_work_reports_progress(
    predictor: Predictor, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scoring, "PROGRESS_EVERY_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        score_texts(predictor, frame)
    assert re.search(r"scored \d+ of 101 rows", caplog.text)


def test_another_kind_of_model_is_refused(predictor: Predictor, frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="text classifier"):
        score_texts(Predictor(predictor.bundle, object(), predictor.run_graph), frame)  # type: ignore[arg-type]
