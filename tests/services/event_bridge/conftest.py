import time
from collections.abc import Iterator

import pytest

from tests.services.event_bridge.fake_prefect import FakePrefect
from tests.services.event_bridge.serving import CSV, Bridge, Clock, ServedBridge


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
def prefect(clock: Clock) -> Iterator[FakePrefect]:
    """A Prefect server that trains `sentiment` and `support`."""
    fake = FakePrefect(clock)
    fake.deploy("sentiment")
    fake.deploy("support")
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def bridge(tmp_path, prefect, s3_artifact_store, clock) -> Iterator[Bridge]:
    """Stepped by hand. It has looked at the empty bucket and will not look again."""
    bridge = Bridge(tmp_path / "queue", prefect.api_url, lambda: s3_artifact_store, clock)
    bridge.step()
    yield bridge
    bridge.close()


@pytest.fixture
def polling_bridge(tmp_path, prefect, s3_artifact_store, clock) -> Iterator[Bridge]:
    """Stepped by hand. It lists the bucket at its first step, and every minute."""
    bridge = Bridge(tmp_path / "polling-queue", prefect.api_url, lambda: s3_artifact_store, clock, dataset_poll=60)
    yield bridge
    bridge.close()


@pytest.fixture
def served(bridge, s3_artifact_store, clock) -> Iterator[ServedBridge]:
    """Over HTTP, with its own thread."""
    with ServedBridge(bridge, s3_artifact_store.datasets_bucket, clock) as served:
        yield served


@pytest.fixture
def put(s3_artifact_store):
    """Puts an object of `sentiment` into the datasets bucket; returns its address."""

    def put(file_name: str, data: bytes = CSV, name: str = "sentiment") -> str:
        bucket = s3_artifact_store.datasets_bucket
        s3_artifact_store.objects.put(bucket, f"{name}/{file_name}", data)
        return f"s3://{bucket}/{name}/{file_name}"

    return put
