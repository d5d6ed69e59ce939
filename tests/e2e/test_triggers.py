"""Each kind of trigger starts a real run: real object store and webhook, real bridge, real Prefect server and worker."""

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from ml.monitoring.check import LATE_SECONDS
from services.event_bridge.authentication import sign
from tests.e2e.conftest import write_reviews
from tests.faults.operated_stack import MODEL, OperatedStack, make_operated_stack


class TriggeredStack(OperatedStack):
    """A stack whose deployment trains on whatever lies under the model's prefix."""

    num_seen = 0

    def land(self, name: str, *, seed: int, num_rows: int = 300) -> None:
        """Put a file of reviews where the model's data lies."""
        path = write_reviews(self.folder / name, num_rows, seed=seed)
        store = self.store
        store.objects.put(store.datasets_bucket, f"{MODEL}/{name}", path.read_bytes())

    def next_run(self, timeout: float = 60) -> dict[str, Any]:
        """The next run that nobody has asked for yet, once it has ended."""
        found = self.until(lambda: (runs := self.runs()) and len(runs) > self.num_seen and runs, timeout, "a new run appears")
        self.num_seen += 1
        return self.wait_for(found[self.num_seen - 1]["id"])

    def events(self) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.get(f"{self.url('event-bridge')}/v1/events", headers=headers, trust_env=False).raise_for_status().json()["events"]

    @property
    def token(self) -> str:
        return (self.state_dir / "event-bridge" / "token").read_text()

    def config_of(self, run: dict[str, Any]) -> dict[str, Any]:
        """What the run left in the store: its config, found by the time at which it began."""
        store = self.store
        keys = sorted(info.key for info in store.objects.list(store.runs_bucket, "runs/") if info.key.endswith("/config.json"))
        began = datetime.fromisoformat(run["start_time"].replace("Z", "+00:00")) - timedelta(seconds=2)
        key = next(key for key in keys if key.split("/")[1] >= f"{began:%Y%m%dT%H%M%SZ}")
        return json.loads(store.objects.get(store.runs_bucket, key))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TriggeredStack]:
    folder = tmp_path_factory.mktemp("triggers")
    stack = TriggeredStack(make_operated_stack(folder).folder)
    started = stack.call("up")
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        request = stack.request("")
        del request["data"]
        stack.use_for_events(request)
        yield stack
    finally:
        stack.call("down")
        assert stack.processes() == []


def test_an_object_that_lands_starts_a_run_on_it(stack: TriggeredStack) -> None:
    stack.land("first.csv", seed=1)
    run = stack.next_run()
    assert run["state_type"] == "COMPLETED", run["state"]
    config = stack.config_of(run)
    assert config["data"]["source"] == f"s3://millstream-datasets/{MODEL}/"
    assert config["cause"]["kind"] == "data.arrived"
    assert "first.csv" in config["cause"]["summary"]
    assert config["cause"]["request_id"] and config["cause"]["data_digest"]


def test_the_same_bytes_again_start_nothing(stack: TriggeredStack) -> None:
    before = len(stack.events())
    stack.land("first.csv", seed=1)
    event = stack.until(lambda: len(found := stack.events()) > before and found[0]["status"] != "waiting" and found[0], 60, "it is decided")
    assert event["status"] == "same data", event
    assert len(stack.runs()) == stack.num_seen


def test_a_signed_call_of_a_person_starts_a_run(stack: TriggeredStack) -> None:
    body = json.dumps({"kind": "retrain.asked", "name": MODEL, "summary": "a new quarter"}).encode()
    now = str(int(time.time()))
    headers = {"webhook-id": "msg_1", "webhook-timestamp": now, "webhook-signature": sign("msg_1", now, body, stack.token)}
    url = f"{stack.url('event-bridge')}/v1/events"
    assert httpx.post(url, content=body, trust_env=False).status_code == 401
    assert httpx.post(url, content=body, headers=headers, trust_env=False).status_code == 202
    assert httpx.post(url, content=body, headers=headers, trust_env=False).status_code == 409, "replayed"
    run = stack.next_run()
    assert run["state_type"] == "COMPLETED"
    cause = stack.config_of(run)["cause"]
    assert (cause["kind"], cause["summary"]) == ("retrain.asked", "a new quarter")


def test_the_command_starts_a_run(stack: TriggeredStack) -> None:
    asked = stack.call("retrain", MODEL, "--why", "because")
    assert asked.returncode == 0, asked.stderr
    run = stack.next_run()
    assert run["state_type"] == "COMPLETED"
    assert stack.config_of(run)["cause"]["summary"] == "because"
    assert "retrain.asked" in stack.call("events", MODEL).stdout


