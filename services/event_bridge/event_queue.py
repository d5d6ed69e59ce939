"""The bridge's memory: events, requests for runs, and the objects seen so far, in one SQLite file.

What a method has done is on disk when it returns (WAL, synchronous=FULL), so a process that is killed at any moment
loses nothing that was acknowledged. One process at a time; any number of its threads.
"""

import fcntl
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ml.errors import ServiceError
from ml.events import Cause, Event
from services.event_bridge.decision import WaitingEvent

KEEP_CLOSED_SECONDS = 30 * 24 * 3600

RequestState = Literal["new", "emitted", "seen", "completed", "failed", "cancelled"]
OPEN_STATES = ("new", "emitted", "seen")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    received REAL NOT NULL,
    num_received INTEGER NOT NULL DEFAULT 1,
    state TEXT NOT NULL DEFAULT 'waiting',
    request_id TEXT,
    closed REAL
);
CREATE INDEX IF NOT EXISTS events_by_name ON events (name, number);
CREATE INDEX IF NOT EXISTS events_waiting ON events (name, number) WHERE state = 'waiting';
CREATE INDEX IF NOT EXISTS events_by_request ON events (request_id) WHERE request_id IS NOT NULL;
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    cause TEXT NOT NULL,
    body TEXT NOT NULL,
    state TEXT NOT NULL,
    why TEXT NOT NULL DEFAULT '',
    num_events INTEGER NOT NULL,
    created REAL NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    emitted REAL,
    flow_run_id TEXT,
    crashed_run_ids TEXT NOT NULL DEFAULT '[]',
    closed REAL
);
CREATE INDEX IF NOT EXISTS requests_by_name ON requests (name, number);
CREATE TABLE IF NOT EXISTS objects (
    name TEXT NOT NULL,
    key TEXT NOT NULL,
    etag TEXT NOT NULL,
    PRIMARY KEY (name, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS writable (one INTEGER PRIMARY KEY CHECK (one = 1), checked REAL NOT NULL);
"""


@dataclass(frozen=True)
class RetrainRequest:
    """A run that was decided on.

    Args:
        body: the flow's parameter `request`, cause included.
        attempt: how often it was emitted and taken by Prefect.
        emitted: when last, seconds since the epoch.
        flow_run_id: the run that came of it.
        crashed_run_ids: runs that came of it before and crashed.
        why: what became of it, in words.
    """

    id: str
    name: str
    cause: Cause
    body: dict[str, Any]
    num_events: int
    created: float
    state: RequestState = "new"
    why: str = ""
    attempt: int = 0
    emitted: float | None = None
    flow_run_id: str | None = None
    crashed_run_ids: tuple[str, ...] = ()
    closed: float | None = None


class EventQueue:
    """The queue of one state folder.

    Raises:
        ServiceError: another process has it open, or the file cannot be used.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._path = folder / "queue.sqlite"
        self._lock_file = (folder / "queue.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise ServiceError(f"another event bridge has {self._path} open; stop it first, or set MILLSTREAM_STATE_DIR") from None
        self._mutex = threading.Lock()
        try:
            self._database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self._lock_file.close()
            raise ServiceError(
                f"the queue {self._path} cannot be used ({error}); free disk space, or move the damaged file away"
            ) from error

    def close(self) -> None:
        with self._mutex:
            self._database.close()
            self._lock_file.close()

    def add_event(self, event: Event, now: float, objects: Mapping[str, str] | None = None) -> bool:
        """Keep an event; False when one of this id is there already, which then is counted only.

        Args:
            objects: key -> etag of objects of the model that need no other event any more.
        """
        with self._transaction() as database:
            added = database.execute(
                "INSERT INTO events (id, name, kind, body, received) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (event.id, event.name, event.kind, event.model_dump_json(), now),
            )
            if added.rowcount == 0:
                database.execute("UPDATE events SET num_received = num_received + 1 WHERE id = ?", (event.id,))
                return False
            for key, etag in (objects or {}).items():
                database.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", (event.name, key, etag))
            return True

    def waiting_events(self) -> dict[str, list[WaitingEvent]]:
        """Model -> its events that nothing was decided about, in the order in which they came."""
        waiting: dict[str, list[WaitingEvent]] = {}
        for row in self._read("SELECT id, name, kind, body FROM events WHERE state = 'waiting' ORDER BY number"):
            body = json.loads(row["body"])
            event = WaitingEvent(row["id"], row["kind"], body["summary"], tuple(body["objects"]))
            waiting.setdefault(row["name"], []).append(event)
        return waiting

    def close_events(self, event_ids: Sequence[str], state: str, now: float) -> None:
        """Nothing more will come of these events; `state` says why."""
        with self._transaction() as database:
            database.executemany("UPDATE events SET state = ?, closed = ? WHERE id = ?", [(state, now, event_id) for event_id in event_ids])

    def add_request(self, request: RetrainRequest, event_ids: Sequence[str]) -> None:
        """Keep a request; it answers these events."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO requests (id, name, cause, body, state, num_events, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    request.id,
                    request.name,
                    request.cause.model_dump_json(),
                    json.dumps(request.body),
                    request.state,
                    request.num_events,
                    request.created,
                ),
            )
            database.executemany(
                "UPDATE events SET state = 'requested', request_id = ? WHERE id = ?", [(request.id, event_id) for event_id in event_ids]
            )

    def update_request(self, request: RetrainRequest, now: float, **changes: Any) -> RetrainRequest:
        """Keep what changed; a state that is not open closes the request and its events."""
        closed = changes.get("state", request.state) not in OPEN_STATES
        request = replace(request, **changes, closed=now if closed else None)
        with self._transaction() as database:
            database.execute(
                "UPDATE requests SET state = ?, why = ?, attempt = ?, emitted = ?, flow_run_id = ?, crashed_run_ids = ?, closed = ? "
                "WHERE id = ?",
                (
                    request.state,
                    request.why,
                    request.attempt,
                    request.emitted,
                    request.flow_run_id,
                    json.dumps(request.crashed_run_ids),
                    request.closed,
                    request.id,
                ),
            )
            if closed:
                database.execute("UPDATE events SET closed = ? WHERE request_id = ?", (now, request.id))
        return request

    def open_requests(self) -> list[RetrainRequest]:
        marks = ", ".join("?" * len(OPEN_STATES))
        return [_request(row) for row in self._read(f"SELECT * FROM requests WHERE state IN ({marks}) ORDER BY number", OPEN_STATES)]  # noqa: S608

    def last_request_time(self, name: str) -> float | None:
        rows = self._read("SELECT max(created) AS created FROM requests WHERE name = ?", (name,))
        return rows[0]["created"]

    def trained_digest(self, name: str) -> str | None:
        """The data of the last request whose run neither crashed nor failed."""
        rows = self._read(
            "SELECT cause FROM requests WHERE name = ? AND state IN ('completed', 'cancelled') ORDER BY number DESC LIMIT 1", (name,)
        )
        return json.loads(rows[0]["cause"])["data_digest"] if rows else None

    def seen_objects(self, name: str) -> dict[str, str]:
        """Key -> etag of the model's objects as they were last seen."""
        return {row["key"]: row["etag"] for row in self._read("SELECT key, etag FROM objects WHERE name = ?", (name,))}

    def forget_objects(self, name: str, keys: Sequence[str]) -> None:
        with self._transaction() as database:
            database.executemany("DELETE FROM objects WHERE name = ? AND key = ?", [(name, key) for key in keys])

    def recent_events(self, name: str | None, limit: int) -> list[dict[str, Any]]:
        """The newest first, as plain values: the event, when it was received, its state and that of its request."""
        rows = self._read(
            "SELECT e.*, r.state AS request_state, r.why AS request_why FROM events e LEFT JOIN requests r ON r.id = e.request_id "
            "WHERE ? IS NULL OR e.name = ? ORDER BY e.number DESC LIMIT ?",
            (name, name, limit),
        )
        return [_event_values(row) for row in rows]

    def find_event(self, event_id: str) -> dict[str, Any] | None:
        rows = self._read(
            "SELECT e.*, r.state AS request_state, r.why AS request_why FROM events e LEFT JOIN requests r ON r.id = e.request_id "
            "WHERE e.id = ?",
            (event_id,),
        )
        return _event_values(rows[0]) if rows else None

    def recent_requests(self, name: str | None, limit: int) -> list[RetrainRequest]:
        rows = self._read("SELECT * FROM requests WHERE ? IS NULL OR name = ? ORDER BY number DESC LIMIT ?", (name, name, limit))
        return [_request(row) for row in rows]

    def count_open(self) -> tuple[int, int]:
        """Waiting events, open requests."""
        events = self._read("SELECT count(*) AS num FROM events WHERE state = 'waiting'")
        return events[0]["num"], len(self.open_requests())

    def clean(self, now: float) -> int:
        """Forget what was closed long ago; how many rows. The last finished request of a model stays: it knows what was trained."""
        before = now - KEEP_CLOSED_SECONDS
        with self._transaction() as database:
            events = database.execute("DELETE FROM events WHERE closed < ?", (before,)).rowcount
            requests = database.execute(
                "DELETE FROM requests WHERE closed < ? AND number NOT IN (SELECT max(number) FROM requests GROUP BY name) "
                "AND number NOT IN (SELECT max(number) FROM requests WHERE state IN ('completed', 'cancelled') GROUP BY name)",
                (before,),
            ).rowcount
            return events + requests

    def check_writable(self, now: float) -> None:
        """
        Raises:
            sqlite3.Error: nothing can be written, such as on a full disk.
        """
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO writable VALUES (1, ?)", (now,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._mutex:
            return self._database.execute(query, tuple(values)).fetchall()


def _request(row: sqlite3.Row) -> RetrainRequest:
    return RetrainRequest(
        id=row["id"],
        name=row["name"],
        cause=Cause.model_validate_json(row["cause"]),
        body=json.loads(row["body"]),
        num_events=row["num_events"],
        created=row["created"],
        state=row["state"],
        why=row["why"],
        attempt=row["attempt"],
        emitted=row["emitted"],
        flow_run_id=row["flow_run_id"],
        crashed_run_ids=tuple(json.loads(row["crashed_run_ids"])),
        closed=row["closed"],
    )


def _event_values(row: sqlite3.Row) -> dict[str, Any]:
    return {
        **json.loads(row["body"]),
        "received": row["received"],
        "num_received": row["num_received"],
        "state": row["state"],
        "request_id": row["request_id"],
        "request_state": row["request_state"],
        "request_why": row["request_why"],
    }
