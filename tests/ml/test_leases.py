"""Who uses the store is seen by who would delete from it, and the other way round: on the store in memory and on the real server."""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ml.errors import StorageUnavailableError, WriteConflictError
from ml.leases import Lease, live_runs, run_lease, store_time, wait_until_free
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from ml.storage.memory import MemoryStore
from tests.ml.stored_runs import in_thread, sleeping_lease, wait_for


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> ArtifactStore:
    return request.getfixturevalue("artifact_store" if request.param == "memory" else "s3_artifact_store")


def renewals(store: ArtifactStore, holder: str) -> int:
    return json.loads(store.objects.get(store.runs_bucket, keys.lease(holder)))["renewals"]


def later(store: ArtifactStore, seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_a_lease_is_there_for_as_long_as_it_is_held(store: ArtifactStore):
    assert live_runs(store, later(store, 0), revoke=True) == ()
    with run_lease(store, "run-1"), run_lease(store, "run-2") as lease:
        assert live_runs(store, later(store, 0), revoke=True) == ("run-1", "run-2")
        assert abs((store_time(store, "run-1") - datetime.now(UTC)).total_seconds()) < 60
        lease.check()
    assert list(store.objects.list(store.runs_bucket)) == []


def test_a_lease_is_renewed_and_its_holder_keeps_it(store: ArtifactStore):
    with Lease(store, "run", expires_seconds=1) as lease:
        wait_for(lambda: renewals(store, "run") >= 3)
        lease.check()
        assert live_runs(store, later(store, 0), revoke=False) == ("run",)


def test_a_lease_that_is_not_renewed_is_revoked_and_its_holder_learns_of_it(store: ArtifactStore):
    with Lease(store, "asleep", expires_seconds=600) as asleep, Lease(store, "awake", expires_seconds=3600):
        assert live_runs(store, later(store, 590), revoke=True) == ("asleep", "awake")
        assert live_runs(store, later(store, 700), revoke=False) == ("awake",)
        asleep.check()
        assert live_runs(store, later(store, 700), revoke=True) == ("awake",)
        asleep._renew()
        with pytest.raises(WriteConflictError, match=r"the lease of asleep was revoked.*run it again"):
            asleep.check()
    assert list(store.objects.list(store.runs_bucket)) == []


def test_a_holder_who_slept_asks_the_store_before_it_goes_on(artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    with Lease(artifact_store, "asleep") as lease:
        artifact_store.objects.delete(artifact_store.runs_bucket, keys.lease("asleep"))
        lease.check()  # it was renewed a moment ago: there is no reason to ask
        woken = time.clock_gettime(time.CLOCK_BOOTTIME) + 400
        monkeypatch.setattr("ml.leases._clock", lambda: woken)
        with pytest.raises(WriteConflictError, match="was revoked"):
            lease.check()


def test_a_store_that_does_not_answer_takes_no_lease_away(
    artifact_store: ArtifactStore, memory_store: MemoryStore, monkeypatch: pytest.MonkeyPatch
):
    with Lease(artifact_store, "run", expires_seconds=0.5) as lease:
        put = MemoryStore.put

        def refuse(*args: object, **kwargs: object) -> None:
            raise StorageUnavailableError("no answer")

        monkeypatch.setattr(MemoryStore, "put", refuse)
        time.sleep(0.6)
        with pytest.raises(StorageUnavailableError):
            lease.check()
        monkeypatch.setattr(MemoryStore, "put", put)
        wait_for(lambda: renewals(artifact_store, "run") >= 1)
        lease.check()


@pytest.mark.parametrize("written", [False, True], ids=["not written", "reply lost"])
def test_a_store_that_hiccups_does_not_refuse_a_lease(artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, written: bool):
    put, calls = MemoryStore.put, []

    def hiccup(self: MemoryStore, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        info = put(self, *args, **kwargs) if written or len(calls) > 1 else None
        if len(calls) == 1:
            raise StorageUnavailableError("no answer")
        return info

    monkeypatch.setattr(MemoryStore, "put", hiccup)
    with Lease(artifact_store, "run") as lease:
        assert len(calls) == 2
        lease._renew()
        lease.check()


def test_only_one_holds_a_lease(store: ArtifactStore):
    with Lease(store, keys.CLEAN_UP), pytest.raises(WriteConflictError):
        Lease(store, keys.CLEAN_UP).__enter__()
    with Lease(store, keys.CLEAN_UP):
        pass


def test_a_run_waits_for_the_collector(store: ArtifactStore):
    with Lease(store, keys.CLEAN_UP):
        lease = run_lease(store, "run")
        thread, result = in_thread(lease.__enter__)
        wait_for(lambda: live_runs(store, later(store, 0), revoke=False) == ("run",))
        thread.join(0.5)
        assert thread.is_alive()
    thread.join(10)
    assert isinstance(result[0], Lease)
    lease.__exit__(None, None, None)


def test_a_run_does_not_wait_for_a_dead_collector(store: ArtifactStore):
    dead = sleeping_lease(store, keys.CLEAN_UP)
    dead.__enter__()
    with run_lease(store, "run"):
        with pytest.raises(WriteConflictError):
            dead._renew()
            dead.check()
        assert store.objects.stat(store.runs_bucket, keys.lease(keys.CLEAN_UP)) is None


def test_patience_with_a_living_holder_ends(artifact_store: ArtifactStore):
    with Lease(artifact_store, keys.CLEAN_UP, expires_seconds=1), pytest.raises(WriteConflictError, match="at work already: process"):
        wait_until_free(artifact_store, keys.CLEAN_UP, timeout_seconds=2)


def test_a_lease_of_another_is_not_given_back(store: ArtifactStore):
    first = Lease(store, keys.CLEAN_UP)
    first.__enter__()
    store.objects.delete(store.runs_bucket, keys.lease(keys.CLEAN_UP))
    with Lease(store, keys.CLEAN_UP) as second:
        first.__exit__(None, None, None)
        second._renew()
        second.check()


@pytest.mark.parametrize("content", [b"", b"{", b'{"holder": 3}'])
def test_a_damaged_lease_counts_as_a_live_run(artifact_store: ArtifactStore, content: bytes):
    artifact_store.objects.put(artifact_store.runs_bucket, keys.lease("damaged"), content)
    assert live_runs(artifact_store, later(artifact_store, 500), revoke=True) == ("damaged",)
    assert live_runs(artifact_store, later(artifact_store, 700), revoke=True) == ()
