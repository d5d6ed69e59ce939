"""Deployments and runs on a real Prefect server, over its REST API."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import httpx


def wait_for(check: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"{what} was not seen within {seconds} s"
        time.sleep(0.2)
    return found


def ask(api_url: str, path: str, body: object = None, method: str = "POST") -> Any:
    answer = httpx.request(method, f"{api_url}{path}", json=body, timeout=30, trust_env=False)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def make_deployment(api_url: str, **fields: object) -> str:
    """A deployment of a flow without code; its id."""
    flow = ask(api_url, "/flows/", {"name": "flow"})
    made = ask(api_url, "/deployments/", {"name": uuid.uuid4().hex, "flow_id": flow["id"], "enforce_parameter_schema": False, **fields})
    return made["id"]


def make_scheduled_deployment(api_url: str) -> str:
    schedule = {"interval": 3600, "anchor_date": "2026-01-01T00:00:00Z"}
    return make_deployment(api_url, schedules=[{"active": True, "schedule": schedule}])


def scheduled_runs(api_url: str, deployment_id: str) -> list[dict]:
    wanted = {"deployment_id": {"any_": [deployment_id]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    return ask(api_url, "/flow_runs/filter", {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_ASC"})


def make_run(api_url: str, deployment_id: str) -> str:
    return ask(api_url, f"/deployments/{deployment_id}/create_flow_run", {})["id"]


def set_state(api_url: str, run_id: str, state: str, *, force: bool = False) -> dict:
    """The state that the server then says it has: another one when a rule of the server refused it."""
    return ask(api_url, f"/flow_runs/{run_id}/set_state", {"state": {"type": state}, "force": force})["state"]
