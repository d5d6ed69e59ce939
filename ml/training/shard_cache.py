"""Copies of shards on this machine's disk: verified by digest, bounded, the least recently used go first.

Shared by all processes that name the same folder. One lock of the folder is held while files are fetched and deleted, so a file is
fetched once and the bound holds; reading needs no lock, for a file that is deleted stays readable for those who have it open.

    <sha256>.safetensors   a shard; its time of modification is when it was last used
    side/<sha256>          other files of a set, which stay
    incoming/              what is being fetched
    lock
"""

import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ml.errors import DataError, MillstreamError
from ml.training.folders import digest_of_file

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ShardCache:
    """
    Args:
        fetch: copies the file of that name to a path (`shards.ShardSource.fetch`).
        source_name: for messages.
        folder: of the cache.
        max_bytes: of shards in it.
    """

    def __init__(self, fetch: Callable[[str, Path], None], source_name: str, folder: Path, max_bytes: int):
        self._fetch = fetch
        self._source_name = source_name
        self._folder = folder
        self._max_bytes = max_bytes
        self._incoming = folder / "incoming"
        self._side = folder / "side"
        self._side.mkdir(parents=True, exist_ok=True)

    def use(self, name: str, sha256: str, num_bytes: int, open_file: Callable[[Path], T]) -> T:
        """Open a shard's copy, fetched if it is not there.

        Raises:
            DataError: the source has no such file, or another one.
        """
        path = self._path(sha256)
        while True:
            try:
                # Somebody else fetched it, perhaps long ago; a disk can damage it since then.
                if digest_of_file(path) == sha256:
                    return open_file(path)
                logger.warning("the copy of shard %s in %s is damaged; fetching it again", name, self._folder)
                path.unlink(missing_ok=True)
            except FileNotFoundError:
                pass
            with self._locked():
                if not path.exists():
                    self._make_room(num_bytes, keep=set())
                    self._fetch_verified(name, sha256, path)
                    return open_file(path)

    def fetch_ahead(self, name: str, sha256: str, num_bytes: int, keep: set[str]) -> None:
        """Fetch a shard unless it is there, or there is no room beside those to keep (by digest). Failing is logged, no more:
        who needs the shard will try again and tell."""
        path = self._path(sha256)
        if self.holds(sha256):
            self.touch(sha256)
            return
        try:
            with self._locked():
                if not path.exists() and self._make_room(num_bytes, keep):
                    self._fetch_verified(name, sha256, path)
        except (MillstreamError, OSError) as error:
            logger.warning("shard %s could not be fetched ahead: %s", name, error)

    def holds(self, sha256: str) -> bool:
        return self._path(sha256).exists()

    def touch(self, sha256: str) -> None:
        """Note that a shard is in use. One that another process has deleted is not fetched again for that."""
        with suppress(FileNotFoundError):
            os.utime(self._path(sha256))

    def fetch_side_file(self, name: str, sha256: str) -> Path:
        """A file that stays. It does not count for the bound."""
        path = self._side / sha256
        with self._locked():
            if not path.exists() or digest_of_file(path) != sha256:
                self._fetch_verified(name, sha256, path)
        return path

    def read_unchecked(self, name: str) -> bytes:
        """A small file whose digest nobody knows, fetched anew."""
        path = self._side / f"{name}.{os.getpid()}.{threading.get_ident()}"
        path.unlink(missing_ok=True)
        try:
            self._fetch(name, path)
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)

    def _fetch_verified(self, name: str, sha256: str, path: Path) -> None:
        # With the lock held, what lies there was left by a process that was killed.
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True)
        part = self._incoming / path.name
        self._fetch(name, part)
        found = digest_of_file(part)
        if found != sha256:
            part.unlink()
            raise DataError(
                f"{name} of {self._source_name} is damaged: its sha256 is {found[:16]}..., the index says {sha256[:16]}...; "
                "restore that file, or write the shards again"
            )
        part.replace(path)

    def _make_room(self, num_bytes: int, keep: set[str]) -> bool:
        """Delete shards until one of this size fits; whether it does."""
        files = []
        for path in self._folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        room = self._max_bytes - num_bytes - sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if room >= 0:
                break
            if path.stem not in keep:
                path.unlink(missing_ok=True)
                room += size
        return room >= 0

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.safetensors"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A descriptor of its own for each use: the lock is then one between threads, too.
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
