"""Leases: who uses the runs bucket right now.

A run holds `leases/<run_id>.json` from before it looks for anything in the store until after its last write. The
garbage collector holds `leases/clean-up.json` while it deletes. Each first writes its own lease and then looks for the
other's; the store shows every finished write to every later reader, so at least one of the two sees the other. A run
that sees the collector waits; a collector that sees a run stops. See `ml.garbage` for why that is enough.

A holder renews its lease ten times within the lease's time. One that does not is taken for dead, and its lease is
revoked: replaced by a conditional write, so that either the renewal or the revocation wins, and a holder that was only
asleep learns that it lost (`Lease.check`). Times are those of the store, or of a clock that runs on while the machine
sleeps. As with every lease, one thing is taken for granted: nobody who has just checked its lease sleeps for half the
lease's time before the very next call to the store.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType

from pydantic import ValidationError

from ml.artifacts import Record
from ml.errors import ObjectNotFoundError, StorageError, StorageUnavailableError, WriteConflictError
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from ml.storage.base import ObjectInfo

logger = logging.getLogger(__name__)

RUN_LEASE_SECONDS = 600.0
CLEAN_UP_LEASE_SECONDS = 60.0
RENEWALS_PER_LEASE = 10
NUM_ATTEMPTS = 4
POLL_SECONDS = 0.2


class LeaseRecord(Record):
    """The content of a lease. `token` tells two holders of one name apart; `renewals` gives every renewal its own etag."""

    holder: str
    token: str
    host: str = ""
    pid: int = 0
    expires_seconds: float
    renewals: int = 0


class Lease:
    """`with Lease(store, holder):` holds a lease and renews it in a thread.

    Args:
        holder: a run id, or `keys.CLEAN_UP`.
        expires_seconds: how long a holder may be silent before it is taken for dead.
    """

    def __init__(self, store: ArtifactStore, holder: str, *, expires_seconds: float = RUN_LEASE_SECONDS):
        self._objects, self._bucket, self._key = store.objects, store.runs_bucket, keys.lease(holder)
        self._record = LeaseRecord(
            holder=holder, token=secrets.token_hex(16), host=socket.gethostname(), pid=os.getpid(), expires_seconds=expires_seconds
        )
        self._renew_seconds = expires_seconds / RENEWALS_PER_LEASE
        self._renewed = 0.0
        self._lost = False
        self._one_at_a_time = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease-{holder}", daemon=True)

    def __enter__(self) -> "Lease":
        """
        Raises:
            WriteConflictError: somebody holds it.
            StorageUnavailableError: the store does not answer.
        """
        self._write_first()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        # One that cannot be given back expires.
        with contextlib.suppress(StorageError):
            self._read_own()
            self._objects.delete(self._bucket, self._key)

    def check(self) -> None:
        """Make sure that this holder is not taken for dead, and will not be for half of the lease's time.

        Raises:
            WriteConflictError: the lease was revoked. What was found in the store may be deleted meanwhile.
            StorageUnavailableError: the lease is old, and the store does not say whether it still holds.
        """
        if not self._lost and _clock() - self._renewed > self._record.expires_seconds / 2:
            self._renew()
        if self._lost:
            raise WriteConflictError(
                f"the lease of {self._record.holder} was revoked: it was not renewed for {self._record.expires_seconds:g} s (the machine "
                "slept, or the process was stopped), so a clean-up may have deleted what it uses; run it again"
            )

    def _write_first(self) -> None:
        for attempt in range(1, NUM_ATTEMPTS + 1):
            self._renewed = _clock()
            try:
                self._objects.put(self._bucket, self._key, self._record.model_dump_json().encode(), if_none_match=True)
            except WriteConflictError:
                self._read_own()  # it is this holder's when only the reply to the last try was lost
            except StorageUnavailableError:
                if attempt == NUM_ATTEMPTS:
                    raise
                time.sleep(POLL_SECONDS * 2**attempt)
                continue
            return

    def _renew(self) -> None:
        with self._one_at_a_time:
            started = _clock()
            try:
                info = self._read_own()
                record = self._record.model_copy(update={"renewals": self._record.renewals + 1})
                self._objects.put(self._bucket, self._key, record.model_dump_json().encode(), if_match=info.etag)
            except WriteConflictError:
                self._lost = True
                return
            self._record, self._renewed = record, started

    def _read_own(self) -> ObjectInfo:
        """Raises WriteConflictError when the lease is not this holder's any more."""
        try:
            data, info = self._objects.get_with_info(self._bucket, self._key)
        except ObjectNotFoundError as error:
            raise WriteConflictError(f"{self._key} is gone") from error
        if _parse(data, self._record.holder).token != self._record.token:
            raise WriteConflictError(f"{self._key} is somebody else's")
        return info

    def _keep_renewing(self) -> None:
        # In short steps: a wait does not count the time in which the machine sleeps.
        while not self._stop.wait(self._renew_seconds / 12) and not self._lost:
            if _clock() - self._renewed >= self._renew_seconds:
                try:
                    self._renew()
                except StorageUnavailableError as error:
                    logger.debug("the lease of %s could not be renewed, it is tried again: %s", self._record.holder, error)
                except Exception:
                    logger.exception("the lease of %s could not be renewed, it is tried again", self._record.holder)


