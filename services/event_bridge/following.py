"""A request from its first emission to the end of its run."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml.errors import ServiceError
from services.event_bridge.event_queue import EventQueue, RetrainRequest
from services.event_bridge.metrics import BridgeMetrics
from services.event_bridge.prefect_api import NOT_STARTED_STATES, Deployment, FlowRun, PrefectApi, PrefectUnavailableError
from services.event_log import log_event

FIRST_UNSEEN_SECONDS = 15.0
LONGEST_UNSEEN_SECONDS = 60.0
LOOK_FOR_RUN_SECONDS = 0.5
LOOK_AT_RUN_SECONDS = 2.0
MAX_CRASHES = 2
DUPLICATE = "the same request as flow run"
"""How the message of a run begins that was cancelled because another run of its request is there."""

_ENDED = {"COMPLETED": "completed", "FAILED": "failed", "CANCELLED": "cancelled"}


class Following:
    """Emits requests and looks what became of them."""

    def __init__(self, queue: EventQueue, prefect: PrefectApi, metrics: BridgeMetrics):
        self._queue = queue
        self._prefect = prefect
        self._metrics = metrics
        self._next_look: dict[str, float] = {}

    def follow_all(self, now: float, deployments: Callable[[], Mapping[str, Deployment]]) -> float:
        """Look at every open request that is due. Returns after how many seconds to come again.

        Raises:
            PrefectUnavailableError: nothing is lost; call again.
        """
        requests = self._queue.open_requests()
        self._next_look = {request.id: self._next_look.get(request.id, now) for request in requests}
        for request in requests:
            if self._next_look[request.id] > now:
                continue
            try:
                seconds = self._follow(request, now, deployments)
            except PrefectUnavailableError:
                raise
            except ServiceError as error:
                # Refused for a reason of this request: the others go on.
                log_event("request refused by prefect", level=logging.ERROR, name=request.name, request_id=request.id, error=str(error))
                self._update(request, now, why=str(error))
                seconds = FIRST_UNSEEN_SECONDS
            self._next_look[request.id] = now + seconds
        return min((moment - now for moment in self._next_look.values()), default=math.inf)

    def emit(self, request: RetrainRequest, now: float) -> float:
        """Emit a request once more. An attempt whose answer was lost is repeated under the same number."""
        attempt = request.attempt + 1
        self._prefect.emit(request.name, request.id, attempt, request.body)
        why = "emitted" + (f" {attempt} times" if attempt > 1 else "") + "; there is no run of it yet"
        if attempt > 2:
            why += ": look whether the deployment's trigger on retrain.requested is registered and enabled"
        self._update(request, now, state="emitted", attempt=attempt, emitted=now, why=why)
        self._metrics.emitted.inc()
        log_event("emitted", name=request.name, request_id=request.id, attempt=attempt)
        return LOOK_FOR_RUN_SECONDS

    def _follow(self, request: RetrainRequest, now: float, deployments: Callable[[], Mapping[str, Deployment]]) -> float:
        """Seconds until it is to be looked at again."""
        if request.state == "seen":
            return self._look_at_run(request, now, deployments)
        deployment = deployments().get(request.name)
        if deployment is None:
            self._update(request, now, state="failed", why=f"no deployment trains {request.name} any more")
            return 0.0
        if run := self._find_run(request, deployment):
            self._metrics.runs_seen.inc()
            self._update(request, now, state="seen", flow_run_id=run.id, why=_words(run))
            return LOOK_FOR_RUN_SECONDS
        if request.state == "new" or request.emitted is None or now >= request.emitted + _unseen_seconds(request.attempt):
            return self.emit(request, now)
        return LOOK_FOR_RUN_SECONDS

    def _find_run(self, request: RetrainRequest, deployment: Deployment) -> FlowRun | None:
        """The run that came of a request. Of several, which a slow server makes of several attempts, one is left."""
        runs = [
            run
            for run in self._prefect.runs_since(deployment.id, request.created)
            if run.request_id == request.id and run.id not in request.crashed_run_ids and not run.message.startswith(DUPLICATE)
        ]
        if not runs:
            return None
        waiting = sorted((run for run in runs if run.state in NOT_STARTED_STATES), key=lambda run: (run.expected_start, run.id))
        started = [run for run in runs if run not in waiting]
        chosen = next((run for run in runs if run.id == request.flow_run_id), None) or [*started, *waiting][0]
        for run in waiting:
            if run.id != chosen.id:
                self._prefect.cancel(run.id, f"{DUPLICATE} {chosen.name}")
                log_event("duplicate run cancelled", name=request.name, request_id=request.id, flow_run=run.name)
        return chosen

    def _look_at_run(self, request: RetrainRequest, now: float, deployments: Callable[[], Mapping[str, Deployment]]) -> float:
        if request.attempt > 1 and (deployment := deployments().get(request.name)):
            self._find_run(request, deployment)
        run = self._prefect.run(request.flow_run_id or "")
        if run is None:
            self._update(request, now, state="cancelled", why=f"flow run {request.flow_run_id} was deleted")
        elif run.state == "CRASHED":
            self._metrics.runs_crashed.inc()
            crashed = (*request.crashed_run_ids, run.id)
            if len(crashed) > MAX_CRASHES:
                self._update(
                    request, now, state="failed", crashed_run_ids=crashed, why=f"{len(crashed)} runs crashed, the last: {_words(run)}"
                )
            else:
                why = f"{_words(run)}; asked for again"
                self._update(request, now, state="new", crashed_run_ids=crashed, flow_run_id=None, why=why)
        elif run.state in _ENDED:
            self._update(request, now, state=_ENDED[run.state], why=_words(run))
        else:
            if _words(run) != request.why:
                self._update(request, now, why=_words(run))
            return LOOK_AT_RUN_SECONDS
        return 0.0

    def _update(self, request: RetrainRequest, now: float, **changes: Any) -> None:
        after = self._queue.update_request(request, now, **changes)
        if after.state != request.state:
            level = logging.ERROR if after.state == "failed" else logging.INFO
            log_event("request is " + after.state, level=level, name=request.name, request_id=request.id, why=after.why)


def _unseen_seconds(attempt: int) -> float:
    """How long a run is waited for after an emission."""
    return min(FIRST_UNSEEN_SECONDS * 2 ** max(0, attempt - 1), LONGEST_UNSEEN_SECONDS)


def _words(run: FlowRun) -> str:
    return f"flow run {run.name} is {run.state.lower()}" + (f": {run.message[:300]}" if run.message else "")
