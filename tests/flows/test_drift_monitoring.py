"""The flow with a real Prefect server and object store, in a process of its own; the event bridge is an HTTP server here."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from ml.events import Event
from ml.monitoring.state import read_state
from ml.storage import keys
from services.prefect_server import start_prefect_server, stop_prefect_server
from tests.ml.monitoring.champions import Champion, make_champion
from tests.ml.monitoring.text_sources import TextSource

TOKEN = "a-secret-of-the-bridge"

# Prints what the flow returned, and every address outside loopback that the process tried to reach.
RUN_FLOW = """
import json, socket, sys
outside = []
connect = socket.socket.connect
def watched(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        outside.append(address)
    return connect(self, address)
socket.socket.connect = watched
from flows.drift_monitoring import drift_monitoring
from ml.monitoring.config import DriftRequest
state = drift_monitoring(DriftRequest.model_validate_json(sys.argv[1]), return_state=True)
outcome = state.result(raise_on_failure=False)
result = {"error": repr(outcome)} if isinstance(outcome, Exception) else outcome.model_dump(mode="json")
print(json.dumps({"state": state.type.value, "outside": outside, "result": result}))
"""


class Bridge:
    """Takes events as the event bridge does; `status` is what it answers."""

    def __init__(self) -> None:
        self.status = 202
        self.events: list[Event] = []
        bridge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert (self.path, self.headers["Authorization"]) == ("/v1/events", f"Bearer {TOKEN}")
                if bridge.status == 202:
                    bridge.events.append(Event.model_validate_json(body))
                self.send_response(bridge.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    bridge = Bridge()
    yield bridge
    bridge.server.shutdown()
    bridge.server.server_close()


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    state_dir = tmp_path_factory.mktemp("prefect")
    try:
        yield start_prefect_server(state_dir)
    finally:
        stop_prefect_server(state_dir)


@pytest.fixture
def champion(s3_artifact_store) -> Champion:
    return make_champion(s3_artifact_store, TextSource(1).draw(800))


@pytest.fixture
def run_flow(object_store_endpoint, bucket_prefix, prefect_api, bridge, tmp_path):
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PREFECT_HOME": str(tmp_path / "prefect-client"),
        "PREFECT_API_URL": prefect_api,
        "MILLSTREAM_STATE_DIR": str(tmp_path / "state"),
        "MILLSTREAM_S3_ENDPOINT": object_store_endpoint.endpoint,
        "MILLSTREAM_S3_ACCESS_KEY": object_store_endpoint.access_key,
        "MILLSTREAM_S3_SECRET_KEY": object_store_endpoint.secret_key,
        "MILLSTREAM_BUCKET_PREFIX": bucket_prefix,
        "MILLSTREAM_BRIDGE_URL": bridge.url,
        "MILLSTREAM_BRIDGE_TOKEN": TOKEN,
    }

    def run(request: dict) -> dict:
        finished = subprocess.run(
            [sys.executable, "-c", RUN_FLOW, json.dumps(request)], env=environment, capture_output=True, text=True, timeout=200
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    return run


def log_requests(champion: Champion, *, median_length: float, prefix: str) -> None:
    """Answers of the last minutes: old enough for the next check, newer than the last one."""
    champion.answer(TextSource(ord(prefix), median_length=median_length).draw(260), datetime.now(UTC), prefix=prefix, spread_minutes=3)


def test_drift_that_repeats_reaches_the_bridge_once_and_the_run_page_shows_it(champion, run_flow, bridge, prefect_api, tmp_path):
    request = {"name": "reviews", "num_repeats": 1}
    log_requests(champion, median_length=30, prefix="a")

    bridge.status = 503
    down = run_flow(request)
    assert down["state"] == "FAILED"
    assert "BridgeUnavailableError" in down["result"]["error"]
    (waiting,) = read_state(champion.store, "reviews").due_events

    bridge.status = 202
    done = run_flow(request)
    assert (done["state"], done["outside"]) == ("COMPLETED", [])
    assert done["result"]["status"] == "not enough rows"
    assert bridge.events == [waiting]
    assert (waiting.kind, waiting.name) == ("drift.detected", "reviews")
    state = read_state(champion.store, "reviews")
    assert (state.due_events, state.drift.emitted) == ((), True)

    run_flow(request)
    assert bridge.events == [waiting]

    artifacts = httpx.post(f"{prefect_api}/artifacts/filter", json={}, trust_env=False).json()
    pages = [artifact["data"] for artifact in artifacts if artifact["key"] == "reviews-drift"]
    (page,) = [data for data in pages if "| requests | length | changed |" in data]
    assert page.startswith("**Inputs differ from the training data")
    assert "](data:image/svg+xml;base64," in page
    runs = httpx.post(f"{prefect_api}/task_runs/filter", json={}, trust_env=False).json()
    names = {run["name"] for run in runs}
    assert names == {"open_window", "compare_window", "conclude_check", "publish_check", "send_events"}

    first_check = waiting.id.rpartition(":")[2]
    stored = champion.store.objects.get(champion.store.monitoring_bucket, keys.check_file("reviews", first_check, "report.html"))
    assert b"Inputs differ from the training data" in stored
    outcome = champion.store.objects.get(champion.store.monitoring_bucket, keys.check_file("reviews", first_check, "outcome.json"))
    assert json.loads(outcome)["status"] == "changed"
    latest = tmp_path / "state" / "checks" / "reviews" / "latest.html"
    assert "Too few rows to say anything" in latest.read_text(encoding="utf-8")


def test_without_champion_the_flow_completes_and_says_so(s3_artifact_store, run_flow, bridge):
    done = run_flow({"name": "nobody"})
    assert (done["state"], done["result"]["status"]) == ("COMPLETED", "no champion")
    assert bridge.events == []


def test_the_form_of_the_deployment_is_described_and_bounded():
    from prefect.utilities.callables import parameter_schema

    from flows.drift_monitoring import drift_monitoring

    definition = parameter_schema(drift_monitoring).definitions["DriftRequest"]
    assert all(field["description"] for field in definition["properties"].values())
    assert definition["properties"]["significance"]["maximum"] == 0.2


def test_monitoring_is_not_imported_by_the_training_flow(tmp_path: Path):
    code = "import sys, flows.training_pipeline; print([name for name in sys.modules if name.startswith('ml.monitoring')])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert finished.stdout.strip() == "[]"
