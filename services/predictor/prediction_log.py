"""The prediction log: what was asked and answered, sampled and bounded, kept in object storage for drift checks.

A request only puts its items into a queue in memory; a thread writes them out. Where there is no room, for whatever
reason, items are dropped and counted: no request is ever slowed down or refused for the log.
"""

import hashlib
import logging
import secrets
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from ml.errors import StorageError
from ml.monitoring.records import LoggedPrediction, cut_request, to_line
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from services.event_log import log_event

FLUSH_SECONDS = 5.0
FLUSH_ROWS = 500
MAX_WAITING_ROWS = 10_000
MAX_WAITING_BYTES = 32 * 2**20
MAX_RETRY_SECONDS = 60.0
STOP_SECONDS = 4.0


def new_prediction_id() -> str:
    return secrets.token_hex(12)


def is_sampled(prediction_id: str, share: float) -> bool:
    """Whether a prediction belongs to the share that is logged: the same answer for the same id, anywhere."""
    return int.from_bytes(hashlib.sha256(prediction_id.encode()).digest()[:8], "big") < share * 2**64


@dataclass
class Counts:
    """Rows since the start. Every row that was offered is in exactly one of the others, or still waiting."""

    offered: int = 0
    not_sampled: int = 0
    over_hourly_limit: int = 0
    dropped: int = 0
    stored: int = 0


@dataclass(frozen=True)
class _Waiting:
    """One answered request, as it is kept until the thread takes it."""

    answered: datetime
    id: str
    name: str
    version: str
    items: Sequence[dict]
    replies: Sequence[dict]
    num_bytes: int


@dataclass(frozen=True)
class _Part:
    """One object that is to be written. Its key is chosen once, so a second try after a lost reply writes no second copy."""

    key: str
    data: bytes
    num_rows: int
    num_bytes: int


