"""How well a model answers: metrics with intervals, and the paired difference to the uncompressed model."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ml.artifacts import Interval, Quality, SplitDataset
from ml.config import EvaluateConfig
from ml.errors import DataError
from ml.evaluation.bootstrap import difference_interval, metric_intervals
from ml.evaluation.sampling import choose_rows
from ml.predictor import Predictor, load_predictor
from ml.solution import Metric, Scores, SolutionSpec
from ml.storage.artifacts import ArtifactStore

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

SplitName = Literal["validation", "test"]
SAMPLED_ROWS = 64


def evaluate_bundle(
    folder: Path,
    spec: SolutionSpec,
    frame: "pd.DataFrame",
    split: SplitName,
    splits: SplitDataset,
    config: EvaluateConfig,
    reference: Scores | None,
    store: ArtifactStore,
) -> tuple[Quality, Scores]:
    """Score a bundle on as many rows of a split as `config` allows; the choice of rows is the same for every model.

    Args:
        frame: the whole table of the split.
        reference: scores of the uncompressed model on the same split; None for the uncompressed model itself.

    Raises:
        DataError: the table has no rows, or the reference was scored on other rows.
        BundleError: the bundle is damaged.
    """
    if len(frame) == 0:
        raise DataError(f"the {split} split has no rows to score; give more data or a larger `split.{split}_fraction`")
    predictor = load_predictor(folder, num_threads=config.num_threads)
    rows = choose_rows(frame, min(config.max_rows, affordable_rows(predictor, spec, frame, config.max_values)))
    if len(rows) < len(frame):
        logger.info("%d of %d %s rows are scored (evaluate.max_rows, max_values)", len(rows), len(frame), split)
    scores = spec.score(predictor, rows)
    return evaluate_scores(scores, spec, split, splits, config, reference, store), scores


def affordable_rows(predictor: Predictor, spec: SolutionSpec, frame: "pd.DataFrame", max_values: int) -> int:
    """Rows whose graph inputs have `max_values` values in all, by the mean of a sample; all variants encode alike, so they agree."""
    sample = spec.requests(choose_rows(frame, SAMPLED_ROWS))
    num_values = [next(iter(predictor.codec.encode([request]).values())).size for request in sample]
    return max(SAMPLED_ROWS, int(max_values / (sum(num_values) / len(num_values))))


def evaluate_scores(
    scores: Scores,
    spec: SolutionSpec,
    split: SplitName,
    splits: SplitDataset,
    config: EvaluateConfig,
    reference: Scores | None,
    store: ArtifactStore,
) -> Quality:
    """Judge scores that are there already, e.g. the baseline's, on the rows of the reference.

    Raises:
        DataError: the scores lack a row of the reference.
    """
    if reference is not None:
        scores = _same_rows(scores, reference, split)
    metrics = spec.metrics(splits)
    return Quality(
        split=split,
        num_rows=len(scores),
        metrics=metric_intervals(metrics, scores, config.bootstrap_resamples),
        scores=store.put_frame(scores_to_frame(scores)),
        primary_drop_points=None if reference is None else _drop_points(metrics[0], reference, scores, config.bootstrap_resamples),
    )


def scores_to_frame(scores: Scores) -> "pd.DataFrame":
    """`row_id`, then one column per value: `target`, or `probabilities.0`, `probabilities.1` for a column of vectors."""
    import pandas as pd

    columns: dict[str, np.ndarray] = {"row_id": scores.row_ids}
    for name, values in scores.columns.items():
        if values.ndim == 1:
            columns[name] = values
        else:
            columns.update({f"{name}.{index}": values[:, index] for index in range(values.shape[1])})
    return pd.DataFrame(columns)


def scores_from_frame(frame: "pd.DataFrame") -> Scores:
    """The reverse of `scores_to_frame`."""
    parts: dict[str, list[np.ndarray]] = {}
    vectors = set()
    for column in frame.columns.drop("row_id"):
        name, dot, index = column.rpartition(".")
        name = name if dot and index.isdigit() else column
        if name != column:
            vectors.add(name)
        parts.setdefault(name, []).append(frame[column].to_numpy())
    columns = {name: np.stack(values, axis=1) if name in vectors else values[0] for name, values in parts.items()}
    return Scores(frame["row_id"].to_numpy(), columns)


def _drop_points(metric: Metric, reference: Scores, scores: Scores, num_resamples: int) -> Interval:
    worse = difference_interval(metric, *((reference, scores) if metric.higher_is_better else (scores, reference)), num_resamples)
    return Interval(value=100 * worse.value, low=100 * worse.low, high=100 * worse.high)


def _same_rows(scores: Scores, reference: Scores, split: SplitName) -> Scores:
    """The rows of the reference, in its order."""
    positions = {row_id: position for position, row_id in enumerate(scores.row_ids)}
    missing = [row_id for row_id in reference.row_ids if row_id not in positions]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(reference)} {split} rows that the uncompressed model was scored on have no score here "
            f"(the first is {missing[0]}); both must be scored on the same split"
        )
    return scores.take(np.array([positions[row_id] for row_id in reference.row_ids], dtype=np.int64))
