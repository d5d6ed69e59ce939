"""The routes over real HTTP, with the dispatcher's thread running."""

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from ml.events import Event
from services.event_bridge.authentication import sign
from services.event_bridge.parsing import MAX_EVENT_BYTES, MAX_STORE_EVENT_BYTES
from tests.services.event_bridge.serving import TOKEN, Bridge, ServedBridge
from tests.services.event_bridge.test_store_events import S3, SEAWEEDFS
from tests.services.predictor.serving import wait_until


def signed(body: bytes, clock, webhook_id: str = "msg_1", secret: str = TOKEN, age: float = 0) -> dict[str, str]:
    timestamp = str(int(clock() - age))
    return {"webhook-id": webhook_id, "webhook-timestamp": timestamp, "webhook-signature": sign(webhook_id, timestamp, body, secret)}


def event_body(**fields: object) -> bytes:
    return json.dumps({"kind": "drift.detected", "name": "sentiment", **fields}).encode()


def to_bucket(content: dict, bucket: str) -> dict:
    return json.loads(json.dumps(content).replace("millstream-datasets", bucket))


def test_an_accepted_event_is_kept_and_becomes_a_run(served, prefect):
    response = served.client.post("/v1/events", content=event_body(id="e-1", summary="texts are longer"))
    assert (response.status_code, response.json()) == (202, {"id": "e-1", "status": "waiting"})
    assert served.bridge.queue.find_event("e-1") is not None
    wait_until(lambda: prefect.events)
    assert prefect.events[0]["payload"]["request"]["cause"]["summary"] == "texts are longer"
    assert served.count("events_accepted", kind="drift.detected") == 1


def test_the_thread_is_woken_and_does_not_wait_for_its_next_look(served, prefect):
    """Nothing is due for an hour once it is idle, so only the wake-up can have brought the run."""
    time.sleep(0.3)
    served.client.post("/v1/events", content=event_body())
    wait_until(lambda: prefect.events)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [({}, "unsigned"), ({"Authorization": "Bearer wrong"}, "wrong token"), ({"Authorization": "Basic YTpi"}, "unsigned")],
)
def test_strangers_are_refused_and_counted(served, headers, reason):
    requests = [
        lambda: served.stranger.post("/v1/events", content=event_body(), headers=headers),
        lambda: served.stranger.post("/v1/store-events", json=S3, headers=headers),
        lambda: served.stranger.get("/v1/events", headers=headers),
    ]
    for number, request in enumerate(requests, start=1):
        response = request()
        assert response.status_code == 401
        assert "MILLSTREAM_BRIDGE_TOKEN" in response.json()["detail"]
        assert response.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in response.text
        assert served.count("events_refused", reason=reason) == number
    assert served.bridge.queue.recent_events(None, 10) == []


def test_a_signed_event_is_accepted_and_its_replay_is_not(served, clock, prefect):
    body = event_body()  # no id of its own: the signed webhook-id is its id
    headers = signed(body, clock)
    first = served.stranger.post("/v1/events", content=body, headers=headers)
    assert (first.status_code, first.json()["id"]) == (202, "msg_1")
    again = served.stranger.post("/v1/events", content=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (409, "msg_1")
    # One that is no event id names the event all the same.
    headers = signed(body, clock, "an id of its own kind/" + "x" * 200)
    statuses = [served.stranger.post("/v1/events", content=body, headers=headers).status_code for _ in range(2)]
    assert statuses == [202, 409]
    assert served.count("events_replayed") == 2


@pytest.mark.parametrize(("change", "reason"), [("secret", "wrong signature"), ("age", "expired"), ("body", "wrong signature")])
def test_a_wrong_or_old_signature_is_refused_and_counted(served, clock, change, reason):
    body = event_body()
    headers = signed(body, clock, secret="another" if change == "secret" else TOKEN, age=400 if change == "age" else 0)
    response = served.stranger.post("/v1/events", content=body + (b" " if change == "body" else b""), headers=headers)
    assert response.status_code == 401
    assert served.count("events_refused", reason=reason) == 1


def test_a_replay_is_told_what_became_of_the_event_and_makes_no_second_run(served, prefect, clock):
    prefect.triggers_work = False
    body = event_body(id="e-1")
    assert served.client.post("/v1/events", content=body).status_code == 202
    wait_until(lambda: prefect.events)
    wait_until(lambda: served.bridge.queue.open_requests()[0].state == "emitted")
    for number in range(1, 4):
        response = served.client.post("/v1/events", content=body)
        answer = response.json()
        assert (response.status_code, answer["status"]) == (409, "request emitted")
        assert answer["request_id"] == prefect.events[0]["payload"]["request"]["cause"]["request_id"]
        assert "no run of it yet" in answer["why"]
        assert served.count("events_replayed") == number
    prefect.triggers_work = True
    clock.advance(15)

    def seen() -> bool:
        clock.advance(0.5)
        served.bridge.dispatcher.wake()
        return served.bridge.queue.open_requests()[0].state == "seen"

    wait_until(seen)
    assert len(prefect.runs) == 1
    assert served.client.get("/v1/events").json()["events"][0]["num_received"] == 4


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (b"", "", "not JSON"),
        (b"{", "", "not JSON"),
        (b"[1]", "", "must be a JSON object, found [1]"),
        (b"[" * 100_000, "", "not JSON"),
        (event_body(kind="data.deleted"), "kind", "'data.arrived'"),
        (event_body(name="Not A Name"), "name", 'found "Not A Name"'),
        (event_body(colour="red"), "colour", "leave it out, the fields are id, kind, name"),
        (b'{"kind": "retrain.asked"}', "name", "is missing; add it, found nothing"),
        (event_body(occurred="2026-01-01T00:00:00"), "occurred", "timezone"),
        (event_body(id="a b"), "id", "pattern"),
        (event_body(objects=[1]), "objects.0", "found 1"),
        (event_body(objects=["s3://b/k"] * 1001), "objects", "at most 1000"),
        (event_body(summary="x" * 501), "summary", "... (503 characters)"),
    ],
)
def test_what_is_no_event_is_refused_field_by_field(served, body, field, says):
    response = served.client.post("/v1/events", content=body)
    answer = response.json()
    assert response.status_code == 422
    assert says in answer["detail"]
    if field:
        assert field in [problem["field"] for problem in answer["problems"]]
    assert served.count("events_refused", reason="not an event") == 1
    assert served.bridge.queue.recent_events(None, 10) == []


