"""Rows of tokens in files of bounded size, for data that is never in memory, nor on this machine, as a whole.

    index.json               what there is; written last, so its existence means that the set is whole
    shard-00000.safetensors  `tokens`: all rows of the shard, one after the other; `offsets` (rows + 1,) int64 into them
    lengths.int32            length of every row of the set, little endian; what batches are made from

A shard is read where it lies in `ShardCache`, mapped into memory, which the operating system takes back when it likes.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ml.errors import DataError
from ml.training.folders import digest_of_file, write_json
from ml.training.shard_cache import ShardCache

FORMAT = "millstream token shards 1"
INDEX_NAME = "index.json"
LENGTHS_NAME = "lengths.int32"
SHARD_BYTES = 64 * 2**20
# More shards in a window mix better, but little beyond this.
MOST_SHARDS_TOGETHER = 8

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ShardSource(Protocol):
    """Where the files of a set lie. `str()` of it names it in messages."""

    def fetch(self, name: str, destination: Path) -> None:
        """Copy a file of the set to `destination`.

        Raises:
            DataError: there is no such file.
        """
        ...


class FolderShards:
    """A set in a folder. On the disk of the cache, copies are links and take no room."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def fetch(self, name: str, destination: Path) -> None:
        try:
            os.link(self._folder / name, destination)
            return
        except OSError:  # another disk, or one that has no links
            pass
        try:
            shutil.copyfile(self._folder / name, destination)
        except FileNotFoundError as error:
            raise DataError(f"{self._folder} has no file {name}; give the folder that token shards were written to") from error


