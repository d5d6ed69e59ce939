"""Small sets of token shards."""

from pathlib import Path

import numpy as np

from ml.training.shards import ShardIndex, ShardWriter

VOCABULARY = 500


def random_rows(num_rows: int, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, random.integers(2, longest + 1)) for _ in range(num_rows)]


def write_set(folder: Path, rows: list[np.ndarray], shard_bytes: int = 1000, vocabulary: int = VOCABULARY) -> ShardIndex:
    writer = ShardWriter(folder, vocabulary=vocabulary, split="train", shard_bytes=shard_bytes)
    for row in rows:
        writer.add(row)
    return writer.close()
