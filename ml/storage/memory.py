"""An object store in memory with the behaviour of a real one, for tests and notebooks."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ml.errors import ObjectNotFoundError, StorageError, WriteConflictError
from ml.storage import keys
from ml.storage.base import ObjectInfo


@dataclass
class MemoryStore:
    """See `ml.storage.base.ObjectStore`. Safe to share between threads; gone with its process."""

    _buckets: dict[str, dict[str, tuple[bytes, ObjectInfo]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ensure_bucket(self, bucket: str) -> None:
        with self._lock:
            self._buckets.setdefault(bucket, {})

    def put(self, bucket: str, key: str, data: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> ObjectInfo:
        keys.check_key(key)
        if isinstance(data, Path):
            if if_match is not None or if_none_match:
                raise ValueError(f"a conditional write of {key!r} takes bytes, not a file")
            data = data.read_bytes()
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        with self._lock:
            objects = self._objects(bucket, f"write {bucket}/{key}")
            present = objects.get(key)
            if if_match is not None and (present is None or present[1].etag != if_match):
                raise WriteConflictError(f"could not write {bucket}/{key}: somebody else wrote it first; read it again and decide anew")
            if if_none_match and present is not None:
                raise WriteConflictError(f"could not write {bucket}/{key}: it is there already; read it and decide anew")
            info = ObjectInfo(bucket, key, len(data), etag, datetime.now(UTC))
            objects[key] = (data, info)
            return info

    def get(self, bucket: str, key: str) -> bytes:
        return self.get_with_info(bucket, key)[0]

    def get_with_info(self, bucket: str, key: str) -> tuple[bytes, ObjectInfo]:
        keys.check_path(key)
        with self._lock:
            found = self._objects(bucket, f"read {bucket}/{key}").get(key)
        if found is None:
            raise ObjectNotFoundError(f"could not read {bucket}/{key}: there is no such object")
        return found

    def download(self, bucket: str, key: str, path: Path) -> None:
        data = self.get(bucket, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def stat(self, bucket: str, key: str) -> ObjectInfo | None:
        keys.check_path(key)
        with self._lock:
            found = self._buckets.get(bucket, {}).get(key)
        return found[1] if found else None

    def list(self, bucket: str, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            objects = self._objects(bucket, f"list {bucket}/{prefix}")
            return iter([info for key, (_, info) in sorted(objects.items()) if key.startswith(prefix)])

    def delete(self, bucket: str, key: str) -> None:
        keys.check_path(key)
        with self._lock:
            self._objects(bucket, f"delete {bucket}/{key}").pop(key, None)

    def _objects(self, bucket: str, what: str) -> dict[str, tuple[bytes, ObjectInfo]]:
        if bucket not in self._buckets:
            raise StorageError(f"could not {what}: there is no such bucket; create it first")
        return self._buckets[bucket]
