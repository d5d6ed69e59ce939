"""Confusion matrices from scores, against scikit-learn, and what the page says of them."""

import numpy as np
import pytest

from ml.report.confusion import MAX_LISTED_CONFUSIONS, confusion_matrix, describe_confusion
from ml.solution import Scores


def test_counts_equal_those_of_scikit_learn():
    from sklearn.metrics import confusion_matrix as reference

    rng = np.random.default_rng(3)
    target = rng.integers(0, 5, 400)
    probabilities = rng.dirichlet(np.ones(5), 400)
    scores = Scores(np.arange(400), {"target": target, "probabilities": probabilities})
    assert confusion_matrix(scores, 5) == reference(target, probabilities.argmax(axis=1), labels=range(5)).tolist()


def test_classes_that_no_row_has_are_still_there():
    scores = Scores(np.arange(2), {"target": np.array([0, 0]), "probabilities": np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])})
    assert confusion_matrix(scores, 3) == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_scores_of_another_kind_have_no_matrix():
    assert confusion_matrix(Scores(np.arange(2), {"rank": np.array([1, 3])}), 2) is None


def test_recall_goes_by_rows_and_precision_by_columns():
    confusion = describe_confusion("model", [[8, 2], [0, 0]], ("a", "b"))
    assert confusion.recalls == (pytest.approx(0.8), None)
    assert confusion.precisions == (pytest.approx(1.0), pytest.approx(0.0))
    assert confusion.shares[0] == (pytest.approx(0.8), pytest.approx(0.2))
    assert confusion.worst == (("a", "b", 2),)


def test_many_classes_are_listed_instead_of_drawn():
    size = 40
    counts = np.full((size, size), 1) + np.diag(np.full(size, 50))
    counts[3, 7] = 30
    confusion = describe_confusion("model", counts.tolist(), [f"class {index}" for index in range(size)])
    assert not confusion.is_drawn
    assert confusion.worst[0] == ("class 3", "class 7", 30)
    assert len(confusion.worst) == MAX_LISTED_CONFUSIONS
