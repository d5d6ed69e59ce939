"""The simple baseline that every fine-tuned model has to beat: TF-IDF of n-grams and logistic regression.

Features, by what the training texts are:
- texts with spaces: word 1- and 2-grams; character 2- to 5-grams inside words beside them while the training texts are
  short in all (on 22 million characters of film reviews they cost eight times as much and gained nothing);
- texts without spaces, such as Chinese: character 1- to 3-grams.
N-grams are hashed, so memory is bounded whatever the vocabulary; the most frequent ones are kept.
"""

import logging
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ml.evaluation.sampling import choose_rows
from ml.solution import BaselineResult, Scores

if TYPE_CHECKING:
    import pandas as pd

    from ml.artifacts import SplitDataset

SparseMatrix = Any  # scipy.sparse's own types do not say which operations give which class

logger = logging.getLogger(__name__)

# 4 was best, or within noise of it, from 350 to 50,000 rows.
REGULARISATION = (0.25, 1.0, 4.0, 16.0, 64.0)
USUAL_REGULARISATION = 4.0
HASH_BUCKETS = 2**20
MAX_CHARACTERS_FOR_CHARACTER_NGRAMS = 8_000_000
MAX_CHARACTERS_WITHOUT_SPACES = 30_000_000
MAX_CHARACTERS = 100_000_000
MAX_COEFFICIENTS = 4_000_000
IMBALANCE_RATIO = 3.0