@pytest.mark.parametrize(("route", "limit"), [("/v1/events", MAX_EVENT_BYTES), ("/v1/store-events", MAX_STORE_EVENT_BYTES)])
@pytest.mark.parametrize("says_its_length", [True, False])
def test_too_large_a_body_is_refused(served, route, limit, says_its_length):
    body = b"x" * (limit + 1)
    chunks = (body[start : start + 2**16] for start in range(0, len(body), 2**16))
    response = served.client.post(route, content=body if says_its_length else chunks)
    assert response.status_code == 413
    assert str(limit) in response.json()["detail"]
    assert served.count("events_refused", reason="too large") == 1


def test_a_model_that_nothing_trains_is_refused_and_the_known_ones_named(served, prefect):
    response = served.client.post("/v1/events", content=event_body(name="sentimant"))
    assert response.status_code == 404
    assert "models that one trains: sentiment, support" in response.json()["detail"]
    assert served.count("events_refused", reason="unknown model") == 1
    prefect.deploy("sentimant")  # asked anew each time
    assert served.client.post("/v1/events", content=event_body(name="sentimant")).status_code == 202


def test_while_prefect_is_down_events_are_taken_and_decided_later(served, prefect, clock):
    prefect.stop()
    for name in ("sentiment", "support", "nobody"):
        assert served.client.post("/v1/events", content=event_body(id=f"of-{name}", name=name)).status_code == 202
    wait_until(lambda: served.count("prefect_unreachable") > 0)
    assert {event["status"] for event in served.client.get("/v1/events").json()["events"]} == {"waiting"}

    prefect.triggers_work = False
    prefect.start()
    clock.advance(5)
    served.bridge.dispatcher.wake()
    wait_until(lambda: {request.state for request in served.bridge.queue.recent_requests(None, 9)} == {"emitted"})
    wait_until(lambda: not served.bridge.queue.waiting_events())
    became = {event["id"]: event["status"] for event in served.client.get("/v1/events").json()["events"]}
    assert became == {"of-sentiment": "request emitted", "of-support": "request emitted", "of-nobody": "no deployment"}


def test_a_store_notification_becomes_events(served, s3_artifact_store, prefect):
    bucket = s3_artifact_store.datasets_bucket
    for number, content in enumerate((SEAWEEDFS["a new object"], S3), start=1):
        first = served.client.post("/v1/store-events", json=to_bucket(content, bucket))
        assert (first.status_code, len(first.json()["accepted"])) == (202, 1)
        again = served.client.post("/v1/store-events", json=to_bucket(content, bucket))
        assert (again.status_code, again.json()["replayed"]) == (200, first.json()["accepted"])
        assert served.count("events_accepted", kind="data.arrived") == number
        assert served.count("events_replayed") == number
    assert served.bridge.queue.seen_objects("sentiment") == {
        "sentiment/a.csv": "980b7ebea4a2cc135e68f69d0950cd04",
        "sentiment/week 1/ü+1.csv": "d41d8cd98f00b204e9800998ecf8427e",
    }


def test_what_a_store_says_of_other_things_is_ignored_and_counted(served, s3_artifact_store, prefect):
    bucket = s3_artifact_store.datasets_bucket
    for payload in ("a deleted object", "a new folder", "an upload part", "another bucket"):
        response = served.client.post("/v1/store-events", json=to_bucket(SEAWEEDFS[payload], bucket))
        assert (response.status_code, response.json()["accepted"]) == (200, [])
    stranger = to_bucket(json.loads(json.dumps(S3).replace("sentiment", "nobody")), bucket)
    assert served.client.post("/v1/store-events", json=stranger).json()["ignored"] == ["unknown model"]
    assert served.count("store_events_ignored") == 5
    assert served.count("store_events_ignored", reason="unknown model") == 1
    assert served.bridge.queue.recent_events(None, 10) == []
    response = served.client.post("/v1/store-events", json={"kind": "drift.detected"})
    assert response.status_code == 422
    assert served.count("events_refused", reason="not a store event") == 1


