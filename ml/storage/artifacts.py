"""Content-addressed bytes over an object store: written once under their digest, verified when read."""

import hashlib
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ml.artifacts import ArtifactRef, BundleRef
from ml.errors import DigestMismatchError, StorageError
from ml.storage import keys
from ml.storage.base import ObjectStore

if TYPE_CHECKING:
    import pandas as pd


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ArtifactStore:
    """Puts bytes into the `runs` bucket by digest, and gets them back verified.

    Args:
        objects: where the bytes lie.
        bucket_prefix: see `Settings.bucket_prefix`.
    """

    def __init__(self, objects: ObjectStore, bucket_prefix: str = "millstream-"):
        self.objects = objects
        self.datasets_bucket = keys.bucket_name(bucket_prefix, "datasets")
        self.runs_bucket = keys.bucket_name(bucket_prefix, "runs")
        self.registry_bucket = keys.bucket_name(bucket_prefix, "registry")
        self.monitoring_bucket = keys.bucket_name(bucket_prefix, "monitoring")

    @property
    def buckets(self) -> tuple[str, ...]:
        return (self.datasets_bucket, self.runs_bucket, self.registry_bucket, self.monitoring_bucket)

    def ensure_buckets(self) -> None:
        for bucket in self.buckets:
            self.objects.ensure_bucket(bucket)

    def put_bytes(self, data: bytes) -> ArtifactRef:
        return self._put(data, digest_bytes(data), len(data))

    def put_file(self, path: Path) -> ArtifactRef:
        return self._put(path, digest_file(path), path.stat().st_size)

    def put_frame(self, frame: "pd.DataFrame") -> ArtifactRef:
        """Store a table as Parquet. The same table gives the same digest (with the same pyarrow)."""
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False, compression="zstd")
        return self.put_bytes(buffer.getvalue())

    def put_folder(self, folder: Path) -> BundleRef:
        """Store every file below a folder."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return BundleRef(files={path.relative_to(folder).as_posix(): self.put_file(path) for path in paths})

    def get_bytes(self, ref: ArtifactRef) -> bytes:
        """Raises DigestMismatchError when the stored bytes are not those that were written."""
        bucket, key = self._locate(ref)
        data = self.objects.get(bucket, key)
        self._verify(ref, digest_bytes(data))
        return data

    def get_frame(self, ref: ArtifactRef) -> "pd.DataFrame":
        import pandas as pd

        return pd.read_parquet(io.BytesIO(self.get_bytes(ref)))

    def get_file(self, ref: ArtifactRef, path: Path) -> Path:
        """Download to a path; the file appears only after its digest was verified."""
        bucket, key = self._locate(ref)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            part = Path(folder) / "part"
            self.objects.download(bucket, key, part)
            self._verify(ref, digest_file(part))
            part.replace(path)
        return path

    def get_folder(self, ref: BundleRef, folder: Path) -> Path:
        """Download a bundle; files already there with the right digest are kept."""
        for name, file_ref in ref.files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise StorageError(f"bundle file name {name!r} points outside its folder; the bundle is not to be trusted")
            if not (path.is_file() and path.stat().st_size == file_ref.size_bytes and digest_file(path) == file_ref.sha256):
                self.get_file(file_ref, path)
        return folder

    def _put(self, data: bytes | Path, sha256: str, size_bytes: int) -> ArtifactRef:
        key = keys.artifact(sha256)
        present = self.objects.stat(self.runs_bucket, key)
        if present is None or present.size_bytes != size_bytes:
            self.objects.put(self.runs_bucket, key, data)
        return ArtifactRef(uri=f"s3://{self.runs_bucket}/{key}", sha256=sha256, size_bytes=size_bytes)

    @staticmethod
    def _locate(ref: ArtifactRef) -> tuple[str, str]:
        bucket, _, key = ref.uri.removeprefix("s3://").partition("/")
        return bucket, key

    @staticmethod
    def _verify(ref: ArtifactRef, found: str) -> None:
        if found != ref.sha256:
            raise DigestMismatchError(
                f"{ref.uri}: expected sha256 {ref.sha256}, found {found}. The object was damaged or replaced; "
                "delete it and run again to rebuild it."
            )