def train_baseline(frames: "dict[str, pd.DataFrame]", splits: "SplitDataset", seed: int) -> BaselineResult:
    """Fit on `train`, choose the regularisation by accuracy on `validation`, score `validation` and `test`.

    Among values whose validation accuracy is within one standard error of the best, the one nearest the usual one is
    taken: on a few dozen rows the best value is mostly luck.
    Classes are weighted by their inverse frequency when the largest is more than three times the smallest, as in the
    training of the model. Very large training sets are sampled, stratified; `parameters` says how many rows were used.

    Args:
        frames: split name -> `row_id`, `text`, `target`.
        seed: has no effect; nothing is drawn here.

    Returns:
        Scores with `target` (N,) int64 and `probabilities` (N, C) float64, in the order of the frames.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train = _within_budget(frames["train"])
    targets = train["target"].to_numpy(np.int64)
    sizes = np.bincount(targets, minlength=len(splits.labels))
    balanced = sizes.max() > IMBALANCE_RATIO * max(sizes.min(), 1)
    features = _NgramFeatures(train["text"].tolist(), num_outputs=1 if len(splits.labels) == 2 else len(splits.labels))
    inputs = {name: features.transform(frames[name]["text"].tolist()) for name in ("validation", "test")}
    validation_targets = frames["validation"]["target"].to_numpy(np.int64)

    model = LogisticRegression(class_weight="balanced" if balanced else None, max_iter=300)
    candidates: dict[float, tuple[float, dict[str, np.ndarray]]] = {}
    for strength in REGULARISATION:
        model.C = strength
        with warnings.catch_warnings():
            # A solver that stops early on an almost unregularised fit is judged on validation like the others.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features.train, targets)
        probabilities = {name: _all_classes(model, matrix, len(splits.labels)) for name, matrix in inputs.items()}
        accuracy = float((probabilities["validation"].argmax(axis=1) == validation_targets).mean())
        candidates[strength] = (accuracy, probabilities)
    strength = _choose_regularisation({strength: accuracy for strength, (accuracy, _) in candidates.items()}, len(validation_targets))
    accuracy, probabilities = candidates[strength]
    parameters = {
        "model": "TF-IDF + logistic regression",
        "features": features.kinds,
        "num_features": features.train.shape[1],
        "C": strength,
        "class_weight": "balanced" if balanced else "none",
        "num_train_rows": len(train),
        "validation_accuracy": accuracy,
    }
    logger.info("baseline: %s, %d features, C = %g: %.3f on validation", features.kinds, parameters["num_features"], strength, accuracy)
    return BaselineResult(
        validation=_scores(frames["validation"], probabilities["validation"]),
        test=_scores(frames["test"], probabilities["test"]),
        parameters=parameters,
    )


def _choose_regularisation(accuracies: dict[float, float], num_rows: int) -> float:
    best = max(accuracies.values())
    standard_error = math.sqrt(best * (1 - best) / num_rows)
    as_good = [strength for strength, accuracy in accuracies.items() if accuracy >= best - standard_error]
    return min(as_good, key=lambda strength: abs(math.log(strength / USUAL_REGULARISATION)))


class _NgramFeatures:
    """TF-IDF of hashed n-grams, fitted on the training texts; `train` is their matrix."""

    def __init__(self, texts: list[str], num_outputs: int):
        from scipy import sparse
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        settings: dict[str, Any] = {"n_features": HASH_BUCKETS, "alternate_sign": False, "norm": None, "dtype": np.float32}
        words = HashingVectorizer(ngram_range=(1, 2), **settings)
        if not _has_spaces(texts):
            self.kinds = "characters 1-3"
            vectorizers = [HashingVectorizer(analyzer="char", ngram_range=(1, 3), **settings)]
        elif sum(map(len, texts)) > MAX_CHARACTERS_FOR_CHARACTER_NGRAMS:
            self.kinds = "words 1-2"
            vectorizers = [words]
        else:
            self.kinds = "words 1-2, characters 2-5"
            vectorizers = [words, HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), **settings)]
        max_features = MAX_COEFFICIENTS // max(num_outputs, 10) // len(vectorizers)
        self._steps: list[tuple[Any, np.ndarray, Any]] = []
        matrices: list[SparseMatrix] = []
        for vectorizer in vectorizers:
            counts: SparseMatrix = vectorizer.transform(texts)
            columns = _frequent_columns(counts, max_features)
            weights = TfidfTransformer(sublinear_tf=True)
            matrices.append(weights.fit_transform(counts[:, columns]))
            self._steps.append((vectorizer, columns, weights))
        self.train: SparseMatrix = sparse.hstack(matrices, format="csr")

    def transform(self, texts: list[str]) -> SparseMatrix:
        from scipy import sparse

        matrices: list[SparseMatrix] = [
            weights.transform(vectorizer.transform(texts)[:, columns]) for vectorizer, columns, weights in self._steps
        ]
        return sparse.hstack(matrices, format="csr")


def _frequent_columns(counts: SparseMatrix, max_features: int) -> np.ndarray:
    """The columns that occur in most rows, at most `max_features`. Rare ones are kept: they gave .4 points on short reviews."""
    rows_with = counts.getnnz(axis=0)
    columns = np.flatnonzero(rows_with)
    if len(columns) > max_features:
        columns = np.sort(columns[np.argsort(-rows_with[columns], kind="stable")[:max_features]])
    return columns


def _has_spaces(texts: list[str]) -> bool:
    """Whether words are parted by spaces: about every sixth character in English, hardly any in Chinese or Thai."""
    sample = "".join(texts[:: max(1, len(texts) // 1000)])
    return sum(character.isspace() for character in sample) >= 0.05 * len(sample)


def _within_budget(train: "pd.DataFrame") -> "pd.DataFrame":
    texts = train["text"].tolist()
    budget = MAX_CHARACTERS if _has_spaces(texts) else MAX_CHARACTERS_WITHOUT_SPACES
    num_characters = sum(map(len, texts))
    if num_characters <= budget:
        return train
    sampled = choose_rows(train, max(1, int(len(train) * budget / num_characters)))
    logger.warning("baseline: %d of %d training rows are used, to stay within a minute or two", len(sampled), len(train))
    return sampled


def _all_classes(model: Any, matrix: SparseMatrix, num_classes: int) -> np.ndarray:
    """(N, C) float64; a class without a training row has probability 0."""
    probabilities = np.zeros((matrix.shape[0], num_classes), dtype=np.float64)
    probabilities[:, model.classes_] = model.predict_proba(matrix)
    return probabilities


def _scores(frame: "pd.DataFrame", probabilities: np.ndarray) -> Scores:
    return Scores(frame["row_id"].to_numpy(), {"target": frame["target"].to_numpy(np.int64), "probabilities": probabilities})
