"""What is needed stays, what is not goes, whatever happens beside the collector or to it: on the store in memory and on the real server."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from ml.errors import StorageError, WriteConflictError
from ml.garbage import clean_store
from ml.leases import Lease, run_lease
from ml.registry import Registry
from ml.retention import CleanUpReport, CleanUpRequest
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from ml.storage.memory import MemoryStore
from services.object_store import ObjectStoreEndpoint
from tests.ml.stored_runs import (
    STAGE,
    WatchedStore,
    add_checkpoint,
    add_version,
    all_keys,
    go_through,
    in_thread,
    make,
    run_id_of,
    simulate_run,
    sleeping_lease,
    stage_key,
    wait_for,
    write_config,
)
from tests.store_checker import find_problems

NAME = "reviews"
EVERYTHING = CleanUpRequest(dry_run=False, keep_runs=1, keep_run_days=0, grace_hours=0)


class KilledError(BaseException):
    """Ends the collector in the middle of what it does."""


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> ArtifactStore:
    return request.getfixturevalue("artifact_store" if request.param == "memory" else "s3_artifact_store")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collector and runs look for each other often, and the collector not so often that a run that does not wait would be safe."""
    monkeypatch.setattr("ml.leases.POLL_SECONDS", 0.001)
    monkeypatch.setattr("ml.garbage.CHECK_SECONDS", 0.05)


@dataclass
class Expected:
    needed: set[str]
    garbage: set[str]


def artifacts_of(store: ArtifactStore, number: int) -> set[str]:
    record = go_through(store, number)
    return {keys.artifact(record.own.sha256), keys.artifact(record.shared.sha256)}


def fill(store: ArtifactStore) -> Expected:
    """Runs, versions and rubbish of every kind, all older than a grace period of 0."""
    registry = Registry(store)
    garbage: set[str] = set()
    run_ids = [
        simulate_run(store, 1, NAME, [0, 1]),  # made the champion
        simulate_run(store, 2, NAME, [0, 2]),  # old: only stage 2 is its own
        simulate_run(store, 3, NAME, [3]),  # made the candidate
        simulate_run(store, 4, NAME, [4]),  # the last of its model
        simulate_run(store, 5, "other", [0, 5]),  # the last of another model
    ]
    garbage |= {info.key for info in store.objects.list(store.runs_bucket, f"runs/{run_ids[1]}/")}
    write_config(store, run_id_of(0), NAME)  # it was killed
    garbage.add(keys.run_file(run_id_of(0), "config.json"))

    versions = [add_version(store, NAME, number, run_ids[0]).version for number in range(3)]
    versions.append(add_version(store, NAME, 3, run_ids[2]).version)
    registry.promote(NAME, versions[1], "test", "first")
    registry.promote(NAME, versions[0], "test", "second")
    registry.set_candidate(NAME, versions[3], "test", "third")

    before = all_keys(store)
    go_through(store, 9)  # of no run
    garbage |= {key for key in all_keys(store) - before if "stages" in key} | artifacts_of(store, 9) - artifacts_of(store, 0)
    garbage.add(keys.stage_record(STAGE.name, stage_key(2)))
    garbage |= artifacts_of(store, 2) - artifacts_of(store, 5)  # those two share one
    garbage.add(keys.artifact(store.put_bytes(b"nothing names this").sha256))
    garbage |= {*add_checkpoint(store, 0, 10), *add_checkpoint(store, 77, 20)}
    store.objects.put(store.runs_bucket, "notes/of-somebody.txt", b"not ours")
    store.objects.put(store.datasets_bucket, "reviews/2026.csv", b"text,label")
    time.sleep(1.1)  # a store may tell times in whole seconds
    return Expected(all_keys(store) - garbage, garbage)


def problems(store: ArtifactStore) -> list[str]:
    return find_problems(store.objects, store.runs_bucket.removesuffix("runs"))