def test_recent_events_and_requests_say_what_became_of_them(served, prefect, clock):
    prefect.triggers_work = False
    for number in range(3):
        served.client.post("/v1/events", content=event_body(id=f"a-{number}"))
        wait_until(lambda: prefect.events)
    served.client.post("/v1/events", content=event_body(id="b", name="support"))
    wait_until(lambda: [request.state for request in served.bridge.queue.open_requests()] == ["emitted"] * 2)
    wait_until(lambda: "sentiment" in served.bridge.dispatcher.waits)
    answer = served.client.get("/v1/events", params={"name": "sentiment"}).json()
    assert [event["id"] for event in answer["events"]] == ["a-2", "a-1", "a-0"]
    assert [event["status"] for event in answer["events"]] == ["waiting", "waiting", "request emitted"]
    assert answer["events"][0]["why"].startswith("request ")  # it waits for the open one
    (request,) = answer["requests"]
    assert (request["name"], request["state"], request["cause"]["kind"]) == ("sentiment", "emitted", "drift.detected")
    assert answer["events"][2]["request_id"] == request["id"]
    Event.model_validate({key: answer["events"][0][key] for key in Event.model_fields})
    assert len(served.client.get("/v1/events", params={"limit": 2}).json()["events"]) == 2
    for limit in ("0", "1001", "x"):
        assert served.client.get("/v1/events", params={"limit": limit}).status_code == 422
    assert (served.count("events_waiting"), served.count("requests_open")) == (2, 2)


def test_it_is_ill_when_its_thread_has_ended_or_its_queue_cannot_be_written(served):
    assert served.stranger.get("/healthz").status_code == 200
    served.bridge.queue._database.execute("PRAGMA query_only = ON")
    ill = served.stranger.get("/healthz")
    assert (ill.status_code, "cannot be written" in ill.json()["status"]) == (503, True)
    refused = served.client.post("/v1/events", content=event_body())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert "send it again" in refused.json()["detail"]
    served.bridge.queue._database.execute("PRAGMA query_only = OFF")
    assert served.stranger.get("/healthz").status_code == 200
    served.bridge.dispatcher.stop()
    ill = served.stranger.get("/healthz")
    assert (ill.status_code, "thread has ended" in ill.json()["status"]) == (503, True)


def test_the_thread_outlives_an_error_that_nobody_foresaw(served, prefect, monkeypatch):
    monkeypatch.setattr("services.event_bridge.dispatcher.RETRY_SECONDS", 0.05)
    queue, waiting_events, failures = served.bridge.queue, served.bridge.queue.waiting_events, []

    def fail_twice():
        if len(failures) < 2:
            failures.append(1)
            raise RuntimeError("on purpose")
        return waiting_events()

    monkeypatch.setattr(queue, "waiting_events", fail_twice)
    served.client.post("/v1/events", content=event_body())
    wait_until(lambda: prefect.events)
    assert len(failures) == 2


def test_there_are_no_pages_that_load_scripts_from_elsewhere(served):
    for path in ("/docs", "/redoc"):
        assert served.stranger.get(path).status_code == 404


def test_many_senders_at_once_each_get_their_answer(served, prefect):
    ids = [uuid.uuid4().hex for _ in range(60)] * 2
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda number: served.client.post("/v1/events", content=event_body(id=number)).status_code, ids))
    assert sorted(statuses) == [202] * 60 + [409] * 60
    wait_until(lambda: prefect.events)
    assert len(served.client.get("/v1/events", params={"limit": 1000}).json()["events"]) == 60


def test_a_restarted_bridge_goes_on_where_it_was(tmp_path, prefect, s3_artifact_store, clock):
    bridge = Bridge(tmp_path / "queue", prefect.api_url, lambda: s3_artifact_store, clock)
    with ServedBridge(bridge, s3_artifact_store.datasets_bucket, clock) as served:
        served.client.post("/v1/events", content=event_body(id="first"))
        wait_until(lambda: prefect.runs)
        served.client.post("/v1/events", content=event_body(id="second"))
    bridge.close()
    prefect.set_state(prefect.runs[0], "COMPLETED")
    bridge = Bridge(tmp_path / "queue", prefect.api_url, lambda: s3_artifact_store, clock)
    with ServedBridge(bridge, s3_artifact_store.datasets_bucket, clock) as served:
        wait_until(lambda: not bridge.queue.open_requests())
        clock.advance(700)
        bridge.dispatcher.wake()
        wait_until(lambda: len(prefect.runs) == 2)
        became = {event["id"]: event["status"] for event in served.client.get("/v1/events").json()["events"]}
        assert became["first"] == "request completed"
    bridge.close()
    assert len(prefect.runs) == 2
