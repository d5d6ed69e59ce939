"""Which models are live, and the thread that keeps them what the registry says.

Readers take one reference to a model and use it for their whole request; a swap replaces the table of references,
so requests under way finish on the model that they began with, and the old one is freed after the last of them.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ml.artifacts import BundleRef
from ml.bundles import Bundle
from ml.errors import DeploymentError, MillstreamError, StorageError
from ml.predictor import Predictor, load_predictor
from ml.registry import Registry
from ml.solution import load_solution
from ml.storage.artifacts import ArtifactStore
from services.event_log import log_event
from services.predictor.checking import ItemChecker

POLL_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class LiveModel:
    """One loaded version of one name."""

    name: str
    version: str
    bundle_digest: str
    predictor: Predictor
    checker: ItemChecker
    since: str

    @property
    def bundle(self) -> Bundle:
        return self.predictor.bundle


@dataclass(frozen=True)
class LoadFailure:
    """Why the champion of a name is not live, and when (monotonic clock) it is tried again."""

    version: str
    message: str
    num_attempts: int
    retry_at: float


@dataclass(frozen=True)
class Snapshot:
    """All that readers see, replaced as a whole.

    Args:
        champions: name -> version, as the registry says.
        generations: name -> how often its aliases have moved.
        failures: names whose champion could not be loaded.
        registry_read: whether the registry has ever answered.
        registry_error: why it did not answer the last time.
    """

    live: Mapping[str, LiveModel] = field(default_factory=dict)
    champions: Mapping[str, str] = field(default_factory=dict)
    generations: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, LoadFailure] = field(default_factory=dict)
    registry_read: bool = False
    registry_error: str | None = None


class Models:
    """Follows the registry's champions in a thread of its own.

    Args:
        folder: bundles are kept below it, one folder per digest, so that a restart need not fetch them again.
        num_threads: math threads of a session.
    """

    def __init__(self, store: ArtifactStore, folder: Path, *, num_threads: int = 1, poll_seconds: float = POLL_SECONDS):
        self._store = store
        self._registry = Registry(store)
        self._folder = folder
        self._num_threads = num_threads
        self._poll_seconds = poll_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-registry", daemon=True)
        self.snapshot = Snapshot()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; a fetch under way may outlive this call, and dies with the process."""
        self._stop.set()
        self._thread.join(timeout=2)

    @property
    def following(self) -> bool:
        return self._thread.is_alive()

    def refresh(self) -> None:
        """Read the registry once and make every champion live. Never raises: what went wrong is in the snapshot."""
        before = self.snapshot
        try:
            champions, generations = self._read_champions()
        except StorageError as error:
            if before.registry_error is None:
                log_event("registry unreachable", level=logging.WARNING, error=str(error), live=sorted(before.live))
            self.snapshot = replace(before, registry_error=str(error))
            return
        if before.registry_error is not None:
            log_event("registry reachable again")
        live = {name: model for name, model in before.live.items() if name in champions}
        failures = {name: failure for name, failure in before.failures.items() if champions.get(name) == failure.version}
        self.snapshot = Snapshot(live, champions, generations, failures, registry_read=True)
        for name, version in champions.items():
            self._make_live(name, version)
        if {model.bundle_digest for model in before.live.values()} != {model.bundle_digest for model in self.snapshot.live.values()}:
            self._delete_unused(keep=before)

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.refresh()
            except Exception as error:  # the thread must outlive whatever comes
                log_event("following the registry failed", level=logging.ERROR, exc_info=True, error=str(error))
                self.snapshot = replace(self.snapshot, registry_error=f"{type(error).__name__}: {error}")
            self._stop.wait(self._poll_seconds)

    def _read_champions(self) -> tuple[dict[str, str], dict[str, int]]:
        aliases = {name: self._registry.read_aliases(name) for name in self._registry.list_names()}
        champions = {name: found.champion for name, found in aliases.items() if found.champion is not None}
        return champions, {name: aliases[name].generation for name in champions}

    def _make_live(self, name: str, version: str) -> None:
        before = self.snapshot
        current, failure = before.live.get(name), before.failures.get(name)
        if current is not None and current.version == version:
            return
        if failure is not None and time.monotonic() < failure.retry_at:
            return
        started = time.monotonic()
        try:
            model = self._load(name, version)
        except Exception as error:
            num_attempts = failure.num_attempts + 1 if failure else 1
            message = str(error) if isinstance(error, MillstreamError) else f"{type(error).__name__}: {error}"
            retry_at = time.monotonic() + min(MAX_RETRY_SECONDS, self._poll_seconds * 2**num_attempts)
            failures = {**before.failures, name: LoadFailure(version, message, num_attempts, retry_at)}
            self.snapshot = replace(before, failures=failures)
            still = current.version if current else None
            log_event("load failed", level=logging.ERROR, exc_info=True, name=name, version=version, error=message, still_serving=still)
            return
        failures = {other: found for other, found in before.failures.items() if other != name}
        self.snapshot = replace(before, live={**before.live, name: model}, failures=failures)
        replaced = current.version if current else None
        log_event("live", name=name, version=version, replaces=replaced, seconds=round(time.monotonic() - started, 3))

    def _load(self, name: str, version: str) -> LiveModel:
        """Fetch, verify, load and ask one request."""
        reference = self._registry.get_version(name, version).bundle
        predictor = load_predictor(self._fetch(reference), num_threads=self._num_threads)
        replies_checker = ItemChecker(predictor.bundle.output_schema)
        for request in load_solution(predictor.bundle.solution).sample_requests[:1]:
            reply = predictor.predict([request])[0]
            try:
                json.dumps(reply, allow_nan=False)
                replies_checker.check([reply])
            except Exception as error:
                raise DeploymentError(f"{name} {version}: its answer to a sample request does not keep its schema: {error}") from error
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return LiveModel(name, version, reference.digest, predictor, ItemChecker(predictor.bundle.input_schema), since)

    def _fetch(self, reference: BundleRef) -> Path:
        return self._store.get_folder(reference, self._folder / reference.digest)

    def _delete_unused(self, keep: Snapshot) -> None:
        """Delete fetched bundles that are neither live nor just replaced (a rollback would ask for those again)."""
        wanted = {model.bundle_digest for snapshot in (self.snapshot, keep) for model in snapshot.live.values()}
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            if folder.is_dir() and folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)
