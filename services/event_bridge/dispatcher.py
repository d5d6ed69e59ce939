"""The thread that decides when a run is due, asks Prefect for it, and follows the request until its run has ended.

Everything it knows is in the queue, so it may be killed between any two lines: what it did not finish it does again.
A request is emitted at least once; the run that came of it is recognised by the request's id in its parameters.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ml.data.landed import landed_address, landed_objects
from ml.errors import MillstreamError, ServiceError
from ml.events import Cause, new_event_id
from ml.storage.artifacts import ArtifactStore
from services.event_bridge.datasets import data_digest, new_objects, polled_event
from services.event_bridge.decision import (
    BUDGET_SECONDS,
    BY_A_PERSON,
    OVER_BUDGET,
    Limits,
    Situation,
    WaitingEvent,
    cause_kind,
    decide,
    seconds_until_due,
    summarize,
)
from services.event_bridge.event_queue import EventQueue, RetrainRequest
from services.event_bridge.following import Following
from services.event_bridge.metrics import BridgeMetrics
from services.event_bridge.prefect_api import Deployment, PrefectApi, PrefectUnavailableError
from services.event_log import log_event

MAX_EVENT_IDS = 100
CLEAN_SECONDS = 3600.0
RETRY_SECONDS = 5.0
LOOK_UP_SECONDS = 2.0
"""How long the sender of an event waits for Prefect to say which models there are."""
STOP_SECONDS = 3.0  # what it is in the middle of may be broken off: the queue knows


@dataclass(frozen=True)
class Pace:
    """How often what others change is looked at, in seconds; shorter in tests."""

    dataset_poll: float = 60.0
    first_retry: float = 0.5
    longest_retry: float = 5.0


class Dispatcher:
    """
    Args:
        open_store: gives the artifact store; called again after a failure, since the store may come up later.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        queue: EventQueue,
        prefect: PrefectApi,
        open_store: Callable[[], ArtifactStore],
        limits: Limits,
        metrics: BridgeMetrics,
        *,
        pace: Pace = Pace(),
        clock: Callable[[], float] = time.time,
    ):
        self._queue = queue
        self._prefect = prefect
        self._open_store = open_store
        self._limits = limits
        self._metrics = metrics
        self._pace = pace
        self._clock = clock
        self._following = Following(queue, prefect, metrics)
        self._store: ArtifactStore | None = None
        self._deployments: dict[str, Deployment] | None = None
        self._next_poll = self._next_cleaning = -math.inf
        self._prefect_failures = 0
        self._prefect_retry_at = -math.inf
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self.waits: Mapping[str, str] = {}
        """Model -> why its waiting events wait."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(STOP_SECONDS)

    def wake(self) -> None:
        """An event came: look at once."""
        self._wake.set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def known_models(self, name: str) -> list[str] | None:
        """All models that a deployment trains, by name; None when Prefect does not answer.

        Prefect is asked only when it was not yet known that `name` is one of them.
        """
        known = self._deployments
        if known is None or name not in known:
            if self._prefect_failures:
                return None
            try:
                known = self._deployments = self._prefect.deployments(LOOK_UP_SECONDS)
            except ServiceError:
                self._metrics.prefect_unreachable.inc()
                return None
        return sorted(known)

    def step(self) -> float:
        """Do all that is due now. Returns after how many seconds to come again."""
        now = self._clock()
        if now < self._prefect_retry_at:
            return self._prefect_retry_at - now
        try:
            # Requests first: one whose run has ended makes way for the next.
            delays = [self._following.follow_all(now, self._known_deployments), self._decide_all(now), self._poll_datasets(now)]
        except ServiceError as error:
            return self._prefect_fails(error, now)
        self._prefect_answered()
        return max(0.0, min(*delays, self._clean(now)))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                delay = self.step()
            except Exception as error:
                # Such as a full disk: nothing is lost, and the thread must outlive it.
                log_event("step failed", level=logging.ERROR, exc_info=True, error=repr(error))
                delay = RETRY_SECONDS
            if not self._stopping.is_set():
                self._wake.wait(delay)

    def _decide_all(self, now: float) -> float:
        waiting = self._queue.waiting_events()
        open_requests = {request.name: request for request in self._queue.open_requests()}
        waits, delay = {}, math.inf
        for name, events in waiting.items():
            if request := open_requests.get(name):
                waits[name] = f"request {request.id}: {request.why}"
                continue  # following it to its end wakes us
            try:
                why, seconds = self._decide(name, events, now)
            except PrefectUnavailableError:
                raise
            except MillstreamError as error:
                # Something about this model, or about the store: the others go on.
                if not isinstance(error, ServiceError):
                    self._metrics.store_unreachable.inc()
                why, seconds = str(error), RETRY_SECONDS
            delay = min(delay, seconds)
            if why:
                waits[name] = why
                if self.waits.get(name) != why:
                    log_event("waits", name=name, events=len(events), why=why)
        self.waits = waits
        return delay

    def _decide(self, name: str, events: list[WaitingEvent], now: float) -> tuple[str, float]:
        """Why the events still wait, empty when they do not, and when to look again."""
        last_request = self._queue.last_request_time(name)
        if seconds := seconds_until_due(events, last_request, self._limits, now):
            until = time.strftime("%H:%M:%S UTC", time.gmtime(now + seconds))
            return f"cool-down until {until} (MILLSTREAM_COOL_DOWN_SECONDS)", seconds
        self._deployments = self._prefect.deployments()
        deployment = self._deployments.get(name)
        event_ids = [event.id for event in events]
        if deployment is None:
            self._close(name, event_ids, "no deployment", now)
            # Should it get one, all that lies there is new to it.
            self._queue.forget_objects(name, list(self._queue.seen_objects(name)))
            return "", math.inf
        if deployment.request is None:
            return f"the deployment {name} has no parameter `request`; register it again (prefect deploy --all)", BUDGET_SECONDS
        situation = self._situation(deployment, events, last_request)
        decision = decide(events, situation, self._limits, now)
        if decision.action == "wait":
            if decision.why.startswith(OVER_BUDGET) and not self.waits.get(name, "").startswith(OVER_BUDGET):
                self._metrics.over_budget.inc()
            return decision.why, decision.seconds
        if decision.action == "close":
            if decision.why == "same data":
                self._metrics.same_data.inc(len(events))
            self._close(name, event_ids, decision.why, now)
            return "", math.inf
        return "", self._ask(deployment, events, situation.data_digest, now)

    def _situation(self, deployment: Deployment, events: list[WaitingEvent], last_request: float | None) -> Situation:
        runs = self._prefect.active_runs(deployment.id)
        if runs:
            return Situation(last_request, f"flow run {runs[0].name} is {runs[0].state.lower()}", 0.0, None, None)
        by_a_person = any(event.kind == BY_A_PERSON for event in events)
        return Situation(
            last_request,
            busy=None,
            used_minutes=0.0 if by_a_person else self._prefect.used_minutes(deployment.id),
            data_digest=data_digest(landed_objects(self._artifact_store(), deployment.name)),
            trained_digest=self._queue.trained_digest(deployment.name),
        )

    def _ask(self, deployment: Deployment, events: list[WaitingEvent], digest: str | None, now: float) -> float:
        cause = Cause(
            kind=cause_kind(events),  # type: ignore[arg-type]
            summary=summarize(events),
            request_id=new_event_id(),
            event_ids=tuple(event.id for event in events[:MAX_EVENT_IDS]),
            data_digest=digest,
        )
        body = {**(deployment.request or {}), "cause": cause.model_dump(mode="json")}
        body["name"] = body.get("name") or deployment.name
        # As the run itself would resolve it (ml.runs.start_run), said here so that everybody sees it.
        if digest is not None and not body.get("data"):
            body["data"] = landed_address(self._artifact_store(), deployment.name)
        request = RetrainRequest(str(cause.request_id), deployment.name, cause, body, len(events), created=now, why="not emitted yet")
        self._queue.add_request(request, [event.id for event in events])
        self._metrics.requests.inc()
        self._metrics.coalesced.inc(len(events) - 1)
        log_event("request", name=request.name, request_id=request.id, kind=cause.kind, why=cause.summary, events=len(events))
        return self._following.emit(request, now)

    def _close(self, name: str, event_ids: list[str], state: str, now: float) -> None:
        self._queue.close_events(event_ids, state, now)
        log_event("events closed", name=name, events=len(event_ids), why=state)

    def _poll_datasets(self, now: float) -> float:
        """List the prefix of every model: what the store's webhook did not tell."""
        if now < self._next_poll:
            return self._next_poll - now
        self._deployments = self._prefect.deployments()
        pause, found = self._pace.dataset_poll, False
        for name in self._deployments:
            try:
                found |= self._poll_dataset(name, now)
            except MillstreamError as error:
                self._metrics.store_unreachable.inc()
                log_event("listing failed", level=logging.WARNING, name=name, error=str(error))
                pause = min(pause, RETRY_SECONDS)
        self._next_poll = now + pause
        return 0.0 if found else pause

    def _poll_dataset(self, name: str, now: float) -> bool:
        """Whether there was something new."""
        objects, seen = landed_objects(self._artifact_store(), name), self._queue.seen_objects(name)
        if gone := sorted(set(seen) - {info.key for info in objects}):
            self._queue.forget_objects(name, gone)
        new = new_objects(objects, seen)
        if not new:
            return False
        event = polled_event(name, new)
        self._queue.add_event(event, now, {info.key: info.etag for info in new})
        self._metrics.accepted.labels(event.kind).inc()
        log_event("event", id=event.id, kind=event.kind, name=name, source=event.source, summary=event.summary)
        return True

    def _clean(self, now: float) -> float:
        if now >= self._next_cleaning:
            self._next_cleaning = now + CLEAN_SECONDS
            if num_rows := self._queue.clean(now):
                log_event("cleaned", rows=num_rows)
        return self._next_cleaning - now

    def _artifact_store(self) -> ArtifactStore:
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def _known_deployments(self) -> dict[str, Deployment]:
        if self._deployments is None:
            self._deployments = self._prefect.deployments()
        return self._deployments

    def _prefect_fails(self, error: ServiceError, now: float) -> float:
        """Seconds until it is asked again."""
        self._metrics.prefect_unreachable.inc()
        if not self._prefect_failures:
            log_event("prefect fails", level=logging.WARNING, error=str(error))
        pause = min(self._pace.first_retry * 2**self._prefect_failures, self._pace.longest_retry)
        self._prefect_failures = min(self._prefect_failures + 1, 10)
        self._prefect_retry_at = now + pause
        self.waits = dict.fromkeys(self._queue.waiting_events(), str(error))
        return pause

    def _prefect_answered(self) -> None:
        if self._prefect_failures:
            log_event("prefect answers again")
        self._prefect_failures = 0