def test_what_is_needed_stays_and_all_else_goes(store: ArtifactStore):
    expected = fill(store)
    assert len(expected.garbage) == 13
    report = clean_store(store, EVERYTHING)
    assert all_keys(store) == expected.needed
    assert problems(store) == []
    assert {total.kind for total in report.totals} == {"run", "stage record", "checkpoint", "artifact"}
    assert sum(total.count for total in report.totals) == len(expected.garbage)
    assert report.size_bytes > 0 and report.remarks == ()
    assert report.run_ids == tuple(run_id_of(number) for number in (1, 3, 4, 5))
    again = clean_store(store, EVERYTHING)
    assert again.totals == ()
    assert all_keys(store) == expected.needed


def test_a_dry_run_tells_the_same_and_deletes_nothing(store: ArtifactStore):
    fill(store)
    before = all_keys(store)
    told = clean_store(store, EVERYTHING.model_copy(update={"dry_run": True}))
    assert all_keys(store) == before
    done = clean_store(store, EVERYTHING)
    assert (told.dry_run, done.dry_run) == (True, False)
    assert told.totals == done.totals and told.run_ids == done.run_ids


def test_what_is_young_stays(store: ArtifactStore):
    fill(store)
    before = all_keys(store)
    report = clean_store(store, EVERYTHING.model_copy(update={"grace_hours": 1.0}))
    assert before - all_keys(store) == set(add_checkpoint(store, 0, 10))  # its training is finished, whatever its age
    assert report.totals[0].reasons == {"its training is finished": 2}


def test_an_old_artifact_that_a_young_stage_record_names_stays(artifact_store: ArtifactStore, memory_store: MemoryStore):
    """The stage made bytes that were stored long before, so they were not written again. No run has named them yet."""
    made = make(artifact_store, 1)
    alone = artifact_store.put_bytes(b"nothing names this")
    objects = memory_store._buckets[artifact_store.runs_bucket]
    for key, (data, info) in objects.items():
        objects[key] = (data, replace(info, modified=info.modified - timedelta(hours=100)))
    go_through(artifact_store, 1)
    report = clean_store(artifact_store, EVERYTHING.model_copy(update={"grace_hours": 50.0}))
    assert report.totals[0].examples == (keys.artifact(alone.sha256),)
    assert artifact_store.get_bytes(made.own) and artifact_store.get_bytes(made.shared)
    assert problems(artifact_store) == []


def test_runs_stay_by_number_and_by_age(artifact_store: ArtifactStore):
    for number in range(6):
        simulate_run(artifact_store, number, NAME, [number])
    few = EVERYTHING.model_copy(update={"keep_runs": 2})
    assert clean_store(artifact_store, few.model_copy(update={"keep_run_days": 1.0})).run_ids == tuple(map(run_id_of, range(6)))
    assert clean_store(artifact_store, few).run_ids == tuple(map(run_id_of, (4, 5)))
    assert problems(artifact_store) == []


def test_nothing_goes_while_a_run_lives(store: ArtifactStore):
    fill(store)
    with run_lease(store, "a-run"):
        before = all_keys(store)
        report = clean_store(store, EVERYTHING)
        assert all_keys(store) == before
        assert report.totals == () and "a-run" in report.remarks[0]
        assert "a-run" in clean_store(store, EVERYTHING.model_copy(update={"dry_run": True})).remarks[0]
    assert clean_store(store, EVERYTHING).totals != ()


