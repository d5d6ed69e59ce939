"""Confusion matrices: counted from per-row scores, and made ready for a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from ml.solution import Scores

# A wider matrix is read by nobody; the report then lists what is mistaken for what.
MAX_DRAWN_CLASSES = 12
MAX_LISTED_CONFUSIONS = 15


@dataclass(frozen=True)
class Confusion:
    """One model's confusion matrix with what a reader wants to know of it.

    Args:
        counts: row = true class, column = predicted class.
        shares: each count as a share of its row, 0 for an empty row.
        recalls, precisions: per class in [0, 1]; None where nothing of the class was there, or predicted.
        worst: (true, predicted, count) of the most frequent mistakes.
    """

    model: str
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    recalls: tuple[float | None, ...]
    precisions: tuple[float | None, ...]
    worst: tuple[tuple[str, str, int], ...]

    @property
    def is_drawn(self) -> bool:
        return len(self.labels) <= MAX_DRAWN_CLASSES


def confusion_matrix(scores: Scores, num_classes: int) -> list[list[int]] | None:
    """Counts [true][predicted] of a classifier's scores; None for scores that are not a classifier's."""
    import numpy as np

    if "target" not in scores.columns or "probabilities" not in scores.columns:
        return None
    predicted = scores.columns["probabilities"].argmax(axis=1)
    counts = np.bincount(scores.columns["target"] * num_classes + predicted, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).tolist()


def describe_confusion(model: str, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Confusion:
    """Shares, recalls, precisions and the worst mistakes of one matrix."""
    rows = tuple(tuple(int(count) for count in row) for row in counts)
    row_sums = [sum(row) for row in rows]
    column_sums = [sum(column) for column in zip(*rows, strict=True)]
    mistakes = [
        (labels[true], labels[predicted], count)
        for true, row in enumerate(rows)
        for predicted, count in enumerate(row)
        if true != predicted and count > 0
    ]
    mistakes.sort(key=lambda mistake: -mistake[2])
    return Confusion(
        model=model,
        labels=tuple(labels),
        counts=rows,
        shares=tuple(tuple(count / (total or 1) for count in row) for row, total in zip(rows, row_sums, strict=True)),
        recalls=tuple(rows[index][index] / total if total else None for index, total in enumerate(row_sums)),
        precisions=tuple(rows[index][index] / total if total else None for index, total in enumerate(column_sums)),
        worst=tuple(mistakes[:MAX_LISTED_CONFUSIONS]),
    )
