"""Finds the answer to a question: encodes the question and looks in an index of answers."""

from typing import TYPE_CHECKING

from ml.solution import SolutionSpec

from .codec import load_codec
from .export import export_onnx
from .scoring import most_frequent_answers, retrieval_metrics, score_ranks
from .training import RetrieverConfig, build_module, train_retriever

if TYPE_CHECKING:
    import pandas as pd

    from ml.config import CleanConfig


def drop_empty(frame: "pd.DataFrame", config: "CleanConfig") -> "tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]":
    empty = frame["text"].fillna("").str.strip() == ""
    return frame[~empty].assign(group=frame["row_id"]), frame[empty].assign(reason="empty_text"), {"empty_text": int(empty.sum())}


SPEC = SolutionSpec(
    name="retriever",
    title="Answers to questions",
    model_config=RetrieverConfig,
    clean=drop_empty,
    train=train_retriever,
    base_model_digest=lambda model: "none",
    export_onnx=export_onnx,
    build_module=build_module,
    load_codec=load_codec,
    score=score_ranks,
    baseline=most_frequent_answers,
    metrics=retrieval_metrics,
    sample_requests=({"text": "how do I return a parcel"}, {"text": "where is my invoice"}),
)
