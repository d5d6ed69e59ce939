"""Small records that tests of evaluation and selection are made of."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ml.artifacts import ArtifactRef, BundleRef, Evaluation, Interval, Quality, SplitDataset, Timing, Variant
from ml.solution import Scores

NO_BYTES = ArtifactRef(uri="s3://nowhere/none", sha256="0" * 64, size_bytes=0)


def make_splits(labels: Sequence[str] = ("negative", "positive"), positive_label: str | None = "positive") -> SplitDataset:
    return SplitDataset(train=NO_BYTES, validation=NO_BYTES, test=NO_BYTES, labels=tuple(labels), positive_label=positive_label, counts={})


def random_scores(num_rows: int, accuracy: float, seed: int, *, same_targets: int = 0) -> Scores:
    """A two-class model that is right on about `accuracy` of the rows; targets come from `same_targets`."""
    targets = np.random.default_rng(same_targets).integers(0, 2, num_rows)
    right = np.random.default_rng(1000 + seed).random(num_rows) < accuracy
    positive = np.where(right == (targets == 1), 0.8, 0.2)
    row_ids = np.array([f"row-{index}" for index in range(num_rows)], dtype=object)
    return Scores(row_ids, {"target": targets, "probabilities": np.stack([1 - positive, positive], axis=1)})


def make_interval(value: float, half_width: float = 0.0) -> Interval:
    return Interval(value=value, low=value - half_width, high=value + half_width)


def make_quality(
    accuracy: float, drop: Interval | None, *, split: Literal["validation", "test"] = "validation", num_rows: int = 1000
) -> Quality:
    metrics = {"accuracy": make_interval(accuracy, 0.02), "f1": make_interval(accuracy - 0.01, 0.02)}
    return Quality(split=split, num_rows=num_rows, metrics=metrics, scores=NO_BYTES, primary_drop_points=drop)


def make_timing(latency: Interval, *, memory_ratio: float = 0.25, file_ratio: float = 0.25) -> Timing:
    return Timing(
        p50_ms=16 * latency.value,
        p95_ms=20 * latency.value,
        throughput_per_second=100 / latency.value,
        memory_bytes=int(400e6 * memory_ratio),
        peak_rss_bytes=int(500e6 * memory_ratio),
        file_bytes=int(90e6 * file_ratio),
        load_seconds=1.0,
        latency_ratio=latency,
        throughput_ratio=make_interval(1 / latency.value),
        memory_ratio=memory_ratio,
        file_ratio=file_ratio,
    )


def make_variant(name: str, method: str | None = None, *, failure: str | None = None) -> Variant:
    bundle = None if failure else BundleRef(files={"bundle.json": NO_BYTES})
    return Variant(name=name, method=method or name, bundle=bundle, failure=failure)


def make_evaluation(
    name: str, drop: Interval, latency: Interval, *, accuracy: float | None = None, memory_ratio: float = 0.25, file_ratio: float = 0.25
) -> Evaluation:
    quality = make_quality(0.83 - drop.value / 100 if accuracy is None else accuracy, drop)
    return Evaluation(variant=name, quality=quality, timing=make_timing(latency, memory_ratio=memory_ratio, file_ratio=file_ratio))
