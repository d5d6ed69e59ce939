"""What Millstream needs from an object store: bytes by bucket and key, and one conditional write."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object. `etag` changes with its bytes.

    `modified` is by the store's clock; in the result of a put, by the clock of this machine.
    """

    bucket: str
    key: str
    size_bytes: int
    etag: str
    modified: datetime


class ObjectStore(Protocol):
    """Implemented by `ml.storage.s3.S3Store` (any S3 endpoint) and `ml.storage.memory.MemoryStore` (for tests).

    Keys are relative paths of `[A-Za-z0-9._=@+-]` segments joined by `/`; to write under another is refused with ValueError.
    Objects that others put there can be read, listed and deleted under any relative path.
    A put is atomic: a reader sees the old object, the new one, or none, never a part.
    """

    def ensure_bucket(self, bucket: str) -> None:
        """Create the bucket unless it is there."""
        ...

    def put(self, bucket: str, key: str, data: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> ObjectInfo:
        """Write an object from bytes or from a file (streamed, multipart when large).

        Args:
            if_match: write only while the object's etag is this one. Only for `bytes`.
            if_none_match: write only while there is no such object. Only for `bytes`.

        Raises:
            WriteConflictError: a condition did not hold.
            StorageUnavailableError: the store did not answer, or answered 5xx / slow down.
        """
        ...

    def get(self, bucket: str, key: str) -> bytes:
        """Raises ObjectNotFoundError when there is none."""
        ...

    def get_with_info(self, bucket: str, key: str) -> tuple[bytes, ObjectInfo]:
        """Bytes and the etag that belongs to exactly these bytes."""
        ...

    def download(self, bucket: str, key: str, path: Path) -> None:
        """Stream an object to a file; the file appears whole or not at all."""
        ...

    def stat(self, bucket: str, key: str) -> ObjectInfo | None: ...

    def list(self, bucket: str, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects under a prefix, in key order."""
        ...

    def delete(self, bucket: str, key: str) -> None:
        """Idempotent."""
        ...
