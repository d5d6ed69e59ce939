"""Statistics of the training rows for the report, as plain JSON."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ml.data.words import words_of

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_WORDS = 15
MAX_ROWS = 20_000
MIN_WORD_ROWS = 3
EXAMPLE_CHARACTERS = 160


def summarize(train: "pd.DataFrame", labels: list[str]) -> dict[str, Any]:
    """Lengths, telling words of each class, and one example of each.

    Args:
        train: `text` and `label`; of large tables the first 20,000 rows by row id, which is a random choice.

    Returns:
        `length_characters` and `length_words`: quantile -> value. `telling_words`: class -> words, most telling first,
        by the smoothed log odds of the rows that hold them. `examples`: class -> the start of one text.
    """
    rows = train.head(MAX_ROWS)
    words = [words_of(text) for text in rows["text"]]
    return {
        "num_rows_looked_at": len(rows),
        "length_characters": _quantiles([len(text) for text in rows["text"]]),
        "length_words": _quantiles([len(found) for found in words]),
        "telling_words": _telling_words(words, rows["label"].tolist(), labels),
        "examples": {label: _example(rows, label) for label in labels},
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    return {f"{quantile:.0%}": int(value) for quantile, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def _telling_words(words: list[list[str]], row_labels: list[str], labels: list[str]) -> dict[str, list[str]]:
    """Words by log((a + 1) / (n - a + 1)) - log((b + 1) / (m - b + 1)): a of n rows of the class hold it, b of m others."""
    rows_with: dict[str, Counter[str]] = {label: Counter() for label in labels}
    num_rows = Counter(row_labels)
    for found, label in zip(words, row_labels, strict=True):
        rows_with[label].update(set(found))
    everywhere = sum(rows_with.values(), Counter())
    telling = {}
    for label in labels:
        inside, total = num_rows[label], sum(num_rows.values())

        def log_odds(word: str, label: str = label, inside: int = inside, total: int = total) -> float:
            a, b = rows_with[label][word], everywhere[word] - rows_with[label][word]
            return float(np.log((a + 1) / (inside - a + 1)) - np.log((b + 1) / (total - inside - b + 1)))

        candidates = [word for word, count in rows_with[label].items() if count >= MIN_WORD_ROWS]
        telling[label] = sorted(candidates, key=lambda word: (-log_odds(word), word))[:NUM_WORDS]
    return telling


def _example(rows: "pd.DataFrame", label: str) -> str:
    texts = rows.loc[rows["label"] == label, "text"]
    if texts.empty:
        return ""
    text = str(texts.iloc[0])
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"
