"""Per-row scores of a text classifier on one split."""

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from ml.solution import Scores
from ml.text_classification.codec import TextClassifierCodec

if TYPE_CHECKING:
    import pandas as pd

    from ml.predictor import Predictor

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
PROGRESS_EVERY_SECONDS = 15.0


def score_texts(predictor: "Predictor", frame: "pd.DataFrame") -> Scores:
    """Ask the predictor about every row.

    Texts of like length share a batch, so little is spent on padding; the order of the rows is restored.

    Args:
        frame: `row_id`, `text`, `target`.

    Returns:
        Scores with `target` (N,) int64 and `probabilities` (N, C) float64, rows in the order of the frame.
    """
    codec = predictor.codec
    if not isinstance(codec, TextClassifierCodec):
        raise TypeError(f"score_texts needs a text classifier, found a bundle whose codec is {type(codec).__name__}")
    texts = frame["text"].tolist()
    order = np.argsort([len(text) for text in texts], kind="stable")
    probabilities = np.empty((len(texts), len(codec.labels)), dtype=np.float64)
    last_report = time.monotonic()
    for start in range(0, len(texts), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        probabilities[rows] = codec.probabilities(predictor.outputs([{"text": texts[row]} for row in rows]))
        if time.monotonic() - last_report > PROGRESS_EVERY_SECONDS:
            last_report = time.monotonic()
            logger.info("scored %d of %d rows", start + len(rows), len(texts))
    return Scores(frame["row_id"].to_numpy(), {"target": frame["target"].to_numpy(np.int64), "probabilities": probabilities})
