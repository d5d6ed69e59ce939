"""Fixtures that many tests share: object stores, in memory and real."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from minio.deleteobjects import DeleteObject

from ml.storage.artifacts import ArtifactStore
from ml.storage.base import ObjectStore
from ml.storage.memory import MemoryStore
from ml.storage.s3 import S3Store
from services.object_store import ObjectStoreEndpoint, start_object_store, stop_object_store


@pytest.fixture(scope="session")
def object_store_state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("object-store-state")


@pytest.fixture(scope="session")
def object_store_endpoint(object_store_state_dir: Path) -> Iterator[ObjectStoreEndpoint]:
    """The real embedded server, started once for the whole test session."""
    try:
        yield start_object_store(object_store_state_dir)
    finally:
        stop_object_store(object_store_state_dir)


@pytest.fixture(scope="session")
def s3_store(object_store_endpoint: ObjectStoreEndpoint) -> S3Store:
    return S3Store(object_store_endpoint.endpoint, object_store_endpoint.access_key, object_store_endpoint.secret_key)


@pytest.fixture
def memory_store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=["memory", "s3"])
def object_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Every implementation in turn, for behaviour that all of them promise."""
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture
def bucket_prefix() -> str:
    """Fresh for every test, so that tests that share a server do not see each other's objects."""
    return f"t{uuid.uuid4().hex[:10]}-"


@pytest.fixture
def artifact_store(memory_store: MemoryStore, bucket_prefix: str) -> ArtifactStore:
    store = ArtifactStore(memory_store, bucket_prefix)
    store.ensure_buckets()
    return store


@pytest.fixture
def s3_artifact_store(s3_store: S3Store, bucket_prefix: str) -> Iterator[ArtifactStore]:
    store = ArtifactStore(s3_store, bucket_prefix)
    store.ensure_buckets()
    with contextlib.ExitStack() as cleaning:
        for bucket in store.buckets:
            cleaning.callback(remove_bucket, s3_store, bucket)
        yield store


def remove_bucket(store: S3Store, bucket: str) -> None:
    """Each bucket holds volumes of the server as long as it lives, so a test that made one removes it."""
    failures = list(store._client.remove_objects(bucket, [DeleteObject(info.key) for info in store.list(bucket)]))
    assert failures == []
    store._client.remove_bucket(bucket)
