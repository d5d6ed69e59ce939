"""Runs, versions and rubbish in an object store, as small as they can be with everything that a collector looks at."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ml.artifacts import ArtifactRef, BundleRef, Record
from ml.leases import Lease, run_lease
from ml.registry import ModelVersion, Registry, version_id
from ml.stages import Stage, run_stage
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore, digest_bytes
from ml.storage.base import ObjectInfo, ObjectStore


class Made(Record):
    """What a stage of these tests leaves: an artifact of its own, and one that other stages make as well."""

    own: ArtifactRef
    shared: ArtifactRef


STAGE = Stage("make", 1, Made)
NUM_SHARED = 3


def stage_key(number: int) -> str:
    return digest_bytes(f"stage {number}".encode())[:40]


def make(store: ArtifactStore, number: int) -> Made:
    own, shared = f"own {number}".encode() * 50, f"shared {number % NUM_SHARED}".encode() * 50
    return Made(own=store.put_bytes(own), shared=store.put_bytes(shared))


def go_through(store: ArtifactStore, number: int) -> Made:
    """The stage of this number, computed or reused; its bytes are read, as the next stage would."""
    record = run_stage(store, STAGE, stage_key(number), lambda: make(store, number)).record
    store.get_bytes(record.own)
    store.get_bytes(record.shared)
    return record


def write_config(store: ArtifactStore, run_id: str, name: str) -> None:
    store.objects.put(store.runs_bucket, keys.run_file(run_id, "config.json"), json.dumps({"name": name}).encode())


def write_run(store: ArtifactStore, run_id: str, name: str, numbers: Sequence[int], records: Sequence[Made]) -> None:
    """The files of a finished run that went through these stages."""
    write_config(store, run_id, name)
    report = f"<html>{run_id}</html>".encode()
    store.objects.put(store.runs_bucket, keys.run_file(run_id, "report.html"), report)
    manifest = {
        "name": name,
        "records": {
            "made": [record.model_dump(mode="json") for record in records],
            "stages": [{"stage": "make", "key": stage_key(number)} for number in numbers],
        },
        "files": {"report.html": digest_bytes(report)},
    }
    store.objects.put(store.runs_bucket, keys.run_file(run_id, "manifest.json"), json.dumps(manifest).encode())


def run_id_of(number: int) -> str:
    """Sorts by number."""
    return f"20260101T{number // 3600:02d}{number // 60 % 60:02d}{number % 60:02d}Z-{number:06x}"


def simulate_run(
    store: ArtifactStore, number: int, name: str, stages: Sequence[int], pause: Callable[[], Any] = lambda: None, *, leased: bool = True
) -> str:
    """A run under its lease, as `flows.journal` holds it: stages one after the other, then the manifest."""
    run_id = run_id_of(number)

    def work() -> None:
        write_config(store, run_id, name)
        records = []
        for stage in stages:
            records.append(go_through(store, stage))
            pause()
        write_run(store, run_id, name, stages, records)

    if not leased:
        work()
        return run_id
    with run_lease(store, run_id) as lease:
        work()
        lease.check()
    return run_id


def add_version(store: ArtifactStore, name: str, number: int, run_id: str) -> ModelVersion:
    bundle = BundleRef(files={"bundle.json": store.put_bytes(f"bundle {name} {number}".encode())})
    created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    version = ModelVersion(
        name=name,
        version=version_id(created, bundle),
        solution="sentiment",
        bundle=bundle,
        schema_digest="schema",
        run_id=run_id,
        created=created,
    )
    return Registry(store).add_version(version)


def add_checkpoint(store: ArtifactStore, number: int, step: int) -> list[str]:
    stored = [keys.checkpoint_file(stage_key(number), step, file) for file in ("weights.safetensors", "manifest.json")]
    for key in stored:
        store.objects.put(store.runs_bucket, key, json.dumps({"step": step, "files": {}}).encode())
    return stored


def all_keys(store: ArtifactStore) -> set[str]:
    """Keys of all buckets."""
    return {info.key for bucket in store.buckets for info in store.objects.list(bucket)}


def sleeping_lease(store: ArtifactStore, holder: str) -> Lease:
    """A lease that nobody renews."""
    lease = Lease(store, holder, expires_seconds=0.3)
    lease._thread.run = lambda: None
    return lease


class WatchedStore:
    """Any object store, with something done before every deletion of what is not a lease.

    Args:
        delay: called before every call, to let other threads in between.
    """

    def __init__(self, objects: ObjectStore, *, delay: Callable[[], Any] = lambda: None):
        self._objects = objects
        self._delay = delay
        self.before_delete: Callable[[str], Any] = lambda key: None

    def ensure_bucket(self, bucket: str) -> None:
        self._objects.ensure_bucket(bucket)

    def put(self, bucket: str, key: str, data: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> ObjectInfo:
        self._delay()
        return self._objects.put(bucket, key, data, if_match=if_match, if_none_match=if_none_match)

    def get(self, bucket: str, key: str) -> bytes:
        return self.get_with_info(bucket, key)[0]

    def get_with_info(self, bucket: str, key: str) -> tuple[bytes, ObjectInfo]:
        self._delay()
        return self._objects.get_with_info(bucket, key)

    def download(self, bucket: str, key: str, path: Path) -> None:
        self._objects.download(bucket, key, path)

    def stat(self, bucket: str, key: str) -> ObjectInfo | None:
        self._delay()
        return self._objects.stat(bucket, key)

    def list(self, bucket: str, prefix: str = "") -> Any:
        self._delay()
        return self._objects.list(bucket, prefix)

    def delete(self, bucket: str, key: str) -> None:
        self._delay()
        if not key.startswith("leases/"):
            self.before_delete(key)
        self._objects.delete(bucket, key)


def wait_for(condition: Callable[[], Any], timeout_seconds: float = 30) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start a thread; the list takes its result, or the exception that ended it."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result
