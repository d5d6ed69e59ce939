"""Sets of shards: whole or not there, read back exactly, bounded on disk and in memory, damage is named."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ml.errors import DataError, StorageUnavailableError
from ml.training.batches import Sampler, Shards
from ml.training.shards import FolderShards, ShardedRows, ShardWriter
from tests.ml.training.shard_sets import VOCABULARY, random_rows, write_set

MANY = 10**9


class CountingSource(FolderShards):
    """Remembers what was fetched, and can be away."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.fetched: list[str] = []
        self.is_away = False

    def fetch(self, name: str, destination: Path) -> None:
        if self.is_away:
            raise StorageUnavailableError("the store is away")
        self.fetched.append(name)
        super().fetch(name, destination)


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def overwrite(path: Path, data: bytes) -> None:
    """As another file, so that links to the old one keep what they have."""
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(VOCABULARY, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_rows_come_back_as_they_were_written(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    rows = [*random_rows(300), np.array([vocabulary - 1, 0])]
    index = write_set(tmp_path / "set", rows, vocabulary=vocabulary)
    assert index.dtype == dtype
    assert len(index.shards) > 5
    found = ShardedRows(FolderShards(tmp_path / "set"), tmp_path / "cache", MANY)
    assert found.lengths.tolist() == [len(row) for row in rows]
    order = np.random.default_rng(1).permutation(len(rows))
    for row, tokens in zip(order, found.tokens(order), strict=True):
        assert tokens.dtype == dtype
        assert tokens.tolist() == rows[row].tolist()


def test_shards_keep_to_their_size_but_for_a_row_that_is_longer(tmp_path: Path) -> None:
    rows = [*random_rows(100), np.zeros(2000, dtype=int), *random_rows(50, seed=1)]
    index = write_set(tmp_path / "set", rows, shard_bytes=1000)
    assert max(shard.tokens for shard in index.shards if shard.rows > 1) <= 500
    assert [shard.rows for shard in index.shards if shard.tokens >= 2000] == [1]
    assert index.num_rows == 151 == index.starts[-1]


def test_an_interrupted_writer_leaves_no_set_and_its_folder_can_be_written_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, vocabulary=VOCABULARY, split="train", shard_bytes=100) as writer:
        for row in random_rows(30):
            writer.add(row)
        raise RuntimeError("killed")
    with pytest.raises(DataError, match=r"no file index\.json"):
        ShardedRows(FolderShards(tmp_path), tmp_path / "cache", MANY)
    rows = random_rows(10)
    write_set(tmp_path, rows, shard_bytes=100)
    assert ShardedRows(FolderShards(tmp_path), tmp_path / "cache", MANY).tokens(np.array([9]))[0].tolist() == rows[9].tolist()
    with pytest.raises(DataError, match="holds token shards already"):
        write_set(tmp_path, rows)


@pytest.mark.parametrize(("row", "message"), [([], "no tokens"), ([3, VOCABULARY], "tokens from 3 to 500"), ([-1], "tokens from -1")])
def test_a_row_that_is_none_is_refused(tmp_path: Path, row: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path, vocabulary=VOCABULARY, split="train") as writer:
        writer.add([1, 2])
        writer.add(row)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", random_rows(100))
    path = tmp_path / "set" / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    overwrite(path, bytes(data))
    found = ShardedRows(FolderShards(tmp_path / "set"), tmp_path / "cache", MANY)
    found.tokens(np.array([0]))
    with pytest.raises(DataError, match=r"shard-00002\.safetensors of .*set is damaged: its sha256 is"):
        found.tokens(index.starts[2:3])
    path.unlink()
    with pytest.raises(DataError, match=r"set has no file shard-00002\.safetensors"):
        found.tokens(index.starts[2:3])


def test_a_copy_that_was_damaged_on_this_disk_is_fetched_again(tmp_path: Path) -> None:
    rows = random_rows(100)
    write_set(tmp_path / "set", rows)
    ShardedRows(FolderShards(tmp_path / "set"), tmp_path / "cache", MANY).tokens(np.arange(100))
    for path in (tmp_path / "cache").glob("*.safetensors"):
        overwrite(path, path.read_bytes()[:-1] + b"\x99")
    found = ShardedRows(FolderShards(tmp_path / "set"), tmp_path / "cache", MANY)
    assert [tokens.tolist() for tokens in found.tokens(np.arange(100))] == [row.tolist() for row in rows]


@pytest.mark.parametrize("broken", ['{"format": "x"}', "[]", "no json", None])
def test_a_broken_index_is_an_error_of_the_data(tmp_path: Path, broken: str | None) -> None:
    write_set(tmp_path / "set", random_rows(100))
    path = tmp_path / "set" / "index.json"
    if broken is None:
        values = json.loads(path.read_text())
        values["shards"][0]["file"] = "../../etc/passwd"
        broken = json.dumps(values)
    path.write_text(broken)
    with pytest.raises(DataError, match=r"index\.json of .*set cannot be read"):
        ShardedRows(FolderShards(tmp_path / "set"), tmp_path / "cache", MANY)


def test_a_file_that_is_no_shard_is_an_error_of_the_data(tmp_path: Path) -> None:
    import hashlib

    write_set(tmp_path / "set", random_rows(100))
    save_file({"pictures": np.zeros(3)}, tmp_path / "set" / "shard-00001.safetensors")
    path = tmp_path / "set" / "index.json"
    values = json.loads(path.read_text())
    data = (tmp_path / "set" / "shard-00001.safetensors").read_bytes()
    values["shards"][1] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(values))
    found = ShardedRows(FolderShards(tmp_path / "set"), tmp_path / "cache", MANY)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors of .* is no file of tokens"):
        found.tokens(found.starts[1:2])


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", random_rows(300))
    sizes = [shard.bytes for shard in index.shards]
    bound = sum(sizes[:3]) + 200
    source = CountingSource(tmp_path / "set")
    found = ShardedRows(source, tmp_path / "cache", bound)
    for shard in (0, 1, 0, 2, 0, 3, 0):
        found.tokens(index.starts[shard : shard + 1])
        assert cached_bytes(tmp_path / "cache") <= bound
        time.sleep(0.01)
    assert source.fetched.count("shard-00000.safetensors") == 1, "it was in use all the time"
    assert source.fetched[2:] == [f"shard-0000{shard}.safetensors" for shard in (0, 1, 2, 3)]
    with pytest.raises(DataError, match="raise cache_bytes"):
        ShardedRows(source, tmp_path / "cache", 100)


