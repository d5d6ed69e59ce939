"""The data that people put under a model's name in the datasets bucket."""

from ml.data.sources import is_readable
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from ml.storage.base import ObjectInfo


def landed_address(store: ArtifactStore, name: str) -> str:
    """Where the data of a model lands, as a data source."""
    return f"s3://{store.datasets_bucket}/{keys.dataset_prefix(name)}"


def landed_objects(store: ArtifactStore, name: str) -> list[ObjectInfo]:
    """The objects that a run on `landed_address` would read, by key.

    Raises:
        StorageError: the store refused or did not answer.
    """
    listed = store.objects.list(store.datasets_bucket, keys.dataset_prefix(name))
    return [info for info in listed if info.size_bytes > 0 and is_readable(info.key.rpartition("/")[2])]
