"""A small Prefect server over HTTP: the endpoints that the bridge uses, with the filters that it sends.

As the real one, it takes an event id once, and makes a run of `retrain.requested` through the trigger of a deployment.
`tests/services/event_bridge/test_real_prefect.py` shows the same bridge with the real server.
"""

import json
import re
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakePrefect:
    """
    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self.deployments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.triggers_work = True
        self.refusal: int | None = None
        self._event_ids: set[str] = set()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/api"

    def start(self) -> None:
        """Listen, on the port of the last time."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer("GET", None)

            def do_POST(self) -> None:
                self._answer("POST", json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _answer(self, method: str, body: Any) -> None:
                status, content = fake.answer(method, self.path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                # As a server that goes away would: no connection is kept over `stop`.
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def deploy(self, name: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        parameters = {"request": {"solution": name, "name": name} if request is None else request}
        deployment = {"id": str(uuid.uuid4()), "name": name, "flow": "training-pipeline", "parameters": parameters}
        self.deployments.append(deployment)
        return deployment

    def add_run(self, name: str, state: str, *, request: dict[str, Any] | None = None, starts_in: float = 0.0) -> dict[str, Any]:
        deployment = next(item for item in self.deployments if item["name"] == name)
        run = {
            "id": str(uuid.uuid4()),
            "name": f"run-{len(self.runs) + 1}",
            "deployment_id": deployment["id"],
            "parameters": {"request": request or deployment["parameters"]["request"]},
            "state": {"type": state, "message": None},
            "expected_start_time": self._now(starts_in),
            "start_time": None if state == "SCHEDULED" else self._now(),
            "estimated_run_time": 0.0,
        }
        self.runs.append(run)
        return run

    def set_state(self, run: dict[str, Any], state: str, *, minutes: float = 1.0, message: str | None = None) -> None:
        run["state"] = {"type": state, "message": message}
        run["start_time"] = run["start_time"] or self._now()
        run["estimated_run_time"] = minutes * 60

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self.refusal is not None:
            return self.refusal, {"detail": "on purpose"}
        match method, path.removeprefix("/api"):
            case "POST", "/deployments/filter":
                flows = body["flows"]["name"]["any_"]
                return 200, _page([item for item in self.deployments if item["flow"] in flows], body)
            case "POST", "/flow_runs/filter":
                found = [run for run in self.runs if run["deployment_id"] in body["deployments"]["id"]["any_"]]
                found = [run for run in found if _matches(run, body["flow_runs"])]
                key = {"EXPECTED_START_TIME_DESC": "expected_start_time", "START_TIME_DESC": "start_time"}[body["sort"]]
                return 200, _page(sorted(found, key=lambda run: run[key], reverse=True), body)
            case "POST", "/events":
                for event in body:
                    self._take(event)
                return 204, None
        if found := re.fullmatch(r"/api/flow_runs/([0-9a-f-]+)(/set_state)?", path):
            run = next((item for item in self.runs if item["id"] == found[1]), None)
            if run is None:
                return 404, {"detail": "Flow run not found"}
            if found[2]:
                run["state"] = {"type": body["state"]["type"], "message": body["state"].get("message")}
                return 201, {"status": "ACCEPT"}
            return 200, run
        return 404, {"detail": "Not Found"}

    def _take(self, event: dict[str, Any]) -> None:
        assert event["event"] == "retrain.requested"
        datetime.fromisoformat(event["occurred"])
        if event["id"] in self._event_ids:
            return
        self._event_ids.add(event["id"])
        self.events.append(event)
        name = event["resource"]["prefect.resource.id"].removeprefix("millstream.model.")
        if self.triggers_work and any(item["name"] == name for item in self.deployments):
            self.add_run(name, "SCHEDULED", request=event["payload"]["request"])

    def _now(self, later: float = 0.0) -> str:
        return datetime.fromtimestamp(self._clock() + later, UTC).isoformat()


def _page(found: list[dict[str, Any]], body: dict[str, Any]) -> list[dict[str, Any]]:
    assert body["limit"] <= 200
    return found[body["offset"] : body["offset"] + body["limit"]]


def _matches(run: dict[str, Any], condition: dict[str, Any]) -> bool:
    if "state" in condition and run["state"]["type"] not in condition["state"]["type"]["any_"]:
        return False
    for field in ("expected_start_time", "start_time"):
        limits = condition.get(field)
        if limits is None:
            continue
        moment = run[field]
        if moment is None or not limits.get("after_", "") <= moment <= limits.get("before_", "9"):
            return False
    return True
