"""The few calls to Prefect's REST API that the bridge needs."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from ml.errors import ServiceError
from ml.events import RETRAIN_REQUESTED, resource_id
from services.prefect_rest import open_prefect

TRAINING_FLOW = "training-pipeline"
PAGE = 200
TIMEOUT_SECONDS = 10
DAY_SECONDS = 24 * 3600.0
# Workers fetch a planned run this long before its time.
SOON_SECONDS = 15.0
# Clocks of two machines, and the time a request takes to become a run.
CLOCK_TOLERANCE_SECONDS = 300.0

ACTIVE_STATES = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED")
NOT_STARTED_STATES = ("SCHEDULED", "PENDING")


class PrefectUnavailableError(ServiceError):
    """The Prefect server does not answer, or answers that it is failing."""

    retryable = True


@dataclass(frozen=True)
class Deployment:
    """What trains a model; its name is the model's.

    Args:
        request: its parameter `request`; None when it has none.
    """

    id: str
    name: str
    request: dict[str, Any] | None


@dataclass(frozen=True)
class FlowRun:
    """Args:
    state: Prefect's state type, such as RUNNING.
    request_id: of the bridge's request that it came of, if it did.
    """

    id: str
    name: str
    state: str
    message: str
    request_id: str | None
    expected_start: str


class PrefectApi:
    """One Prefect server. May be shared between threads.

    Every call raises PrefectUnavailableError when the server does not answer, ServiceError when it refuses.

    Args:
        api_url: with the /api at its end, as PREFECT_API_URL.
        clock: seconds since the epoch.
    """

    def __init__(self, api_url: str, *, timeout_seconds: float = TIMEOUT_SECONDS, clock: Callable[[], float] = time.time):
        self.api_url = api_url.rstrip("/")
        self._clock = clock
        self._client = open_prefect(self.api_url, timeout_seconds)

    def close(self) -> None:
        self._client.close()

    def deployments(self, timeout_seconds: float | None = None) -> dict[str, Deployment]:
        """Model name -> the deployment of the training flow that trains it."""
        body = {"flows": {"name": {"any_": [TRAINING_FLOW]}}, "sort": "NAME_ASC"}
        found = [_deployment(values) for values in self._pages("/deployments/filter", body, timeout_seconds)]
        return {deployment.name: deployment for deployment in found}

    def active_runs(self, deployment_id: str) -> list[FlowRun]:
        """Runs that are running, or are to run now; not those that a schedule has planned for later."""
        condition = {"state": {"type": {"any_": ACTIVE_STATES}}, "expected_start_time": {"before_": _iso(self._clock() + SOON_SECONDS)}}
        return self._runs(deployment_id, condition)

    def runs_since(self, deployment_id: str, since: float) -> list[FlowRun]:
        """Runs that were to start at or after a time (seconds since the epoch, with tolerance), the newest first."""
        after, before = _iso(since - CLOCK_TOLERANCE_SECONDS), _iso(self._clock() + CLOCK_TOLERANCE_SECONDS)
        return self._runs(deployment_id, {"expected_start_time": {"after_": after, "before_": before}})

    def used_minutes(self, deployment_id: str) -> float:
        """Run time of the deployment's runs that started within the last 24 hours."""
        condition = {"start_time": {"after_": _iso(self._clock() - DAY_SECONDS)}}
        body = {"deployments": {"id": {"any_": [deployment_id]}}, "flow_runs": condition, "sort": "START_TIME_DESC"}
        return sum(values["estimated_run_time"] for values in self._pages("/flow_runs/filter", body)) / 60

    def run(self, flow_run_id: str) -> FlowRun | None:
        """None when it was deleted."""
        response = self._send("GET", f"/flow_runs/{flow_run_id}", accept=(404,))
        return None if response.status_code == 404 else _flow_run(response.json())

    def cancel(self, flow_run_id: str, why: str) -> None:
        """End a run that has not started."""
        self._send("POST", f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLED", "message": why}})

    def emit(self, name: str, request_id: str, attempt: int, request: dict[str, Any]) -> None:
        """Emit `retrain.requested`. The same attempt again is the same event to Prefect, which takes it once."""
        event = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"millstream:{request_id}:{attempt}")),
            "event": RETRAIN_REQUESTED,
            "occurred": _iso(self._clock()),
            "resource": {"prefect.resource.id": resource_id(name), "prefect.resource.name": name},
            "payload": {"request": request},
        }
        self._send("POST", "/events", [event])

    def _runs(self, deployment_id: str, condition: dict[str, Any]) -> list[FlowRun]:
        body = {"deployments": {"id": {"any_": [deployment_id]}}, "flow_runs": condition, "sort": "EXPECTED_START_TIME_DESC"}
        return [_flow_run(values) for values in self._pages("/flow_runs/filter", body)]

    def _pages(self, path: str, body: dict[str, Any], timeout_seconds: float | None = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self._send("POST", path, {**body, "limit": PAGE, "offset": len(found)}, timeout_seconds=timeout_seconds).json()
            found += page
            if len(page) < PAGE:
                return found

    def _send(
        self, method: str, path: str, body: Any = None, *, accept: tuple[int, ...] = (), timeout_seconds: float | None = None
    ) -> httpx.Response:
        where = f"{method} {self.api_url}{path}"
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_seconds is None else timeout_seconds
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise PrefectUnavailableError(
                f"{where}: no answer ({error!r}); check that the Prefect server runs (PREFECT_API_URL)"
            ) from error
        if response.status_code >= 500 or response.status_code == 429:
            raise PrefectUnavailableError(f"{where}: answered {response.status_code}; the Prefect server is busy or failing")
        if response.status_code >= 300 and response.status_code not in accept:
            raise ServiceError(f"{where}: refused with {response.status_code}: {response.text[:500]}")
        return response


def _deployment(values: dict[str, Any]) -> Deployment:
    request = (values.get("parameters") or {}).get("request")
    return Deployment(values["id"], values["name"], request if isinstance(request, dict) else None)


def _flow_run(values: dict[str, Any]) -> FlowRun:
    request = (values.get("parameters") or {}).get("request")
    cause = request.get("cause") if isinstance(request, dict) else None
    state = values.get("state") or {}
    return FlowRun(
        id=values["id"],
        name=values.get("name") or "",
        state=state.get("type") or values.get("state_type") or "PENDING",
        message=state.get("message") or "",
        request_id=cause.get("request_id") if isinstance(cause, dict) else None,
        expected_start=values.get("expected_start_time") or "",
    )


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()