def test_a_clean_up_can_wait_for_a_run(artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ml.garbage.WAIT_SECONDS", 0.05)
    expected = fill(artifact_store)
    with run_lease(artifact_store, "a-run"):
        thread, result = in_thread(lambda: clean_store(artifact_store, EVERYTHING.model_copy(update={"wait_minutes": 1.0})))
        time.sleep(0.3)
        assert not result
    thread.join(30)
    assert isinstance(result[0], CleanUpReport) and result[0].totals
    assert all_keys(artifact_store) == expected.needed


def test_a_run_that_starts_meanwhile_goes_first_and_finds_whole_bytes(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    """It makes the very bytes that are about to be deleted, and reuses a stage whose record is about to be."""
    monkeypatch.setattr("ml.garbage.CHECK_SECONDS", 0.0)
    fill(store)
    watched = WatchedStore(store.objects)
    collected = ArtifactStore(watched, store.runs_bucket.removesuffix("runs"))
    started: list = []

    def start_a_run(_: str) -> None:
        if not started:
            started.append(in_thread(lambda: simulate_run(store, 50, NAME, [9, 2, 60])))
            wait_for(lambda: any("leases/2026" in key for key in all_keys(store)))
            time.sleep(0.3)
            assert started[0][1] == []  # it waits

    watched.before_delete = start_a_run
    report = clean_store(collected, EVERYTHING)
    assert sum(total.count for total in report.totals) == 1
    assert run_id_of(50) in report.remarks[0]
    thread, result = started[0]
    thread.join(30)
    assert result == [run_id_of(50)]
    assert problems(store) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("quick")
def test_runs_beside_the_collector_lose_nothing_in_memory(artifact_store: ArtifactStore, seed: int):
    num_runs, num_deleted = run_beside_collectors(artifact_store, seed=seed, seconds=4, delay=0.0005, rest=0.1)
    assert num_runs > 20 and num_deleted > 50


@pytest.mark.usefixtures("quick")
def test_runs_beside_the_collector_lose_nothing_on_the_server(s3_artifact_store: ArtifactStore):
    seed = random.SystemRandom().randrange(10**6)
    num_runs, num_deleted = run_beside_collectors(s3_artifact_store, seed=seed, seconds=12, delay=0, rest=1.5)
    assert num_runs > 5 and num_deleted > 5


def run_beside_collectors(store: ArtifactStore, *, seed: int, seconds: float, delay: float, rest: float) -> tuple[int, int]:
    """Three threads start runs over the same few stages, two collect all the time. Returns finished runs, deleted objects.

    Args:
        delay: before every call to the store, at most.
        rest: between two runs of a thread, at most.
    """
    print(f"seed {seed}")
    end = time.monotonic() + seconds
    watched = ArtifactStore(
        WatchedStore(store.objects, delay=lambda: time.sleep(random.uniform(0, delay))), store.runs_bucket.removesuffix("runs")
    )
    numbers, lock = iter(range(1, 10**6)), threading.Lock()

    def start_runs(generator: random.Random) -> int:
        finished = 0
        while time.monotonic() < end:
            with lock:
                number = next(numbers)
            stages = generator.sample(range(12), k=3)
            simulate_run(watched, number, generator.choice("abc"), stages, lambda: time.sleep(generator.uniform(0, 0.003)))
            finished += 1
            time.sleep(generator.uniform(0, rest))
        return finished

    def collect() -> int:
        deleted = 0
        while time.monotonic() < end:
            try:
                deleted += sum(total.count for total in clean_store(watched, EVERYTHING).totals)
            except WriteConflictError as error:  # the other collector was quicker
                assert keys.CLEAN_UP in str(error)
        return deleted

    threads = [in_thread(lambda index=index: start_runs(random.Random(seed + index))) for index in range(3)]
    threads += [in_thread(collect) for _ in range(2)]
    for thread, _ in threads:
        thread.join(seconds + 60)
    results = [result[0] for _, result in threads]
    assert all(isinstance(result, int) for result in results), results
    assert problems(store) == []
    return sum(results[:3]), sum(results[3:])


def test_a_collector_killed_anywhere_leaves_a_whole_store(artifact_store: ArtifactStore):
    expected = fill(artifact_store)
    watched = WatchedStore(artifact_store.objects)
    collected = ArtifactStore(watched, artifact_store.runs_bucket.removesuffix("runs"))

    def die(_: str) -> None:
        raise KilledError

    num_kills = 0
    while True:
        # Every time one deletion further: over all tries, every place is one to be killed at.
        allowed = iter([lambda _: None, die])
        watched.before_delete = lambda key: next(allowed)(key)  # noqa: B023, used up before the next round
        try:
            clean_store(collected, EVERYTHING)
        except KilledError:
            num_kills += 1
            assert problems(artifact_store) == []
            assert all_keys(artifact_store) >= expected.needed
            continue
        break
    assert num_kills == len(expected.garbage) - 1
    assert all_keys(artifact_store) == expected.needed


COLLECTOR = """
import os, sys, time
from ml.garbage import clean_store
from ml.retention import CleanUpRequest
from ml.storage.artifacts import ArtifactStore
from ml.storage.memory import MemoryStore
from ml.storage.s3 import S3Store
from tests.ml.stored_runs import WatchedStore
endpoint, prefix = sys.argv[1:]
watched = WatchedStore(S3Store(endpoint, os.environ["KEY"], os.environ["SECRET"]))
watched.before_delete = lambda key: (print(key, flush=True), time.sleep(0.02))
clean_store(ArtifactStore(watched, prefix), CleanUpRequest(dry_run=False, keep_runs=1, keep_run_days=0, grace_hours=0), lease_seconds=1)
"""


def kill_a_collector(store: ArtifactStore, endpoint: ObjectStoreEndpoint, generator: random.Random) -> int:
    """Fill the store, kill the collecting process at some moment, check; collect the rest, check. Returns what the first had tried."""
    expected = fill(store)
    prefix = store.runs_bucket.removesuffix("runs")
    environment = {**os.environ, "KEY": endpoint.access_key, "SECRET": endpoint.secret_key}
    process = subprocess.Popen(
        [sys.executable, "-c", COLLECTOR, endpoint.endpoint, prefix], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() != ""  # it has begun
        time.sleep(generator.uniform(0, 0.025 * len(expected.garbage)))
    finally:
        process.send_signal(signal.SIGKILL)
        num_tried = 1 + len(process.stdout.readlines())
        process.wait()
    assert problems(store) == []
    assert all_keys(store) - {keys.lease(keys.CLEAN_UP)} >= expected.needed
    clean_store(store, EVERYTHING)
    assert all_keys(store) == expected.needed
    assert problems(store) == []
    return num_tried


def test_a_killed_process_leaves_a_whole_store(s3_artifact_store: ArtifactStore, object_store_endpoint: ObjectStoreEndpoint):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    kill_a_collector(s3_artifact_store, object_store_endpoint, random.Random(seed))


@pytest.mark.soak
def test_killed_processes_leave_a_whole_store_in_a_loop(
    s3_artifact_store: ArtifactStore, object_store_endpoint: ObjectStoreEndpoint, record_property: Callable[[str, object], None]
):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    generator = random.Random(seed)
    tried = []
    for _ in range(20):
        tried.append(kill_a_collector(s3_artifact_store, object_store_endpoint, generator))
        for bucket in s3_artifact_store.buckets:
            for info in list(s3_artifact_store.objects.list(bucket)):
                s3_artifact_store.objects.delete(bucket, info.key)
    print(f"killed at deletion {tried}")
    record_property("killed_at", tried)
    assert len(set(tried)) > 3


def test_a_run_that_slept_leaves_nothing_that_hurts_the_next(artifact_store: ArtifactStore):
    """It lost its lease, its old bytes went, and it wrote a stage record that names them."""
    record = go_through(artifact_store, 1)
    with sleeping_lease(artifact_store, "asleep") as asleep:
        time.sleep(0.4)
        clean_store(artifact_store, EVERYTHING)
        assert artifact_store.objects.stat(artifact_store.runs_bucket, keys.artifact(record.own.sha256)) is None
        key = keys.stage_record(STAGE.name, stage_key(1))
        artifact_store.objects.put(artifact_store.runs_bucket, key, record.model_dump_json().encode())
        with pytest.raises(WriteConflictError, match="was revoked"):
            asleep.check()
    report = clean_store(artifact_store, EVERYTHING.model_copy(update={"grace_hours": 24.0}))
    assert report.totals[0].reasons == {"it, or an artifact that it names, cannot be read": 1}
    go_through(artifact_store, 1)


@pytest.mark.parametrize("damaged", ["manifest", "version", "aliases"])
def test_what_cannot_be_read_may_lead_to_anything_so_nothing_goes(artifact_store: ArtifactStore, damaged: str):
    store = artifact_store
    fill(store)
    version = Registry(store).read_aliases(NAME).champion
    bucket, key = {
        "manifest": (store.runs_bucket, keys.run_file(run_id_of(4), "manifest.json")),
        "version": (store.registry_bucket, keys.model_version(NAME, str(version))),
        "aliases": (store.registry_bucket, keys.model_aliases(NAME)),
    }[damaged]
    store.objects.put(bucket, key, b"{")
    before = all_keys(store)
    with pytest.raises(StorageError, match=f"{key} cannot be read"):
        clean_store(store, EVERYTHING)
    assert all_keys(store) == before


def test_a_damaged_stage_record_goes(artifact_store: ArtifactStore):
    simulate_run(artifact_store, 1, NAME, [1])
    artifact_store.objects.put(artifact_store.runs_bucket, keys.stage_record(STAGE.name, stage_key(1)), b"{")
    assert clean_store(artifact_store, EVERYTHING).totals[0].reasons == {"it, or an artifact that it names, cannot be read": 1}
    assert problems(artifact_store) == []


def test_versions_stay_unless_asked_for(store: ArtifactStore):
    run_id = simulate_run(store, 1, NAME, [1])
    versions = [add_version(store, NAME, number, run_id).version for number in range(5)]
    registry = Registry(store)
    registry.promote(NAME, versions[0], "test", "old but live")
    time.sleep(1.1)
    request = EVERYTHING.model_copy(update={"keep_versions": 2})
    assert clean_store(store, request).totals == ()
    deleting = request.model_copy(update={"delete_versions": True})
    told = clean_store(store, deleting.model_copy(update={"dry_run": True}))
    report = clean_store(store, deleting)
    assert registry.list_versions(NAME) == [versions[0], versions[3], versions[4]]
    assert {total.kind: total.count for total in report.totals} == {"model version": 2, "artifact": 2}
    assert told.totals == report.totals
    assert problems(store) == []
    assert clean_store(store, deleting).totals == ()


def test_a_version_that_is_promoted_while_it_is_deleted_comes_back(artifact_store: ArtifactStore):
    versions = [add_version(artifact_store, NAME, number, "run").version for number in range(3)]
    registry, watched = Registry(artifact_store), WatchedStore(artifact_store.objects)
    collected = ArtifactStore(watched, artifact_store.runs_bucket.removesuffix("runs"))
    watched.before_delete = lambda key: registry.promote(NAME, versions[0], "somebody", "now") if versions[0] in key else None
    clean_store(collected, EVERYTHING.model_copy(update={"keep_versions": 1, "delete_versions": True}))
    assert registry.read_aliases(NAME).champion == versions[0]
    assert registry.list_versions(NAME) == [versions[0], versions[2]]
    assert problems(artifact_store) == []


def test_two_collectors_do_not_work_at_once(artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ml.garbage.PATIENCE_SECONDS", 0.3)
    fill(artifact_store)
    before = all_keys(artifact_store)
    with Lease(artifact_store, keys.CLEAN_UP), pytest.raises(WriteConflictError, match="clean-up is at work already"):
        clean_store(artifact_store, EVERYTHING)
    assert all_keys(artifact_store) == before
