"""A store that refuses, breaks off, stays silent or is full: what the client makes of it, and what a run leaves behind.

The store is the real one. Faults come from a proxy in front of it (faulty_proxy.py), or from the store really being full.
"""

import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from ml.artifacts import ArtifactRef, BundleRef, Record
from ml.config import RunRequest
from ml.errors import DeploymentError, StorageError, StorageUnavailableError, WriteConflictError
from ml.outcome import RunRecords, build_outcome
from ml.registry import ModelVersion, Registry, version_id
from ml.runs import finish_run, start_run
from ml.stages import Stage, run_stage
from ml.storage import s3
from ml.storage.artifacts import ArtifactStore, digest_bytes
from ml.storage.checkpoints import StoredCheckpoints
from ml.storage.s3 import S3Store
from services import object_store
from services.object_store import ObjectStoreEndpoint
from tests.faults.faulty_proxy import (
    Fault,
    FaultyProxy,
    RandomFaults,
    always,
    cut_reply,
    drain_slowly,
    drip,
    first,
    forward,
    hang,
    lose_reply,
    refuse,
    reset_in_reply,
    reset_in_request,
)
from tests.store_checker import find_problems

BUSY: dict[str, Fault] = {
    "slow down": refuse(503, "SlowDown"),
    "internal error": refuse(500, "InternalError"),
    "reset in the request": reset_in_request,
    "reply lost": lose_reply,
    "reset in the reply": reset_in_reply,
    "reply cut": cut_reply,
    "silence": hang,
}
REFUSALS: dict[str, tuple[Fault, str]] = {
    "disk full": (refuse(507, "XMinioStorageFull"), "full.*raise the quota"),
    "quota of the user": (refuse(403, "QuotaExceeded"), "full.*raise the quota"),
    "quota of the bucket": (refuse(400, "XMinioAdminBucketQuotaExceeded"), "full.*raise the quota"),
    "not allowed": (refuse(403, "AccessDenied"), "access refused.*MILLSTREAM_S3_ACCESS_KEY"),
}


@pytest.fixture
def proxy(object_store_endpoint: ObjectStoreEndpoint) -> Iterator[FaultyProxy]:
    with FaultyProxy(object_store_endpoint.endpoint) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy: FaultyProxy, object_store_endpoint: ObjectStoreEndpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Store]:
    """A client that meets the proxy's faults, and is quicker to lose patience than in earnest."""
    monkeypatch.setattr(s3, "FIRST_BACKOFF_SECONDS", 0.01)

    def connect(**options: float) -> S3Store:
        patience = {"timeout_seconds": 0.7, "num_attempts": 3, **options}
        return S3Store(proxy.endpoint, object_store_endpoint.access_key, object_store_endpoint.secret_key, **patience)  # type: ignore[arg-type]

    return connect


@pytest.fixture
def bucket(s3_artifact_store: ArtifactStore) -> str:
    return s3_artifact_store.runs_bucket


