"""Sets of token shards in object storage. `ml.training.shards` has the format."""

from collections.abc import Callable
from pathlib import Path

from ml.errors import ConfigError, DataError, ObjectNotFoundError
from ml.storage import keys
from ml.storage.base import ObjectStore


def parse_shards_uri(uri: str) -> tuple[str, str]:
    """(bucket, prefix) of `s3://bucket/prefix`.

    Raises:
        ConfigError: it is not one.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    try:
        keys.check_path(prefix)
    except ValueError as error:
        raise ConfigError(f"token shards lie at s3://bucket/prefix, found {uri!r}: {error}") from error
    if not uri.startswith("s3://") or not bucket:
        raise ConfigError(f"token shards lie at s3://bucket/prefix, found {uri!r}")
    return bucket, prefix


class StoredShards:
    """A set under a prefix. Implements `ml.training.shards.ShardSource`; each file is fetched when it is needed."""

    def __init__(self, objects: ObjectStore, bucket: str, prefix: str):
        self._objects = objects
        self._bucket = bucket
        self._prefix = prefix

    def __str__(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    def fetch(self, name: str, destination: Path) -> None:
        """
        Raises:
            DataError: there is no such file.
            StorageError: the store refused.
            StorageUnavailableError: it did not answer; trying again may help.
        """
        try:
            self._objects.download(self._bucket, f"{self._prefix}/{name}", destination)
        except ObjectNotFoundError as error:
            raise DataError(f"{self} has no file {name}; give the prefix that token shards were written to") from error


def storing(objects: ObjectStore, bucket: str, prefix: str, root: Path) -> Callable[[Path], None]:
    """A `finish_file` of `ml.training.shards.ShardWriter`: puts each file into the store as soon as it is whole, and deletes it
    here. The index comes last, so a set that can be found is whole.

    Args:
        root: keys are the prefix and the path below it.
    """

    def finish_file(path: Path) -> None:
        objects.put(bucket, f"{prefix}/{path.relative_to(root).as_posix()}", path)
        path.unlink()

    return finish_file