def test_expected_shards_are_fetched_ahead_within_the_bound(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", random_rows(300))
    bound = sum(shard.bytes for shard in index.shards[:4])
    source = CountingSource(tmp_path / "set")
    found = ShardedRows(source, tmp_path / "cache", bound)
    found.expect([0, 1, 2, 3, 4, 5, 6])
    deadline = time.monotonic() + 20
    while len(source.fetched) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert source.fetched[2:] == [f"shard-0000{shard}.safetensors" for shard in range(4)], "no more than fit"
    source.is_away = True
    found.tokens(index.starts[:4])
    with pytest.raises(StorageUnavailableError):
        found.tokens(index.starts[8:9])
    found.close()
    assert found._thread is not None
    assert not found._thread.is_alive()


def test_a_store_that_is_away_while_fetching_ahead_ends_nothing(tmp_path: Path) -> None:
    rows = random_rows(100)
    write_set(tmp_path / "set", rows)
    source = CountingSource(tmp_path / "set")
    found = ShardedRows(source, tmp_path / "cache", MANY)
    source.is_away = True
    found.expect([0, 1])
    time.sleep(0.1)
    source.is_away = False
    assert found.tokens(np.array([0]))[0].tolist() == rows[0].tolist()
    found.close()


def _read_in_rank(folder: str, cache: str, bound: int, queue) -> None:
    """Every row, in the order of training, by a process that shares its cache with others."""
    source = CountingSource(Path(folder))
    found = ShardedRows(source, Path(cache), bound)
    sampler = Sampler(np.arange(found.index.num_rows), found.lengths, 8, 0, shards=Shards(found.starts, found.shards_together))
    total = 0
    for step in range(sampler.steps_per_epoch):
        found.expect(sampler.shards_ahead(step))
        total += sum(int(tokens.sum()) for tokens in found.tokens(sampler.rows(step)))
    queue.put((total, len(source.fetched)))
    queue.close()
    queue.join_thread()
    os._exit(0)


def test_ranks_share_a_cache(tmp_path: Path) -> None:
    rows = random_rows(600)
    index = write_set(tmp_path / "set", rows)
    bound = 8 * max(shard.bytes for shard in index.shards)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (str(tmp_path / "set"), str(tmp_path / "cache"), bound, queue)
    processes = [context.Process(target=_read_in_rank, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(20)
    assert [total for total, _ in found] == [sum(int(row.sum()) for row in rows)] * 2
    assert cached_bytes(tmp_path / "cache") <= bound


def test_reading_several_times_the_bound_takes_no_more_memory_or_disk_than_it(tmp_path: Path) -> None:
    """In a process of its own, by what the kernel says it has in memory: 64 MB of shards of 2 MB, a bound of 12 MB."""
    mebibyte = 2**20
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "set", vocabulary=60_000, split="train", shard_bytes=2 * mebibyte) as writer:
        for _ in range(32):
            for row in random.integers(0, 60_000, (1024, 1024)):
                writer.add(row)
    checksum = 0
    for shard in writer._shards:
        data = np.memmap(tmp_path / "set" / shard.file, dtype=np.uint8, mode="r")
        header = int.from_bytes(data[:8].tobytes(), "little")
        begin = json.loads(data[8 : 8 + header].tobytes())["tokens"]["data_offsets"]
        checksum += int(data[8 + header + begin[0] : 8 + header + begin[1]].view("<u2").sum(dtype=np.int64))
    bound = 12 * mebibyte
    command = [sys.executable, "-m", "tests.ml.training.reading_process", str(tmp_path / "set"), str(tmp_path / "cache"), str(bound)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["checksum"] == checksum
    assert found["together"] == 2
    assert found["disk"] <= bound
    # What is mapped, and an allowance for the allocator.
    assert mebibyte < found["memory"] <= bound + 4 * mebibyte