@contextlib.contextmanager
def run_lease(store: ArtifactStore, run_id: str) -> Iterator[Lease]:
    """Hold the lease of a run. Waits, usually not at all, until no collector deletes.

    Also for whoever uses stages and artifacts without a run, as in a notebook; `run_id` is then any name of one's own.
    """
    with Lease(store, run_id) as lease:
        wait_until_free(store, keys.CLEAN_UP)
        yield lease


def wait_until_free(store: ArtifactStore, holder: str, *, timeout_seconds: float = float("inf")) -> None:
    """Wait until nobody has this lease. A holder that is seen not to renew it for the lease's time loses it.

    Raises:
        WriteConflictError: somebody has it still after `timeout_seconds`.
    """
    key = keys.lease(holder)
    started = since = _clock()
    seen: str | None = None
    while True:
        try:
            data, info = store.objects.get_with_info(store.runs_bucket, key)
        except ObjectNotFoundError:
            return
        record, now = _parse(data, holder), _clock()
        if info.etag != seen:
            if seen is None:
                logger.info("waiting for %s (process %d on %s)", holder, record.pid, record.host)
            seen, since = info.etag, now
        elif now - since > record.expires_seconds:
            _revoke(store, info)
        if now - started > timeout_seconds:
            raise WriteConflictError(f"{holder} is at work already: process {record.pid} on {record.host}; try again later")
        time.sleep(POLL_SECONDS)


def live_runs(store: ArtifactStore, now: datetime, *, revoke: bool) -> tuple[str, ...]:
    """Ids of the runs that hold a lease.

    Args:
        now: by the clock of the store.
        revoke: take the lease from those who have not renewed it in time; otherwise they are only left out.
    """
    found = []
    for listed in store.objects.list(store.runs_bucket, keys.leases_prefix()):
        parsed = keys.parse_runs_key(listed.key)
        if parsed is None or parsed[1] == keys.CLEAN_UP:
            continue
        try:
            data, info = store.objects.get_with_info(store.runs_bucket, listed.key)
        except ObjectNotFoundError:
            continue
        expired = (now - info.modified).total_seconds() > _parse(data, parsed[1]).expires_seconds
        if not expired or (revoke and not _revoke(store, info)):
            found.append(parsed[1])
    return tuple(found)


def _revoke(store: ArtifactStore, info: ObjectInfo) -> bool:
    """Take a lease away as it was read; False when its holder renewed it or gave it back meanwhile."""
    nobody = LeaseRecord(holder="nobody", token=secrets.token_hex(16), expires_seconds=CLEAN_UP_LEASE_SECONDS)
    try:
        store.objects.put(store.runs_bucket, info.key, nobody.model_dump_json().encode(), if_match=info.etag)
    except WriteConflictError:
        return False
    store.objects.delete(store.runs_bucket, info.key)
    logger.warning("%s was not renewed in time; its holder is taken for dead", info.key)
    return True


def store_time(store: ArtifactStore, holder: str) -> datetime:
    """The time by the clock of the store when this lease was written last.

    Raises:
        WriteConflictError: there is no such lease.
    """
    info = store.objects.stat(store.runs_bucket, keys.lease(holder))
    if info is None:
        raise WriteConflictError(f"the lease of {holder} is gone")
    return info.modified.astimezone(UTC)


def _parse(data: bytes, holder: str) -> LeaseRecord:
    """A lease that cannot be read is nobody's that renews it, so it lasts as long as a run's."""
    try:
        return LeaseRecord.model_validate_json(data)
    except ValidationError:
        return LeaseRecord(holder=holder, token="", expires_seconds=RUN_LEASE_SECONDS)


def _clock() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
