"""The routes of the event bridge."""

import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from ml.events import Event
from services.event_bridge.authentication import NotAuthenticated, check_bearer, check_bearer_or_signature
from services.event_bridge.dispatcher import Dispatcher
from services.event_bridge.event_queue import EventQueue
from services.event_bridge.metrics import BridgeMetrics
from services.event_bridge.parsing import MAX_EVENT_BYTES, MAX_STORE_EVENT_BYTES, EventRefused, parse_event, parse_json, read_body
from services.event_bridge.store_events import model_of, read_notification, to_event
from services.event_log import log_event

RETRY_AFTER_SECONDS = 5


def create_app(
    queue: EventQueue,
    dispatcher: Dispatcher,
    metrics: BridgeMetrics,
    *,
    token: str,
    datasets_bucket: str,
    clock: Callable[[], float] = time.time,
) -> FastAPI:
    """The application; the dispatcher's thread lives as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        dispatcher.start()
        yield
        await run_in_threadpool(dispatcher.stop)
        log_event("stopped")

    # The interactive pages of FastAPI load their scripts from a CDN; this service sends no browser elsewhere.
    app = FastAPI(title="Millstream event bridge", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.exception_handler(EventRefused)
    async def refuse(_: Request, error: EventRefused) -> JSONResponse:
        metrics.refused.labels(error.reason).inc()
        log_event("refused", status=error.status, reason=error.reason)
        return JSONResponse({"detail": error.detail, **error.fields}, status_code=error.status)

    @app.exception_handler(NotAuthenticated)
    async def refuse_stranger(_: Request, error: NotAuthenticated) -> JSONResponse:
        metrics.refused.labels(error.reason).inc()
        log_event("refused", status=401, reason=error.reason)
        return JSONResponse({"detail": str(error)}, status_code=401, headers={"WWW-Authenticate": "Bearer"})

    @app.exception_handler(sqlite3.Error)
    async def not_stored(_: Request, error: sqlite3.Error) -> JSONResponse:
        metrics.refused.labels("not stored").inc()
        log_event("not stored", error=repr(error))
        detail = f"the queue cannot be written ({error}); nothing was accepted, send it again"
        return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

    def keep(event: Event, objects: dict[str, str] | None = None) -> bool:
        """Whether the event is new. It is on disk when this returns."""
        added = queue.add_event(event, clock(), objects)
        if added:
            metrics.accepted.labels(event.kind).inc()
            dispatcher.wake()
            log_event("event", id=event.id, kind=event.kind, name=event.name, source=event.source, summary=event.summary)
        else:
            metrics.replayed.inc()
        return added

    @app.post("/v1/events", status_code=202, summary="One event")
    async def post_event(request: Request) -> JSONResponse:
        body = await read_body(request, MAX_EVENT_BYTES)
        webhook_id = check_bearer_or_signature(request.headers, body, token, clock())
        event = parse_event(body, webhook_id)
        return await run_in_threadpool(answer, event)

    def answer(event: Event) -> JSONResponse:
        known = dispatcher.known_models(event.name)
        if known is not None and event.name not in known:
            names = ", ".join(known) or "none"
            raise EventRefused(404, "unknown model", f"no deployment trains {event.name!r}; models that one trains: {names}", known=known)
        if keep(event):
            return JSONResponse({"id": event.id, "status": "waiting"}, status_code=202)
        became = _became(queue.find_event(event.id) or {}, dispatcher)
        detail = "this event was received before; it counts once"
        return JSONResponse({"id": event.id, "detail": detail, **became}, status_code=409)

    @app.post("/v1/store-events", status_code=202, summary="What an object store's webhook sends")
    async def post_store_event(request: Request) -> JSONResponse:
        check_bearer(request.headers, token)
        content = parse_json(await read_body(request, MAX_STORE_EVENT_BYTES))
        return await run_in_threadpool(answer_store, content)

    def answer_store(content: dict[str, Any]) -> JSONResponse:
        notification = read_notification(content, datasets_bucket)
        accepted, replayed, ignored = [], [], list(notification.ignored)
        for landed in notification.landed:
            # Nobody reads the answer to a webhook, and a refusal is sent again: what no deployment trains on is left alone.
            known = dispatcher.known_models(model_of(landed.key))
            if known is not None and model_of(landed.key) not in known:
                ignored.append("unknown model")
                continue
            event = to_event(landed)
            new = keep(event, {landed.key: landed.etag} if landed.etag else None)
            (accepted if new else replayed).append(event.id)
        for reason in ignored:
            metrics.ignored.labels(reason).inc()
        return JSONResponse({"accepted": accepted, "replayed": replayed, "ignored": ignored}, status_code=202 if accepted else 200)

    @app.get("/healthz", summary="Whether events are taken and decided about")
    def healthz() -> JSONResponse:
        if not dispatcher.alive:
            return JSONResponse({"status": "the dispatcher's thread has ended; restart the event bridge"}, status_code=503)
        try:
            queue.check_writable(clock())
        except sqlite3.Error as error:
            return JSONResponse({"status": f"the queue cannot be written ({error}); free disk space"}, status_code=503)
        return JSONResponse({"status": "alive"})

    @app.get("/v1/events", summary="Recent events and requests, and what became of each")
    def list_events(request: Request, name: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> dict[str, Any]:
        check_bearer(request.headers, token)
        events = [{**values, "received": _iso(values["received"])} for values in queue.recent_events(name, limit)]
        return {
            "events": [{**_without_request(values), **_became(values, dispatcher)} for values in events],
            "requests": [_request_values(item) for item in queue.recent_requests(name, limit)],
        }

    @app.get("/metrics", summary="Counters, in Prometheus's format")
    def show_metrics() -> Response:
        return Response(metrics.render(*queue.count_open()), media_type=CONTENT_TYPE_LATEST)

    return app


def _became(values: dict[str, Any], dispatcher: Dispatcher) -> dict[str, Any]:
    """What became of an event: `status`, and `why` in words."""
    state = values.get("state", "waiting")
    if state == "requested":
        return {"status": f"request {values['request_state']}", "why": values["request_why"], "request_id": values["request_id"]}
    why = {
        "waiting": dispatcher.waits.get(values.get("name", ""), "is about to be decided"),
        "same data": "the last run was trained on this very data",
        "no data": "no object that can be read lies under the model's name any more",
        "no deployment": "no deployment trains this model",
    }
    return {"status": state, "why": why.get(state, state), "request_id": None}


def _without_request(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("request_") and key != "state"}


def _request_values(request: Any) -> dict[str, Any]:
    values = asdict(request)
    del values["body"]
    values["cause"] = request.cause.model_dump(mode="json")
    return values | {key: _iso(values[key]) for key in ("created", "emitted", "closed")}


def _iso(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