def test_every_refused_call_was_counted(stack: TriggeredStack) -> None:
    metrics = httpx.get(f"{stack.url('event-bridge')}/metrics", trust_env=False).text
    assert any("refused" in line and "unsigned" in line and not line.endswith(" 0.0") for line in metrics.splitlines()), metrics


@pytest.mark.slow  # a minute until Prefect's scheduler looks; that it looks is tested in tests/services/test_prefect_server.py
def test_the_schedule_starts_a_run(stack: TriggeredStack) -> None:
    deployment = stack.deployment["id"]
    schedule = [{"schedule": {"cron": "* * * * *", "timezone": "UTC"}, "active": True, "slug": "every-minute"}]
    [created] = stack.api(f"/deployments/{deployment}/schedules", schedule)
    body = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}}
    run = stack.until(
        lambda: next((run for run in stack.api("/flow_runs/filter", body) if run["auto_scheduled"]), None), 150, "a scheduled run has ended"
    )
    stack.api(f"/deployments/{deployment}/schedules/{created['id']}", method="DELETE")
    assert run["state_type"] == "COMPLETED"
    assert stack.config_of(run)["cause"]["kind"] == "schedule"


@pytest.mark.slow
def test_what_landed_while_bridge_and_server_were_down_is_not_lost(stack: TriggeredStack) -> None:
    os.kill(stack.pid("supervisor"), signal.SIGSTOP)
    stack.kill_part("event-bridge")
    stack.kill_part("prefect-server")
    stack.land("second.csv", seed=2, num_rows=100)
    time.sleep(10)  # until the store has given up telling the bridge
    os.kill(stack.pid("supervisor"), signal.SIGCONT)
    run = stack.next_run(timeout=120)
    assert run["state_type"] == "COMPLETED", run["state"]
    assert stack.config_of(run)["cause"]["kind"] == "data.arrived"
    time.sleep(3)
    assert len(stack.runs()) == stack.num_seen, "one run, not two"


@pytest.mark.slow
def test_drift_and_wrong_answers_start_a_run(stack: TriggeredStack) -> None:
    monitoring = stack.api(f"/deployments/name/drift-monitoring/{MODEL}", method="GET")["id"]
    for first in (0, 300):  # an event needs the same finding twice in a row, on other requests
        ask_about_invoices_and_correct(stack, range(first, first + 300))
        check = stack.api(f"/deployments/{monitoring}/create_flow_run", {"parameters": {"request": {"name": MODEL, "num_repeats": 2}}})
        ended = stack.wait_for(check["id"])
        assert ended["state_type"] == "COMPLETED", ended["state"]
    run = stack.next_run()
    assert run["state_type"] == "COMPLETED"
    assert stack.config_of(run)["cause"]["kind"] in ("drift.detected", "metric.dropped")
    assert {event["kind"] for event in stack.events()} >= {"drift.detected", "metric.dropped"}


def ask_about_invoices_and_correct(stack: TriggeredStack, numbers: range) -> None:
    """Ask what no film review asks, and then say that each answer was wrong."""
    model = f"{stack.url('predictor')}/v1/{MODEL}"
    answers = []
    for start in numbers[::100]:
        texts = [
            f"invoice {number} overdue payment reminder account balance due ledger {number * 7}" for number in range(start, start + 100)
        ]
        items = [{"text": text} for text in texts]
        reply = httpx.post(f"{model}/predict", json={"items": items}, trust_env=False, timeout=60).raise_for_status().json()
        answers += [(reply["id"], item, answer["label"]) for item, answer in enumerate(reply["replies"])]
    wrong = [{"id": id_, "item": item, "label": "1" if label == "5" else "5"} for id_, item, label in answers[:200]]
    assert httpx.post(f"{model}/feedback", json={"items": wrong}, trust_env=False, timeout=60).status_code == 202
    time.sleep(LATE_SECONDS + 2)  # what is younger is for the next check


def test_registering_again_changes_nothing(stack: TriggeredStack) -> None:
    def registered() -> dict[str, list[str]]:
        deployments, automations = stack.api("/deployments/filter", {}), stack.api("/automations/filter", {})
        return {
            "deployments": sorted(deployment["id"] for deployment in deployments),
            "automations": sorted(automation["name"] for automation in automations),
            "schedules": sorted(schedule["slug"] for deployment in deployments for schedule in deployment["schedules"]),
        }

    before = registered()
    assert before["automations"] == ["crash silent flow runs", f"retrain {MODEL}"]
    assert stack.call("up").returncode == 0
    assert registered() == before


def test_the_log_tells_it_in_one_place(stack: TriggeredStack) -> None:
    log = Path(stack.state_dir / "logs" / "stack.log").read_text()
    assert all(f" {part}" in log for part in ("worker", "flow-runs", "event-bridge", "predictor", "supervisor"))
