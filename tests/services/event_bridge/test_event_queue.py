import dataclasses
import sqlite3
import threading

import pytest

from ml.errors import ServiceError
from ml.events import Cause, Event
from services.event_bridge.event_queue import KEEP_CLOSED_SECONDS, EventQueue, RetrainRequest

NOW = 1_800_000_000.0


@pytest.fixture
def queue(tmp_path):
    queue = EventQueue(tmp_path)
    yield queue
    queue.close()


def event(event_id: str, name: str = "sentiment", kind: str = "data.arrived") -> Event:
    return Event.model_validate({"id": event_id, "name": name, "kind": kind, "objects": [f"s3://b/{name}/{event_id}.csv"]})


def request(request_id: str, name: str = "sentiment", digest: str | None = "d", created: float = NOW) -> RetrainRequest:
    cause = Cause(kind="data.arrived", request_id=request_id, data_digest=digest)
    return RetrainRequest(request_id, name, cause, {"name": name}, num_events=1, created=created)


def waiting_ids(queue: EventQueue) -> dict[str, list[str]]:
    return {name: [event.id for event in events] for name, events in queue.waiting_events().items()}


def test_events_are_there_after_a_restart_in_their_order(queue, tmp_path):
    for event_id, name in (("z", "sentiment"), ("a", "support"), ("b", "sentiment")):
        assert queue.add_event(event(event_id, name), NOW)
    queue.close()
    queue = EventQueue(tmp_path)
    assert waiting_ids(queue) == {"sentiment": ["z", "b"], "support": ["a"]}
    assert queue.waiting_events()["support"][0].objects == ("s3://b/support/a.csv",)
    queue.close()


def test_writes_are_synced_to_the_disk(queue):
    assert queue._database.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert queue._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_the_same_event_is_kept_once_and_counted(queue):
    assert queue.add_event(event("a"), NOW, {"sentiment/a.csv": "new"})
    assert not queue.add_event(event("a"), NOW + 1, {"sentiment/a.csv": "old"})
    found = queue.find_event("a")
    assert (found["num_received"], found["received"]) == (2, NOW)
    assert waiting_ids(queue) == {"sentiment": ["a"]}
    assert queue.seen_objects("sentiment") == {"sentiment/a.csv": "new"}
    assert queue.find_event("b") is None


def test_many_threads_at_once_lose_nothing_and_double_nothing(queue):
    added = []

    def add(ids: range) -> None:
        added.extend(queue.add_event(event(str(number)), NOW) for number in ids)

    threads = [threading.Thread(target=add, args=(range(start, start + 40),)) for start in (0, 20, 40, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(added), sum(added)) == (160, 100)
    assert sorted(map(int, waiting_ids(queue)["sentiment"])) == list(range(100))


def test_a_request_takes_its_events_and_closes_them(queue):
    for event_id in "abc":
        queue.add_event(event(event_id), NOW)
    made = request("r")
    queue.add_request(made, ["a", "b"])
    assert waiting_ids(queue) == {"sentiment": ["c"]}
    assert queue.open_requests() == [made]
    assert queue.last_request_time("sentiment") == NOW and queue.last_request_time("support") is None

    emitted = queue.update_request(made, NOW, state="emitted", attempt=2, emitted=NOW + 5, crashed_run_ids=("x",), why="w")
    assert queue.open_requests() == [emitted]
    assert dataclasses.replace(emitted, state="new", attempt=0, emitted=None, crashed_run_ids=(), why="") == made
    assert queue.find_event("a")["request_state"] == "emitted"

    queue.update_request(emitted, NOW + 9, state="completed", why="done")
    assert queue.open_requests() == []
    assert queue.recent_requests(None, 5)[0].closed == NOW + 9
    assert queue.clean(NOW + 10 + KEEP_CLOSED_SECONDS) == 2  # its two events; c still waits
    assert [values["id"] for values in queue.recent_events(None, 5)] == ["c"]


def test_only_a_run_that_neither_crashed_nor_failed_has_trained_on_its_data(queue):
    for number, (state, digest) in enumerate([("completed", "one"), ("failed", "two"), ("seen", "three")]):
        made = request(str(number), digest=digest)
        queue.add_request(made, [])
        queue.update_request(made, NOW, state=state)
    assert queue.trained_digest("sentiment") == "one"
    queue.update_request(queue.open_requests()[0], NOW, state="cancelled")
    assert queue.trained_digest("sentiment") == "three"
    assert queue.trained_digest("support") is None


def test_what_was_closed_long_ago_is_forgotten_but_not_what_was_trained_last(queue):
    for number, state in enumerate(["completed", "completed", "failed", "failed"]):
        made = request(str(number), digest=str(number))
        queue.add_request(made, [])
        queue.update_request(made, NOW, state=state)
    queue.add_event(event("waits"), NOW)
    queue.add_event(event("same"), NOW)
    queue.close_events(["same"], "same data", NOW)
    assert queue.clean(NOW + KEEP_CLOSED_SECONDS - 1) == 0
    assert queue.clean(NOW + KEEP_CLOSED_SECONDS + 1) == 3
    assert [item.id for item in queue.recent_requests("sentiment", 10)] == ["3", "1"]
    assert queue.trained_digest("sentiment") == "1"
    assert [values["id"] for values in queue.recent_events(None, 10)] == ["waits"]


def test_a_transaction_that_fails_leaves_no_trace(queue):
    queue.add_event(event("a"), NOW)
    made = request("r")
    queue.add_request(made, [])
    with pytest.raises(sqlite3.IntegrityError):
        queue.add_request(made, ["a"])
    assert waiting_ids(queue) == {"sentiment": ["a"]}
    assert queue.add_event(event("b"), NOW)  # and it goes on


def test_two_bridges_do_not_share_a_queue(queue, tmp_path):
    with pytest.raises(ServiceError, match=r"another event bridge has .*queue\.sqlite open"):
        EventQueue(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "queue.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ServiceError, match=r"queue\.sqlite cannot be used"):
        EventQueue(tmp_path)


def test_a_queue_that_cannot_be_written_is_found(queue):
    queue.check_writable(NOW)
    queue._database.execute("PRAGMA query_only = ON")
    with pytest.raises(sqlite3.OperationalError):
        queue.check_writable(NOW)
