"""The bridge with the real Prefect server: what the small one of the other tests stands for."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from ml.events import RETRAIN_REQUESTED, resource_id
from services.event_bridge.decision import Limits
from services.prefect_server import start_prefect_server, stop_prefect_server
from tests.services.event_bridge.serving import CSV, TOKEN, Bridge, ServedBridge
from tests.services.predictor.serving import wait_until

LIMITS = Limits(debounce_seconds=0, cool_down_seconds=0, retrain_minutes_per_day=1)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefect")
    try:
        url = start_prefect_server(folder)
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            yield client
    finally:
        stop_prefect_server(folder)


def deploy(api: httpx.Client, name: str) -> str:
    """A deployment of the training flow with the trigger of prefect.yaml, and no worker that would run it."""
    flow = api.post("/flows/", json={"name": "training-pipeline"}).json()["id"]
    values = {"name": name, "flow_id": flow, "parameters": {"request": {"solution": "sentiment", "name": name}}}
    deployment = api.post("/deployments/", json=values).json()["id"]
    template = {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": "{{ event.payload.request | tojson }}"}}
    automation = {
        "name": f"retrain {name}",
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "expect": [RETRAIN_REQUESTED],
            "match": {"prefect.resource.id": resource_id(name)},
            "threshold": 1,
            "within": 0,
        },
        "actions": [
            {"type": "run-deployment", "source": "selected", "deployment_id": deployment, "parameters": {"request": template}},
        ],
    }
    response = api.post("/automations/", json=automation)
    assert response.status_code == 201, response.text
    return deployment


def runs_of(api: httpx.Client, deployment: str) -> list[dict[str, Any]]:
    body = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return api.post("/flow_runs/filter", json=body).json()


def set_state(api: httpx.Client, run: dict[str, Any], state: str) -> None:
    response = api.post(f"/flow_runs/{run['id']}/set_state", json={"state": {"type": state, "message": f"set to {state}"}, "force": True})
    assert response.status_code in (200, 201), response.text


@pytest.fixture
def run_until(served_by_prefect) -> Callable[[str, str], None]:
    """Waits until an event has a status."""

    def run_until(event_id: str, status: str) -> None:
        def has_it() -> bool:
            events = served_by_prefect.client.get("/v1/events").json()["events"]
            return {event["id"]: event["status"] for event in events}[event_id] == status

        wait_until(has_it, 60)

    return run_until


@pytest.fixture
def served_by_prefect(api, tmp_path, s3_artifact_store):
    bridge = Bridge(tmp_path / "queue", str(api.base_url), lambda: s3_artifact_store, time.time, limits=LIMITS)
    with ServedBridge(bridge, s3_artifact_store.datasets_bucket, time.time) as served:
        yield served
    bridge.close()


@pytest.mark.slow  # the server takes up to half a minute to start
def test_events_become_runs_of_the_real_prefect(api, served_by_prefect, run_until, s3_artifact_store):
    served, store = served_by_prefect, s3_artifact_store
    deployment = deploy(api, "sentiment")
    deploy(api, "support")
    assert TOKEN in served.client.headers["authorization"]
    unknown = served.client.post("/v1/events", json={"kind": "retrain.asked", "name": "nobody"})
    assert (unknown.status_code, unknown.json()["known"]) == (404, ["sentiment", "support"])

    # New data: the trigger makes a run whose parameters say why.
    store.objects.put(store.datasets_bucket, "sentiment/a.csv", CSV)
    address = f"s3://{store.datasets_bucket}/sentiment/a.csv"
    event = {"id": "one", "kind": "data.arrived", "name": "sentiment", "objects": [address]}
    assert served.client.post("/v1/events", json=event).status_code == 202
    run_until("one", "request seen")
    (run,) = runs_of(api, deployment)
    request = run["parameters"]["request"]
    assert (request["data"], request["solution"]) == (f"s3://{store.datasets_bucket}/sentiment/", "sentiment")
    assert request["cause"]["summary"] == f"new object {address}"
    assert request["cause"]["event_ids"] == ["one"]

    # The same attempt again is the same event to Prefect: no second run.
    (kept,) = served.bridge.queue.open_requests()
    for _ in range(3):
        served.bridge.prefect.emit(kept.name, kept.id, kept.attempt, kept.body)
    # A later one is known by its request, so that its second run is cancelled.
    served.bridge.prefect.emit(kept.name, kept.id, kept.attempt + 1, kept.body)
    wait_until(lambda: len(runs_of(api, deployment)) == 2, 30)
    served.bridge.queue.update_request(kept, time.time(), state="seen", attempt=2, flow_run_id=run["id"])
    wait_until(lambda: [item["state_type"] for item in runs_of(api, deployment)].count("CANCELLED") == 1, 30)

    # A run that is on holds back even a person.
    set_state(api, run, "RUNNING")
    assert served.client.post("/v1/events", json={"id": "two", "kind": "retrain.asked", "name": "sentiment"}).status_code == 202
    time.sleep(3)
    assert [item["state_type"] for item in runs_of(api, deployment)].count("RUNNING") == 1
    assert len(runs_of(api, deployment)) == 2

    # Crashed: asked for again; then completed: the person's turn.
    set_state(api, run, "CRASHED")
    wait_until(lambda: len(runs_of(api, deployment)) == 3, 30)
    again = next(item for item in runs_of(api, deployment) if item["state_type"] == "SCHEDULED")
    assert again["parameters"]["request"]["cause"]["request_id"] == kept.id
    run_until("one", "request seen")
    set_state(api, again, "RUNNING")
    set_state(api, again, "COMPLETED")
    run_until("one", "request completed")
    run_until("two", "request seen")
    last = next(item for item in runs_of(api, deployment) if item["state_type"] == "SCHEDULED")
    set_state(api, last, "RUNNING")
    set_state(api, last, "COMPLETED")
    run_until("two", "request completed")

    # The same data never trains twice.
    assert served.client.post("/v1/events", json={**event, "id": "three"}).status_code == 202
    run_until("three", "same data")

    # The budget counts the server's own figures of run time.
    assert served.bridge.prefect.active_runs(deployment) == []
    assert 0 < served.bridge.prefect.used_minutes(deployment) < 1
    long_run = api.post(f"/deployments/{deployment}/create_flow_run", json={"state": {"type": "SCHEDULED"}}).json()
    set_state(api, long_run, "RUNNING")
    assert [run.id for run in served.bridge.prefect.active_runs(deployment)] == [long_run["id"]]
    planned = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
    api.post(f"/deployments/{deployment}/create_flow_run", json={"state": planned})
    assert [run.id for run in served.bridge.prefect.active_runs(deployment)] == [long_run["id"]]
    assert served.bridge.prefect.run("00000000-0000-0000-0000-000000000000") is None
    assert served.count("events_refused", reason="unknown model") == 1
