"""Reads a whole set of shards in the order of training and tells how much memory it took: JSON on standard output."""

import json
import resource
import sys
from pathlib import Path

import numpy as np

from ml.training.batches import Sampler, Shards
from ml.training.shards import FolderShards, ShardedRows


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main(folder: str, cache: str, max_cached_bytes: int) -> None:
    rows = ShardedRows(FolderShards(Path(folder)), Path(cache), max_cached_bytes)
    shards = Shards(rows.starts, rows.shards_together)
    sampler = Sampler(np.arange(rows.index.num_rows), rows.lengths, 64, seed=0, shards=shards)
    before = resident_bytes()
    largest_memory = largest_disk = checksum = 0
    for step in range(sampler.steps_per_epoch):
        rows.expect(sampler.shards_ahead(step))
        for tokens in rows.tokens(sampler.rows(step)):
            checksum += int(tokens.sum())
        if step % 20 == 0:
            largest_memory = max(largest_memory, resident_bytes() - before)
            sizes = []
            for path in Path(cache).glob("*.safetensors"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            largest_disk = max(largest_disk, sum(sizes))
    rows.close()
    print(json.dumps({"memory": largest_memory, "disk": largest_disk, "checksum": checksum, "together": rows.shards_together}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
