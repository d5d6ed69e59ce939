"""Deletes from the runs bucket what nothing refers to.

Roots are the model versions in the registry, the retained runs, and every object younger than the grace period. A
retained run's manifest names artifacts, and the keys of the stages it went through; a stage record names artifacts.
Checkpoints are for trainings that go on. What no root leads to is garbage.

Why nothing is lost that anybody needs:

1. While a run lives, nothing is deleted here. An old artifact that no record names may be just what a run is about to
   produce again, and then finds stored already; an old stage record may be what it reuses. So both sides hold leases
   (`ml.leases`), each writes its own before it looks for the other's, and hence one sees the other: the run then waits
   for the collector, the collector stops at a run, within CHECK_SECONDS. It plans under its lease, so a plan is never
   older than a run.
2. A run that is taken for dead, but only slept, loses its lease before anything is deleted, and ends at its next step.
   What it may have written after that are stage records whose bytes are gone. A record of that kind is garbage whatever
   its age: it is only a cache, and is computed anew.
3. What refers goes before what it refers to: a run's manifest before its other files, versions and stage records before
   artifacts, a checkpoint's manifest before its files. A collector that is killed anywhere leaves nothing that names
   bytes that are gone, only garbage for the next one.
4. Whoever else reads (the predictor, a rollback, a report) starts from an alias, a version or a retained run. Whoever
   writes without a lease is protected by the grace period for what they wrote, and by `ml.leases.run_lease` for all.
5. A root that cannot be read may lead to anything: then nothing is deleted, and an error says which one it is.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from ml.errors import ObjectNotFoundError, StorageError
from ml.leases import CLEAN_UP_LEASE_SECONDS, Lease, live_runs, store_time, wait_until_free
from ml.registry import Registry
from ml.retention import CleanUpReport, CleanUpRequest, Garbage, delete_version, expired_versions, retained_runs, sum_up
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from ml.storage.base import ObjectInfo

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
WAIT_SECONDS = 10.0

Check = Callable[[], None]


class RunStartedError(StorageError):
    """A run began while garbage was collected; it goes first."""


@dataclass(frozen=True)
class Plan:
    """What may go, in the order in which it may go, and the runs that stay."""

    garbage: tuple[Garbage, ...]
    run_ids: tuple[str, ...]


def clean_store(store: ArtifactStore, request: CleanUpRequest, *, lease_seconds: float = CLEAN_UP_LEASE_SECONDS) -> CleanUpReport:
    """Delete what has had its time and what nothing refers to; in a dry run only tell it.

    While runs are live, or as soon as one starts, the rest is left for another time; the remarks of the report say so.

    Args:
        lease_seconds: a collector that is silent this long is taken for dead.

    Raises:
        StorageError: a run or version cannot be read, so that nobody knows what it refers to.
        WriteConflictError: another clean-up is at work.
    """
    if request.dry_run:
        now = datetime.now(UTC)
        live = live_runs(store, now, revoke=False)
        plan = make_plan(store, request, now, set(expired_versions(Registry(store), request, now)))
        remarks = (f"nothing of this would be deleted while runs are going on: {', '.join(live)}",) if live else ()
        return sum_up(plan.garbage, dry_run=True, run_ids=plan.run_ids, remarks=remarks)

    deadline = time.monotonic() + request.wait_minutes * 60
    deleted: list[Garbage] = []
    while True:
        try:
            run_ids = _collect(store, request, lease_seconds, deleted)
            return sum_up(deleted, dry_run=False, run_ids=run_ids)
        except RunStartedError as started:
            if time.monotonic() >= deadline:
                run_ids = sorted({owner for kind, owner, _ in _listed(store) if kind == "run"})
                return sum_up(deleted, dry_run=False, run_ids=run_ids, remarks=(str(started),))
            time.sleep(min(WAIT_SECONDS, max(0.0, deadline - time.monotonic())))


def _collect(store: ArtifactStore, request: CleanUpRequest, lease_seconds: float, deleted: list[Garbage]) -> tuple[str, ...]:
    """One try; what it deletes is added to `deleted`. Returns the ids of the runs that stay. Raises RunStartedError, too."""
    wait_until_free(store, keys.CLEAN_UP, timeout_seconds=PATIENCE_SECONDS)
    with Lease(store, keys.CLEAN_UP, expires_seconds=lease_seconds) as lease:
        now = store_time(store, keys.CLEAN_UP)
        check = _checking(store, lease, now)
        for name, version in list(expired_versions(Registry(store), request, now)):
            check()
            if delete_version(store, name, version):
                deleted.append(_version_garbage(name, version))
        plan = make_plan(store, request, now, set(), check)
        for item in plan.garbage:
            check()
            store.objects.delete(store.runs_bucket, item.place)
            deleted.append(item)
        return plan.run_ids


def _checking(store: ArtifactStore, lease: Lease, started: datetime) -> Check:
    """A check to be made before every call that deletes: the lease holds, and no run is live (asked every CHECK_SECONDS)."""
    asked = float("-inf")

    def check() -> None:
        nonlocal asked
        lease.check()
        if (now := time.monotonic()) - asked >= CHECK_SECONDS:
            # Only at first are leases revoked: who is silent later on, began before.
            if live := live_runs(store, started, revoke=asked == float("-inf")):
                raise RunStartedError(f"what is left stays for another time, since runs are going on: {', '.join(live)}")
            asked = now

    return check


def make_plan(
    store: ArtifactStore, request: CleanUpRequest, now: datetime, versions: set[tuple[str, str]], check: Check = lambda: None
) -> Plan:
    """Find all garbage.

    Args:
        now: by the clock of the store.
        versions: (name, version) that are to be deleted, and so are no roots.
        check: called before every object is read; what it raises ends the planning.
    """
    check()
    objects: dict[str, dict[str, list[ObjectInfo]]] = defaultdict(lambda: defaultdict(list))
    for kind, owner, info in _listed(store):
        objects[kind][owner].append(info)
    stored = set(objects["artifact"])

    def is_young(infos: list[ObjectInfo]) -> bool:
        return any(now - info.modified <= request.grace for info in infos)

    digests, needed = _read_registry(store, versions, check)
    manifests, names = _read_runs(store, objects["run"], check)
    kept_runs = retained_runs(names, needed, request, now)
    stage_keys = set()
    for run_id in kept_runs & manifests.keys():
        if manifests[run_id] is None:
            raise _unreadable(store.runs_bucket, keys.run_file(run_id, "manifest.json"))
        digests |= set(named_digests(manifests[run_id]))
        stage_keys |= {timing["key"] for timing in manifests[run_id]["records"].get("stages", ())}

    garbage = [_version_garbage(name, version) for name, version in sorted(versions)]
    for run_id in sorted(objects["run"].keys() - kept_runs):
        reason = f"not of the last {request.keep_runs} runs of its model, and old"
        garbage += [_garbage("run", info, reason) for info in sorted(objects["run"][run_id], key=_run_file_order)]
    for stage_key, infos in objects["stage record"].items():
        for info in infos:
            if stage_key not in stage_keys and not is_young([info]):
                garbage.append(_garbage("stage record", info, "no retained run went through it"))
                continue
            check()
            found = _read_json(store, info.key)
            named = set(named_digests(found))
            # Without a lease, as in a dry run, things are written while they are listed: what is missing is asked for again.
            if found is None or any(store.objects.stat(store.runs_bucket, keys.artifact(digest)) is None for digest in named - stored):
                garbage.append(_garbage("stage record", info, "it, or an artifact that it names, cannot be read"))
            else:
                digests |= named
    for stage_key, infos in objects["checkpoint"].items():
        finished = stage_key in objects["stage record"]
        if finished or not is_young(infos):
            reason = "its training is finished" if finished else "its training was given up"
            garbage += [_garbage("checkpoint", info, reason) for info in sorted(infos, key=lambda info: "/manifest.json" not in info.key)]
    for digest, infos in objects["artifact"].items():
        if digest not in digests and not is_young(infos):
            garbage += [_garbage("artifact", info, "nothing refers to it") for info in infos]
    return Plan(tuple(garbage), tuple(sorted(kept_runs)))


def named_digests(value: Any) -> Iterator[str]:
    """The sha256 of every artifact reference in a JSON value, at any depth."""
    if isinstance(value, dict):
        if "uri" in value and isinstance(value.get("sha256"), str):
            yield value["sha256"]
        for item in value.values():
            yield from named_digests(item)
    elif isinstance(value, list):
        for item in value:
            yield from named_digests(item)


def _read_registry(store: ArtifactStore, without: set[tuple[str, str]], check: Check) -> tuple[set[str], set[str]]:
    """Digests that versions name, and the runs that made what an alias points at."""
    registry = Registry(store)
    digests: set[str] = set()
    run_ids: set[str] = set()
    for name in registry.list_names():
        key = keys.model_aliases(name)
        try:
            aliases = registry.read_aliases(name)
            for version in registry.list_versions(name):
                if (name, version) in without:
                    continue
                check()
                key = keys.model_version(name, version)
                record = registry.get_version(name, version)
                digests |= set(named_digests(record.model_dump(mode="json")))
                if version in (aliases.champion, aliases.previous, aliases.candidate):
                    run_ids.add(record.run_id)
        except ValidationError as error:
            raise _unreadable(store.registry_bucket, key) from error
    return digests, run_ids


def _read_runs(
    store: ArtifactStore, runs: dict[str, list[ObjectInfo]], check: Check
) -> tuple[dict[str, Any], dict[str, tuple[str, datetime]]]:
    """Manifests by run id (None for one that cannot be read), and for every run its model and its last change."""
    manifests: dict[str, Any] = {}
    names: dict[str, tuple[str, datetime]] = {}
    for run_id, infos in runs.items():
        check()
        present = {info.key for info in infos}
        manifest_key, config_key = keys.run_file(run_id, "manifest.json"), keys.run_file(run_id, "config.json")
        if manifest_key in present:
            manifest = _read_json(store, manifest_key)
            manifests[run_id] = manifest if isinstance(manifest, dict) and isinstance(manifest.get("records"), dict) else None
        described = manifests.get(run_id) or (_read_json(store, config_key) if config_key in present else None)
        name = str(described.get("name", "")) if isinstance(described, dict) else ""
        names[run_id] = (name, max(info.modified for info in infos))
    return manifests, names


def _unreadable(bucket: str, key: str) -> StorageError:
    return StorageError(
        f"{bucket}/{key} cannot be read, so nobody knows what it refers to, and nothing that it may need was deleted; "
        "look at it, and delete it if it is beyond repair"
    )


def _read_json(store: ArtifactStore, key: str) -> Any:
    """None when it is gone or no JSON."""
    try:
        return json.loads(store.objects.get(store.runs_bucket, key))
    except (ObjectNotFoundError, ValueError):
        return None


def _listed(store: ArtifactStore) -> Iterator[tuple[str, str, ObjectInfo]]:
    for info in store.objects.list(store.runs_bucket):
        if parsed := keys.parse_runs_key(info.key):
            yield *parsed, info


def _run_file_order(info: ObjectInfo) -> int:
    """The manifest first, so that no run looks whole that is not; the config last, since it says whose run it was."""
    return {"manifest.json": 0, "config.json": 2}.get(info.key.rpartition("/")[2], 1)


def _garbage(kind: str, info: ObjectInfo, reason: str) -> Garbage:
    return Garbage(kind, info.key, info.size_bytes, reason)


def _version_garbage(name: str, version: str) -> Garbage:
    return Garbage("model version", keys.model_version(name, version), 0, "beyond the last versions of its model, under no alias")