# ---- One call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", BUSY)
def test_a_fault_that_passes_is_not_noticed(fault: str, proxy: FaultyProxy, connect: Callable[..., S3Store], bucket: str, tmp_path: Path):
    store = connect()

    def once(call: Callable[[], object]) -> object:
        proxy.choose = first(1, BUSY[fault])
        return call()

    once(lambda: store.put(bucket, "key", b"some bytes"))
    assert once(lambda: store.get(bucket, "key")) == b"some bytes"
    once(lambda: store.download(bucket, "key", tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"some bytes"
    assert once(lambda: store.stat(bucket, "key")).size_bytes == 10  # type: ignore[attr-defined]
    assert [info.key for info in once(lambda: store.list(bucket))] == ["key"]  # type: ignore[attr-defined]
    once(lambda: store.delete(bucket, "key"))
    assert store.stat(bucket, "key") is None
    assert proxy.faults_met == 6


@pytest.mark.parametrize("fault", BUSY)
def test_a_fault_that_lasts_is_told_and_may_be_tried_again(fault: str, proxy: FaultyProxy, connect: Callable[..., S3Store], bucket: str):
    proxy.choose = always(BUSY[fault])
    with pytest.raises(StorageUnavailableError, match=f"could not write {bucket}/some/key at {proxy.endpoint}") as caught:
        connect(num_attempts=2).put(bucket, "some/key", b"some bytes")
    assert caught.value.retryable
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_told_once_with_advice(
    refusal: str, proxy: FaultyProxy, connect: Callable[..., S3Store], bucket: str, s3_store: S3Store
):
    fault, advice = REFUSALS[refusal]
    proxy.choose = always(fault)
    for conditional in (False, True):
        with pytest.raises(StorageError, match=f"{bucket}/key.*{proxy.endpoint}.*{advice}") as caught:
            connect().put(bucket, "key", b"some bytes", if_none_match=conditional)
        assert not caught.value.retryable
    assert len(proxy.requests) == 2
    assert s3_store.stat(bucket, "key") is None


def test_a_body_that_drips_is_given_up(proxy: FaultyProxy, connect: Callable[..., S3Store], bucket: str, s3_store: S3Store, tmp_path: Path):
    s3_store.put(bucket, "key", bytes(2000))  # 100 s at the pace of the drip, which is never silent for long
    proxy.choose = always(drip)
    store = connect(num_attempts=2)
    with pytest.raises(StorageUnavailableError, match="did not arrive within 1 s"):
        store.get(bucket, "key")
    with pytest.raises(StorageUnavailableError, match="did not arrive within 1 s"):
        store.download(bucket, "key", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_slow_line_has_more_time_to_send_than_to_connect(
    proxy: FaultyProxy, connect: Callable[..., S3Store], bucket: str, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "CONNECT_TIMEOUT_SECONDS", 0.2)
    data = os.urandom(s3.PART_BYTES)  # more than the system's buffers swallow
    proxy.choose = always(drain_slowly(4_000_000))
    connect(num_attempts=1, timeout_seconds=30).put(bucket, "key", data)
    assert s3_store.get(bucket, "key") == data


@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
def test_the_store_is_left_alone_as_long_as_it_asks(
    as_date: bool, proxy: FaultyProxy, connect: Callable[..., S3Store], bucket: str, monkeypatch: pytest.MonkeyPatch
):
    pauses: list[float] = []
    monkeypatch.setattr(s3, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    retry_after = format_datetime(datetime.now(UTC) + timedelta(seconds=41), usegmt=True) if as_date else "40"
    proxy.choose = first(1, refuse(503, "SlowDown", retry_after=retry_after))
    connect().put(bucket, "key", b"some bytes")
    assert len(pauses) == 1
    assert 39 < pauses[0] < 46

    proxy.choose = always(refuse(503, "SlowDown", retry_after="3600"))  # longer than anybody should hang in one call
    with pytest.raises(StorageUnavailableError):
        connect().put(bucket, "key", b"some bytes")
    assert len(pauses) == 1


def test_pauses_grow_and_differ(proxy: FaultyProxy, connect: Callable[..., S3Store], bucket: str, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(s3, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    monkeypatch.setattr(s3, "FIRST_BACKOFF_SECONDS", 0.25)
    proxy.choose = always(refuse(503, "SlowDown"))
    for _ in range(2):
        with pytest.raises(StorageUnavailableError):
            connect(num_attempts=6).get(bucket, "key")
    assert len(set(pauses)) == 10
    for pause, nominal in zip(pauses, [0.25, 0.5, 1, 2, 4] * 2, strict=True):
        assert nominal / 2 <= pause <= nominal * 1.5


@pytest.mark.parametrize("fault", ["slow down", "reset in the request", "reply lost", "reply cut"])
def test_a_large_object_is_whole_or_not_there(
    fault: str,
    proxy: FaultyProxy,
    connect: Callable[..., S3Store],
    bucket: str,
    s3_store: S3Store,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(11 * 2**20))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    store = connect(num_attempts=1, timeout_seconds=10)
    for number in range(5):  # begin, three parts, complete: the fault meets each of them, and the abort after it
        proxy.requests.clear()
        proxy.choose = lambda request, number=number: BUSY[fault] if len(proxy.requests) > number else forward
        with pytest.raises(StorageError):
            store.put(bucket, f"large-{number}", path)
        found = s3_store.stat(bucket, f"large-{number}")
        assert found is None or hashlib.sha256(s3_store.get(bucket, found.key)).hexdigest() == digest
    proxy.choose = always(forward)
    store.put(bucket, "large", path)
    assert hashlib.sha256(s3_store.get(bucket, "large")).hexdigest() == digest


# ---- A whole run ------------------------------------------------------------------------------------------------


class Made(Record):
    file: ArtifactRef


MAKE = Stage("make", 1, Made)
MODEL = "reviews"
REQUEST = RunRequest(solution="sentiment", name=MODEL)


def run_once(store: ArtifactStore, folder: Path, number: int) -> str:
    """What a training run writes, in its order: config, stages, checkpoints, version, alias, report, manifest."""
    run = start_run(store, REQUEST)
    for part in range(2):
        key = MAKE.key(number, part)
        run_stage(store, MAKE, key, lambda part=part: Made(file=store.put_bytes(f"artifact {number} {part}".encode() * 100)))
    checkpoints = StoredCheckpoints(store, MAKE.key(number))
    for step in (1, 2, 3):
        checkpoints.push(step, write_checkpoint(folder / f"{number}-{step}", step))
    bundle = BundleRef(files={"bundle.json": store.put_bytes(f"bundle {number}".encode())})
    created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    version = ModelVersion(
        name=MODEL,
        version=version_id(created, bundle),
        solution="sentiment",
        bundle=bundle,
        schema_digest="schema",
        run_id="the same in every attempt",
        created=created,
    )
    registry = Registry(store)
    registry.add_version(version)
    registry.promote(MODEL, version.version, "test", f"run {number}")
    checkpoints.delete_all()
    records = RunRecords()
    finish_run(store, run, records, build_outcome(run.run_id, run.config, records, run.started, datetime.now(UTC)), "<html></html>")
    return version.version


def write_checkpoint(folder: Path, step: int) -> Path:
    (folder / "rank-0").mkdir(parents=True, exist_ok=True)
    (folder / "rank-0" / "weights").write_bytes(f"weights {step}".encode() * 50)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    return folder


def checkpoint_problems(store: ArtifactStore) -> list[str]:
    """Manifests of checkpoints that name what is not there."""
    found = {info.key: store.objects.get(store.runs_bucket, info.key) for info in store.objects.list(store.runs_bucket, "checkpoints/")}
    problems = []
    for key in (key for key in found if key.endswith("/manifest.json")):
        for name, digest in json.loads(found[key])["files"].items():
            file = key.removesuffix("manifest.json") + name
            if file not in found or digest_bytes(found[file]) != digest:
                problems.append(f"{key}: {name} is missing or another")
    return problems


def assert_nothing_partial(store: ArtifactStore, prefix: str) -> None:
    assert find_problems(store.objects, prefix) == []
    assert checkpoint_problems(store) == []


def recover_from_random_faults(
    seed: int, proxy: FaultyProxy, store: ArtifactStore, direct: ArtifactStore, prefix: str, tmp_path: Path
) -> None:
    """Runs under faults until each is through; nothing partial at any time, and the aliases are what was last promoted."""
    chance = random.Random(seed)
    registry = Registry(direct)
    for number in range(3):
        before = registry.read_aliases(MODEL)
        version, failures = None, 0
        while version is None:
            proxy.choose = RandomFaults(chance.randrange(2**32), 0.25 / (1 + failures), tuple(BUSY.values()))
            try:
                version = run_once(store, tmp_path, number)
            except (StorageError, DeploymentError) as error:
                assert isinstance(error, StorageUnavailableError | WriteConflictError), f"seed {seed}: {error!r}"
                failures += 1
            proxy.choose = always(forward)
            assert_nothing_partial(direct, prefix)
            now = registry.read_aliases(MODEL)
            assert now.generation - before.generation in (0, 1), f"seed {seed}: a move was made twice"
            assert now.generation > before.generation or now == before, f"seed {seed}"
        now = registry.read_aliases(MODEL)
        assert (now.champion, now.previous, now.generation) == (version, before.champion, number + 1), f"seed {seed}"
    whole = [info.key for info in direct.objects.list(direct.runs_bucket, "runs/") if info.key.endswith("/manifest.json")]
    assert len(whole) >= 3, f"seed {seed}"


@pytest.fixture
def faulty_store(connect: Callable[..., S3Store], bucket_prefix: str) -> ArtifactStore:
    return ArtifactStore(connect(num_attempts=2, timeout_seconds=0.5), bucket_prefix)


def test_runs_get_through_random_faults_and_leave_nothing_partial(
    proxy: FaultyProxy, faulty_store: ArtifactStore, s3_artifact_store: ArtifactStore, bucket_prefix: str, tmp_path: Path
):
    recover_from_random_faults(1, proxy, faulty_store, s3_artifact_store, bucket_prefix, tmp_path)
    assert proxy.faults_met > 10


@pytest.mark.soak
@pytest.mark.parametrize("seed", random.Random(os.environ.get("MILLSTREAM_TEST_SEED", 20261124)).sample(range(10**6), 20))
def test_runs_get_through_random_faults_with_any_seed(
    seed: int, proxy: FaultyProxy, faulty_store: ArtifactStore, s3_artifact_store: ArtifactStore, bucket_prefix: str, tmp_path: Path
):
    recover_from_random_faults(seed, proxy, faulty_store, s3_artifact_store, bucket_prefix, tmp_path)


def test_a_store_that_is_full_from_any_write_on_leaves_nothing_partial(
    proxy: FaultyProxy, faulty_store: ArtifactStore, s3_artifact_store: ArtifactStore, bucket_prefix: str, tmp_path: Path
):
    number, (full, _) = 0, REFUSALS["disk full"]
    while True:
        left = iter(range(number))
        proxy.choose = lambda request, left=left: forward if not request.writes or next(left, None) is not None else full
        try:
            run_once(faulty_store, tmp_path, 1)
            break
        except StorageError as error:
            assert not error.retryable
        proxy.choose = always(forward)
        assert_nothing_partial(s3_artifact_store, bucket_prefix)
        number += 1
    assert number > 10
    assert_nothing_partial(s3_artifact_store, bucket_prefix)


# ---- A store that is really full --------------------------------------------------------------------------------


def weed_shell(state_dir: Path, command: str) -> str:
    """A command for the administrator of the embedded store."""
    ports = json.loads((state_dir / "ports.json").read_bytes())

    def address(part: str) -> str:
        return f"127.0.0.1:{ports[f'object-store.{part}.port']}.{ports[f'object-store.{part}.port.grpc']}"

    arguments = [str(object_store.find_binary()), "shell", f"-master={address('master')}", f"-filer={address('filer')}"]
    script = f"lock\n{command}\nunlock\n"
    return subprocess.run(arguments, input=script, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_bucket_over_its_quota_stops_a_run_and_the_run_goes_on_when_there_is_room(
    object_store_state_dir: Path, s3_artifact_store: ArtifactStore, bucket_prefix: str, tmp_path: Path
):
    store, bucket = s3_artifact_store, s3_artifact_store.runs_bucket
    run_once(store, tmp_path, 1)
    store.put_bytes(os.urandom(2 * 2**20))
    weed_shell(object_store_state_dir, f"s3.bucket.quota -op=set -name={bucket} -sizeMB=1")
    while "read only" not in weed_shell(object_store_state_dir, "s3.bucket.quota.enforce -apply"):
        time.sleep(1)  # the server counts what a bucket holds every few seconds
    with pytest.raises(StorageUnavailableError, match=f"could not write {bucket}/.*quota is full"):
        run_once(store, tmp_path, 2)
    assert_nothing_partial(store, bucket_prefix)
    assert len(Registry(store).list_versions(MODEL)) == 1

    weed_shell(object_store_state_dir, f"s3.bucket.quota -op=set -name={bucket} -sizeMB=100")
    weed_shell(object_store_state_dir, "s3.bucket.quota.enforce -apply")
    version = run_once(store, tmp_path, 2)
    assert Registry(store).read_aliases(MODEL).champion == version
    assert_nothing_partial(store, bucket_prefix)


@pytest.mark.slow
def test_a_store_without_room_stops_a_run_and_the_run_goes_on_when_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start_process = object_store.start_process
    monkeypatch.setattr(s3, "FIRST_BACKOFF_SECONDS", 0.05)

    def start_small(name: str, command: list[str], **options: object) -> object:
        small = [part for part in command if not part.startswith("-master.volumeSizeLimitMB")]
        return start_process(name, [*small, "-master.volumeSizeLimitMB=1", "-volume.max=5"], **options)  # type: ignore[arg-type]

    state_dir = tmp_path / "state"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(object_store, "start_process", start_small)
            endpoint = object_store.start_object_store(state_dir)
        store = ArtifactStore(S3Store(endpoint.endpoint, endpoint.access_key, endpoint.secret_key), "full-")
        store.ensure_buckets()
        with pytest.raises(StorageUnavailableError, match=r"could not write full-runs/.*disk or the bucket's quota is full"):
            for number in range(100):
                run_once(store, tmp_path, number)
                store.put_bytes(os.urandom(2**18))
        assert_nothing_partial(store, "full-")

        object_store.stop_object_store(state_dir)
        endpoint = object_store.start_object_store(state_dir)
        store = ArtifactStore(S3Store(endpoint.endpoint, endpoint.access_key, endpoint.secret_key), "full-")
        version = run_once(store, tmp_path, 100)
        assert Registry(store).read_aliases(MODEL).champion == version
        assert_nothing_partial(store, "full-")
    finally:
        object_store.stop_object_store(state_dir)
