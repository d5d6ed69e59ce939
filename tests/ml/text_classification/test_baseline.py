import time

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from ml.text_classification import baseline
from ml.text_classification.baseline import train_baseline
from tests.ml.evaluation.records import make_splits

GOOD = ["wonderful", "brilliant", "touching", "masterful", "delightful", "funny"]
BAD = ["dreadful", "tedious", "clumsy", "lifeless", "pointless", "bland"]
STORY = "the film has a plot and some actors who talk in rooms about what they did last year while it rains on the town"
NEUTRAL = STORY.split()


def make_table(num_rows: int, seed: int, *, share_positive: float = 0.5, num_words: int = 20, noise: float = 0.15) -> pd.DataFrame:
    """Texts with one telling word each, which lies in `noise` of the rows."""
    random = np.random.default_rng(seed)
    targets = (random.random(num_rows) < share_positive).astype(np.int64)
    texts = []
    for target in targets:
        words = list(random.choice(NEUTRAL, size=num_words))
        telling = GOOD if target != (random.random() < noise) else BAD
        words.insert(int(random.integers(num_words)), str(random.choice(telling)))
        texts.append(" ".join(words))
    row_ids = [f"{seed}-{index}" for index in range(num_rows)]
    return pd.DataFrame({"row_id": row_ids, "text": texts, "label": targets.astype(str), "target": targets})


def make_frames(num_rows: int, **settings: float) -> dict[str, pd.DataFrame]:
    sizes = {"train": num_rows, "validation": max(20, num_rows // 5), "test": max(50, num_rows // 3)}
    return {name: make_table(size, seed, **settings) for seed, (name, size) in enumerate(sizes.items())}  # type: ignore[arg-type]


def accuracy(scores) -> float:
    return float((scores.columns["probabilities"].argmax(axis=1) == scores.columns["target"]).mean())


def test_probabilities_agree_with_an_unhashed_scikit_learn_pipeline() -> None:
    frames = make_frames(600)
    result = train_baseline(frames, make_splits(), seed=0)
    tfidf = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    model = make_pipeline(tfidf, LogisticRegression(C=result.parameters["C"], max_iter=300))
    model.fit(frames["train"]["text"], frames["train"]["target"])
    for name, scores in (("validation", result.validation), ("test", result.test)):
        np.testing.assert_allclose(scores.columns["probabilities"], model.predict_proba(frames[name]["text"]), atol=1e-4)


def test_it_learns_what_can_be_learned() -> None:
    result = train_baseline(make_frames(1200), make_splits(), seed=0)
    assert accuracy(result.test) > 0.8
    assert result.parameters["features"] == "words 1-2, characters 2-5"
    assert result.parameters["validation_accuracy"] == accuracy(result.validation)


def test_scores_follow_the_order_of_the_tables() -> None:
    frames = make_frames(200)
    result = train_baseline(frames, make_splits(), seed=0)
    for name, scores in (("validation", result.validation), ("test", result.test)):
        assert list(scores.row_ids) == list(frames[name]["row_id"])
        assert (scores.columns["target"] == frames[name]["target"]).all()
        np.testing.assert_allclose(scores.columns["probabilities"].sum(axis=1), 1)


def test_chinese_is_learned_from_characters() -> None:
    random = np.random.default_rng(0)

    def table(num_rows: int, name: str) -> pd.DataFrame:
        targets = random.integers(0, 2, num_rows)
        filler = list("这部电影讲述了一个故事演员在城市里说话天气下雨去年")
        verdicts = ["非常好看" if target else "十分无聊" for target in targets]
        texts = ["".join(random.choice(filler, 12)) + verdict + "".join(random.choice(filler, 8)) for verdict in verdicts]
        return pd.DataFrame({"row_id": [f"{name}{index}" for index in range(num_rows)], "text": texts, "target": targets})

    result = train_baseline({"train": table(200, "a"), "validation": table(50, "b"), "test": table(100, "c")}, make_splits(), seed=0)
    assert result.parameters["features"] == "characters 1-3"
    assert accuracy(result.test) > 0.95


def test_a_rare_class_is_weighted_only_beyond_three_to_one() -> None:
    rare = train_baseline(make_frames(600, share_positive=0.1), make_splits(), seed=0)
    assert rare.parameters["class_weight"] == "balanced"
    predicted = rare.test.columns["probabilities"].argmax(axis=1)
    assert predicted[rare.test.columns["target"] == 1].mean() > 0.5
    assert train_baseline(make_frames(600, share_positive=0.4), make_splits(), seed=0).parameters["class_weight"] == "none"


def test_a_class_without_training_rows_gets_no_probability() -> None:
    splits = make_splits(["negative", "positive", "absent"], None)
    result = train_baseline(make_frames(100), splits, seed=0)
    assert result.test.columns["probabilities"].shape == (50, 3)
    assert (result.test.columns["probabilities"][:, 2] == 0).all()


def test_large_training_sets_are_sampled_and_long_ones_leave_out_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = make_frames(400)
    monkeypatch.setattr(baseline, "MAX_CHARACTERS_FOR_CHARACTER_NGRAMS", 1000)
    monkeypatch.setattr(baseline, "MAX_CHARACTERS", 20_000)
    parameters = train_baseline(frames, make_splits(), seed=0).parameters
    assert parameters["features"] == "words 1-2"
    num_characters = frames["train"]["text"].str.len().sum()
    assert parameters["num_train_rows"] == int(400 * 20_000 / num_characters)


def test_features_are_bounded_to_the_most_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "MAX_COEFFICIENTS", 4000)
    parameters = train_baseline(make_frames(300), make_splits(), seed=0).parameters
    assert parameters["num_features"] == 400


def test_regularisation_is_the_usual_one_unless_validation_clearly_prefers_another() -> None:
    close = {0.25: 0.80, 4.0: 0.79, 64.0: 0.78}
    assert baseline._choose_regularisation(close, num_rows=100) == 4.0
    assert baseline._choose_regularisation(close, num_rows=100_000) == 0.25


def test_the_same_seed_gives_the_same_scores() -> None:
    frames = make_frames(150)
    first, second = (train_baseline(frames, make_splits(), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.test.columns["probabilities"], second.test.columns["probabilities"])


def test_texts_without_any_word_are_scored() -> None:
    frames = make_frames(100)
    frames["test"].loc[0, "text"] = "!"
    assert np.isfinite(train_baseline(frames, make_splits(), seed=0).test.columns["probabilities"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "num_words", "limit_seconds"), [(8_500, 20, 30), (50_000, 230, 180)])
def test_time_is_bounded(num_rows: int, num_words: int, limit_seconds: float) -> None:
    frames = {"train": make_table(num_rows, 0, num_words=num_words), "validation": make_table(2000, 1), "test": make_table(2000, 2)}
    started = time.process_time()
    train_baseline(frames, make_splits(), seed=0)
    assert time.process_time() - started < limit_seconds
