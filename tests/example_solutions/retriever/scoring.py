"""The rank of the right answer: what a retriever's metrics are computed from."""

from typing import TYPE_CHECKING

import numpy as np

from ml.solution import BaselineResult, Metric, Scores

from .codec import RetrieverCodec

if TYPE_CHECKING:
    import pandas as pd

    from ml.artifacts import SplitDataset
    from ml.predictor import Predictor


def score_ranks(predictor: "Predictor", frame: "pd.DataFrame") -> Scores:
    """`rank` (N,) int64, 1 for the first place."""
    codec = predictor.codec
    assert isinstance(codec, RetrieverCodec)
    similarities = codec.similarities(predictor.outputs([{"text": text} for text in frame["text"]]))
    own = similarities[np.arange(len(frame)), frame["target"].to_numpy()]
    return Scores(frame["row_id"].to_numpy(), {"rank": 1 + (similarities > own[:, None]).sum(axis=1)})


def most_frequent_answers(frames: "dict[str, pd.DataFrame]", splits: "SplitDataset", seed: int) -> BaselineResult:
    """The same ranking for every question: frequent answers first."""
    counts = np.bincount(frames["train"]["target"], minlength=len(splits.labels))
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)

    def scores(name: str) -> Scores:
        return Scores(frames[name]["row_id"].to_numpy(), {"rank": ranks[frames[name]["target"].to_numpy()]})

    return BaselineResult(validation=scores("validation"), test=scores("test"), parameters={"model": "most frequent answers"})


def retrieval_metrics(splits: "SplitDataset") -> tuple[Metric, ...]:
    """Share of questions whose answer comes first, and the mean of 1 / rank."""
    return (
        Metric("recall_at_1", lambda scores: float((scores.columns["rank"] == 1).mean())),
        Metric("mrr", lambda scores: float((1 / scores.columns["rank"]).mean())),
    )
