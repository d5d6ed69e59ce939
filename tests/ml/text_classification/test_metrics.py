import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from ml.solution import Scores
from ml.text_classification import metrics
from ml.text_classification.metrics import classification_metrics
from tests.ml.evaluation.records import make_splits


def scores_of(targets: list[int], predictions: list[int], num_classes: int) -> Scores:
    """Scores whose most probable classes are the predictions."""
    probabilities = np.full((len(targets), num_classes), 0.5 / num_classes)
    probabilities[np.arange(len(targets)), predictions] += 0.5
    return Scores(np.arange(len(targets)).astype(str), {"target": np.array(targets, dtype=np.int64), "probabilities": probabilities})


def compute(scores: Scores, num_classes: int) -> dict[str, float]:
    splits = make_splits([f"class {index}" for index in range(num_classes)], "class 1" if num_classes == 2 else None)
    return {metric.name: metric.compute(scores) for metric in classification_metrics(splits)}


def pairs_of_classes(num_classes: int) -> st.SearchStrategy[tuple[int, list[tuple[int, int]]]]:
    label = st.integers(0, num_classes - 1)
    return st.tuples(st.just(num_classes), st.lists(st.tuples(label, label), min_size=1, max_size=40))


@given(st.integers(2, 5).flatmap(pairs_of_classes))
def test_metrics_equal_those_of_scikit_learn_whatever_classes_are_missing(case: tuple[int, list[tuple[int, int]]]) -> None:
    num_classes, pairs = case
    targets, predictions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = compute(scores_of(targets, predictions, num_classes), num_classes)
    precision, recall, f1, _ = precision_recall_fscore_support(targets, predictions, average="macro", zero_division=0)
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, predictions))
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((precision, recall, f1))
    if num_classes == 2:
        positive = precision_recall_fscore_support(targets, predictions, labels=[1], zero_division=0)
        expected = tuple(values[0] for values in positive[:3])
        assert (found["precision_positive"], found["recall_positive"], found["f1_positive"]) == pytest.approx(expected)


def test_confusion_matrix_has_true_classes_in_rows() -> None:
    targets, predictions = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0]
    assert (metrics.confusion_matrix(scores_of(targets, predictions, 3)) == confusion_matrix(targets, predictions)).all()


def test_a_tie_goes_to_the_first_class_as_argmax_does() -> None:
    tied = Scores(np.array(["a"]), {"target": np.array([0]), "probabilities": np.array([[0.5, 0.5]])})
    assert compute(tied, 2)["accuracy"] == 1.0


def test_accuracy_is_the_primary_metric_and_positive_ones_need_two_classes() -> None:
    two = [metric.name for metric in classification_metrics(make_splits(["no", "yes"], "yes"))]
    assert two == ["accuracy", "precision", "recall", "f1", "precision_positive", "recall_positive", "f1_positive"]
    assert [metric.name for metric in classification_metrics(make_splits(["a", "b", "c"], None))] == two[:4]


def test_the_positive_class_is_the_configured_one() -> None:
    scores = scores_of([0, 0, 0, 1], [0, 0, 1, 1], 2)
    by_name = {metric.name: metric for metric in classification_metrics(make_splits(["no", "yes"], "no"))}
    assert by_name["recall_positive"].compute(scores) == pytest.approx(2 / 3)
    assert by_name["precision_positive"].compute(scores) == 1.0


def test_no_rows_is_an_error_and_not_a_number() -> None:
    with pytest.raises(ValueError, match="no rows"):
        compute(scores_of([], [], 2), 2)