@dataclass(frozen=True)
class ShardFile:
    """One file of a set. `rows` and `tokens` that are in it; of the lengths file, in the whole set."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """index.json.

    Args:
        dtype: of a token, "uint16" or "uint32".
        vocabulary: tokens are below it.
        split: what the rows are for, such as "train".
    """

    dtype: str
    vocabulary: int
    split: str
    lengths: ShardFile
    shards: tuple[ShardFile, ...]
    format: str = FORMAT

    @property
    def num_rows(self) -> int:
        return self.lengths.rows

    @property
    def digest(self) -> str:
        """Identifies the data of the set: all its files are in the index by digest."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def starts(self) -> np.ndarray:
        """(S + 1,) int64: the first row of each shard, and the number of rows."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)]).astype(np.int64)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ShardIndex":
        """
        Raises:
            ValueError, KeyError, TypeError: this is no index, or one that contradicts itself.
        """
        shards = tuple(ShardFile(**shard) for shard in values["shards"])
        index = cls(**{**values, "lengths": ShardFile(**values["lengths"]), "shards": shards})
        if index.format != FORMAT:
            raise ValueError(f"its format is {index.format!r}, this code reads {FORMAT!r}")
        for entry in (index.lengths, *index.shards):
            if not _FILE_NAME.fullmatch(entry.file) or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
                raise ValueError(f"{entry.file!r} is not a plain file name with a sha256")
        if sum(shard.rows for shard in index.shards) != index.num_rows or index.lengths.bytes != 4 * index.num_rows:
            raise ValueError("the rows of its shards do not add up")
        return index


class ShardWriter:
    """Writes a set row by row; holds one shard in memory.

    Args:
        folder: must not hold a set already. What a writer that was killed left there is overwritten.
        vocabulary: tokens are below it; up to 65,536 they take two bytes, beyond four.
        split: what the rows are for.
        shard_bytes: of tokens in a shard; the last one is smaller, and one with a single long row may be larger.
        finish_file: called with each file when it is whole, `index.json` last; it may move all others away.

    Use as a context manager: an error inside leaves no index.

    Raises:
        DataError: the folder holds a set.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocabulary: int,
        split: str,
        shard_bytes: int = SHARD_BYTES,
        finish_file: Callable[[Path], None] = lambda path: None,
    ):
        self._folder = folder
        self._vocabulary = vocabulary
        self._split = split
        self._dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
        self._shard_tokens = max(shard_bytes // self._dtype.itemsize, 1)
        self._finish_file = finish_file
        self._rows: list[np.ndarray] = []
        self._num_tokens = 0
        self._shards: list[ShardFile] = []
        self.index: ShardIndex | None = None
        if (folder / INDEX_NAME).exists():
            raise DataError(f"{folder} holds token shards already; delete it, or write to another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._lengths = (folder / LENGTHS_NAME).open("wb")

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append a row.

        Raises:
            DataError: it is empty, or a token is not in the vocabulary.
        """
        row = np.asarray(tokens, dtype=np.int64)
        if row.ndim != 1 or not len(row):
            raise DataError(f"row {self.num_rows} has no tokens (shape {row.shape}); leave empty texts out")
        if row.min() < 0 or row.max() >= self._vocabulary:
            raise DataError(f"row {self.num_rows} has tokens from {row.min()} to {row.max()}, the vocabulary has {self._vocabulary}")
        if self._rows and self._num_tokens + len(row) > self._shard_tokens:
            self._write_shard()
        self._rows.append(row.astype(self._dtype))
        self._num_tokens += len(row)

    @property
    def num_rows(self) -> int:
        """Added so far."""
        return sum(shard.rows for shard in self._shards) + len(self._rows)

    def close(self) -> ShardIndex:
        """Write what is left, and the index, which is `index` from then on.

        Raises:
            DataError: there is no row at all.
        """
        if self._rows:
            self._write_shard()
        self._lengths.close()
        if not self._shards:
            raise DataError(f"nothing was written to {self._folder}: there is no row")
        path = self._folder / LENGTHS_NAME
        totals = sum(shard.rows for shard in self._shards), sum(shard.tokens for shard in self._shards)
        lengths = ShardFile(LENGTHS_NAME, *totals, path.stat().st_size, digest_of_file(path))
        self._finish_file(path)
        self.index = ShardIndex(self._dtype.name, self._vocabulary, self._split, lengths, tuple(self._shards))
        write_json(self._folder / INDEX_NAME, asdict(self.index))
        self._finish_file(self._folder / INDEX_NAME)
        return self.index

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._lengths.close()

    def _write_shard(self) -> None:
        lengths = np.array([len(row) for row in self._rows], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        path = self._folder / f"shard-{len(self._shards):05d}.safetensors"
        save_file({"tokens": np.concatenate(self._rows), "offsets": offsets}, path)
        self._shards.append(ShardFile(path.name, len(lengths), self._num_tokens, path.stat().st_size, digest_of_file(path)))
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._rows, self._num_tokens = [], 0
        self._finish_file(path)


class ShardedRows:
    """The rows of a set, by their index. Shards are fetched when a row of them is needed, or before: see `expect`.

    Ranks on one machine may share a cache folder: each shard is then fetched once. A rank reads only the shards that hold its rows;
    with rows shuffled over a few shards at a time (`batches.Shards`), those are a few at a time, the same ones for all ranks.

    Args:
        source: where the files lie.
        cache_dir: for copies of shards, verified by digest.
        max_cached_bytes: bound of what lies there, and of what is mapped into memory.

    Raises:
        DataError: there is no index, it cannot be read, or a single shard is larger than the cache may be.
    """

    def __init__(self, source: ShardSource, cache_dir: Path, max_cached_bytes: int):
        self._source = source
        self._cache = ShardCache(source.fetch, str(source), cache_dir, max_cached_bytes)
        self._max_bytes = max_cached_bytes
        self.index = self._read_index()
        self.starts = self.index.starts
        largest = max(shard.bytes for shard in self.index.shards)
        if largest > max_cached_bytes:
            raise DataError(
                f"a shard of {source} has {largest} bytes, the cache may hold {max_cached_bytes}; "
                "raise cache_bytes, or write smaller shards"
            )
        self.shards_together = max(1, min(max_cached_bytes // largest // 2, MOST_SHARDS_TOGETHER))
        """So many shards, and as many that come after them, fit into the cache."""
        lengths = self.index.lengths
        self.lengths: np.ndarray = np.memmap(self._cache.fetch_side_file(lengths.file, lengths.sha256), dtype="<i4", mode="r")
        self._lock = threading.Lock()
        self._mapped: OrderedDict[int, Any] = OrderedDict()
        self._closed = threading.Event()
        self._expected: list[int] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        """Copies of these rows' tokens, each (length,) of the index's dtype.

        Raises:
            DataError: a shard is damaged or missing.
        """
        found: list[np.ndarray] = []
        with self._lock:
            shards = np.searchsorted(self.starts, rows, side="right") - 1
            for row, shard in zip(rows.tolist(), shards.tolist(), strict=True):
                tokens, offsets = self._map(shard)
                place = row - int(self.starts[shard])
                start, end = offsets[place : place + 2]
                found.append(tokens[int(start) : int(end)])
            for shard in set(shards.tolist()):
                self._cache.touch(self.index.shards[shard].sha256)
        return found

    def expect(self, shards: Sequence[int]) -> None:
        """Rows of these shards will be asked for, the first ones soonest: fetch them in a thread, as many as fit into the cache."""
        fitting: list[int] = []
        room = self._max_bytes
        for shard in shards:
            room -= self.index.shards[shard].bytes
            if room < 0:
                break
            fitting.append(shard)
        with self._changed:
            if fitting == self._expected:
                return
            self._expected = fitting
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_expected, name="shards", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread and let go of all files. What it is fetching is finished first."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread:
            self._thread.join(10)
        with self._lock:
            self._mapped.clear()

    def _map(self, shard: int) -> tuple[Any, Any]:
        """Slices of a shard's `tokens` and `offsets`, which copy what is asked for."""
        if shard not in self._mapped:
            entry = self.index.shards[shard]
            # A file that was deleted takes room on the disk as long as it is mapped.
            self._mapped = OrderedDict((i, slices) for i, slices in self._mapped.items() if self._cache.holds(self.index.shards[i].sha256))
            room = self._max_bytes - entry.bytes
            while self._mapped and sum(self.index.shards[other].bytes for other in self._mapped) > room:
                self._mapped.popitem(last=False)
            try:
                file = self._cache.use(entry.file, entry.sha256, entry.bytes, lambda path: safe_open(path, "np"))
                self._mapped[shard] = (file.get_slice("tokens"), file.get_slice("offsets"))
            except SafetensorError as error:
                raise DataError(f"shard {entry.file} of {self._source} is no file of tokens ({error}); write the shards again") from error
        self._mapped.move_to_end(shard)
        return self._mapped[shard]

    def _fetch_expected(self) -> None:
        while not self._closed.is_set():
            with self._changed:
                expected = list(self._expected)
            entries = [self.index.shards[shard] for shard in expected]
            for entry in entries:
                if self._closed.is_set() or expected != self._expected:
                    break
                self._cache.fetch_ahead(entry.file, entry.sha256, entry.bytes, keep={other.sha256 for other in entries})
            with self._changed:
                self._changed.wait_for(lambda expected=expected: self._closed.is_set() or expected != self._expected)

    def _read_index(self) -> ShardIndex:
        content = self._cache.read_unchecked(INDEX_NAME)
        try:
            index = ShardIndex.from_json(json.loads(content))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{INDEX_NAME} of {self._source} cannot be read: {error}; write the shards again") from error
        if not index.num_rows:
            raise DataError(f"{self._source} has no rows; write the shards again")
        return index