class PredictionLog:
    """Logs predictions of all models of this process.

    Args:
        share: of the predictions; 0 logs nothing and starts no thread.
        rows_per_hour: most rows a model and clock hour; the first ones of the hour are kept, so lower `share` where this bites.
    """

    def __init__(self, store: ArtifactStore, *, share: float, rows_per_hour: int, flush_seconds: float = FLUSH_SECONDS):
        self.share = share
        self.rows_per_hour = rows_per_hour
        self.counts = Counts()
        self.error: str | None = None
        self.store = store
        self._flush_seconds = flush_seconds
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._parts: deque[_Part] = deque()
        self.num_waiting_rows = self._num_queued_rows = self._num_waiting_bytes = 0
        self._rows_of_hour: dict[str, tuple[int, int]] = {}
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write, name="prediction-log", daemon=True)

    @property
    def is_on(self) -> bool:
        return self.share > 0 and self.rows_per_hour > 0

    def start(self) -> None:
        if self.is_on:
            self._thread.start()

    def stop(self) -> None:
        """Write out what waits, as far as the store takes it within STOP_SECONDS."""
        if not self._thread.is_alive():
            return
        self._stop.set()
        self._wake.set()
        self._thread.join(STOP_SECONDS)
        if self.num_waiting_rows:
            log_event("predictions lost", level=logging.ERROR, rows=self.num_waiting_rows, error=self.error)

    def describe(self) -> dict | None:
        """What callers may know: whether, and how much, is logged. None when the log is off."""
        return {"share": self.share, "rows_per_hour": self.rows_per_hour, "error": self.error} if self.is_on else None

    def offer(self, prediction_id: str, name: str, version: str, items: Sequence[dict], replies: Sequence[dict], num_bytes: int) -> None:
        """Put one answered request into the queue, if it belongs to the sample and there is room. Takes microseconds.

        Args:
            num_bytes: size of the request's body: a measure of the memory that waiting costs.
        """
        if not self.is_on:
            return
        now = datetime.now(UTC)
        with self._lock:
            self.counts.offered += len(items)
            if not is_sampled(prediction_id, self.share):
                self.counts.not_sampled += len(items)
                return
            num_rows = self._take_from_hour(name, len(items), now)
            self.counts.over_hourly_limit += len(items) - num_rows
            if num_rows == 0:
                return
            if self.num_waiting_rows + num_rows > MAX_WAITING_ROWS or self._num_waiting_bytes + num_bytes > MAX_WAITING_BYTES:
                self.counts.dropped += num_rows
                return
            self._queue.append(_Waiting(now, prediction_id, name, version, items[:num_rows], replies[:num_rows], num_bytes))
            self._num_queued_rows += num_rows
            self.num_waiting_rows += num_rows
            self._num_waiting_bytes += num_bytes
            if self._num_queued_rows >= FLUSH_ROWS:
                self._wake.set()

    def _take_from_hour(self, name: str, num_wanted: int, now: datetime) -> int:
        hour = int(now.timestamp() // 3600)
        last_hour, num_taken = self._rows_of_hour.get(name, (hour, 0))
        if last_hour != hour:
            num_taken = 0
        num_rows = min(num_wanted, self.rows_per_hour - num_taken)
        self._rows_of_hour[name] = (hour, num_taken + num_rows)
        return num_rows

    def _write(self) -> None:
        pause = self._flush_seconds
        while True:
            stopping = self._stop.is_set()
            try:
                self._encode()
                self._send()
            except Exception as error:  # the thread must outlive whatever comes
                self.error = f"{type(error).__name__}: {error}"
                log_event("prediction log failed", level=logging.ERROR, exc_info=True, error=self.error)
            if stopping:
                return
            # A store that is down is asked more and more seldom, however many rows wait.
            pause = min(MAX_RETRY_SECONDS, pause * 2) if self.error else self._flush_seconds
            (self._stop if self.error else self._wake).wait(pause)
            self._wake.clear()

    def _encode(self) -> None:
        """Turn what is queued into objects, one or more for each model and hour."""
        with self._lock:
            queue, self._queue = self._queue, deque()
            self._num_queued_rows = 0
        groups: dict[tuple[str, str, str], list[_Waiting]] = defaultdict(list)
        for waiting in queue:
            groups[waiting.name, f"{waiting.answered:%Y-%m-%d}", f"{waiting.answered:%H}"].append(waiting)
        for (name, day, hour), group in groups.items():
            lines: list[bytes] = []
            num_bytes = 0
            for waiting in group:
                lines += _lines(waiting)
                num_bytes += waiting.num_bytes
                if len(lines) >= FLUSH_ROWS or waiting is group[-1]:
                    key = keys.prediction_log(name, day, hour, f"{waiting.answered:%Y%m%dT%H%M%S}-{secrets.token_hex(6)}")
                    self._parts.append(_Part(key, b"".join(lines), len(lines), num_bytes))
                    lines, num_bytes = [], 0

    def _send(self) -> None:
        """Write the objects, oldest first; those that the store does not take wait for the next time."""
        num_stored = 0
        while self._parts:
            part = self._parts[0]
            try:
                self.store.objects.put(self.store.monitoring_bucket, part.key, part.data)
            except StorageError as error:
                if self.error is None:
                    log_event("prediction log waits", level=logging.WARNING, error=str(error), rows=self.num_waiting_rows)
                self.error = str(error)
                break
            self.error = None
            self._parts.popleft()
            num_stored += part.num_rows
            with self._lock:
                self.counts.stored += part.num_rows
                self.num_waiting_rows -= part.num_rows
                self._num_waiting_bytes -= part.num_bytes
        if num_stored:
            log_event("predictions logged", rows=num_stored, waiting=self.num_waiting_rows, **asdict(self.counts))


def _lines(waiting: _Waiting) -> list[bytes]:
    lines = []
    for index, (item, reply) in enumerate(zip(waiting.items, waiting.replies, strict=True)):
        request, cut = cut_request(item)
        answered = waiting.answered.isoformat(timespec="milliseconds")
        lines.append(to_line(LoggedPrediction(answered, waiting.id, index, waiting.name, waiting.version, request, reply, cut)))
    return lines
