"""The routes of the predictor."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from services.event_log import log_event
from services.predictor.checking import RequestRefused, parse_items, read_body
from services.predictor.feedback import check_feedback, feedback_schema, store_feedback
from services.predictor.inference import InferencePool
from services.predictor.models import LiveModel, Models, Snapshot
from services.predictor.openapi import FEEDBACK_ROUTE, PREDICT_ROUTE, build_openapi
from services.predictor.prediction_log import PredictionLog, new_prediction_id

NO_LOG_HEADER = "x-millstream-log"
"""With the value "no", a caller keeps its request out of the prediction log: tests and probes are no real traffic."""


def create_app(models: Models, pool: InferencePool, prediction_log: PredictionLog) -> FastAPI:
    """The application; `models` is followed while it runs."""
    # Apart from inference, which a store that hangs must not stop.
    feedback_pool = InferencePool(num_threads=2)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        models.start()
        prediction_log.start()
        yield
        models.stop()
        pool.close()
        await asyncio.to_thread(prediction_log.stop)
        feedback_pool.close()
        log_event("stopped")

    # The interactive pages of FastAPI load their scripts from a CDN; this service sends no browser elsewhere.
    app = FastAPI(
        title="Millstream predictor",
        version="1",
        description="Answers with the champion of every model name.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.openapi = lambda: build_openapi(app, models.snapshot.live.values())  # type: ignore[method-assign]

    @app.exception_handler(RequestRefused)
    async def refuse(_: Request, error: RequestRefused) -> JSONResponse:
        headers = {} if error.retry_after_seconds is None else {"Retry-After": str(error.retry_after_seconds)}
        return JSONResponse({"detail": error.detail, "problems": error.problems}, status_code=error.status, headers=headers)

    @app.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> JSONResponse:
        if not models.following:
            return JSONResponse({"status": "the thread that follows the registry has ended; restart the predictor"}, status_code=503)
        return JSONResponse({"status": "alive"})

    @app.get("/readyz", summary="Whether every champion in the registry is live")
    async def readyz() -> JSONResponse:
        content = readiness(models.snapshot)
        return JSONResponse(content, status_code=200 if content["ready"] else 503)

    @app.get("/v1", summary="All models")
    async def list_models() -> dict:
        snapshot = models.snapshot
        names = sorted({*snapshot.live, *snapshot.champions})
        return {"models": [_summary(name, snapshot) for name in names]}

    @app.get("/v1/{name}", summary="One model: version, schemas, state")
    async def show_model(name: str) -> dict:
        snapshot = models.snapshot
        if name not in snapshot.live and name not in snapshot.champions:
            raise _unknown(name, snapshot)
        live = snapshot.live.get(name)
        details = {"solution": None, "options": None, "input_schema": None, "output_schema": None, "feedback_schema": None}
        if live is not None:
            bundle = live.bundle
            details = {
                "solution": bundle.solution,
                "options": bundle.options,
                "input_schema": bundle.input_schema,
                "output_schema": bundle.output_schema,
                "feedback_schema": feedback_schema(live),
            }
        return {**_summary(name, snapshot), **details, "prediction_log": prediction_log.describe()}

    @app.post(PREDICT_ROUTE)
    async def predict(name: str, request: Request) -> JSONResponse:
        started = time.perf_counter()
        model = models.snapshot.live.get(name)
        status, num_items = 500, 0
        try:
            if model is None:
                raise _unknown(name, models.snapshot)
            body = await read_body(request)
            items = parse_items(body)
            num_items = len(items)
            replies = await pool.run(lambda: _answer(model, items))
            prediction_id = new_prediction_id()
            response = JSONResponse({"name": name, "version": model.version, "id": prediction_id, "replies": replies})
            status = 200
            if request.headers.get(NO_LOG_HEADER) != "no":
                prediction_log.offer(prediction_id, name, model.version, items, replies, len(body) + len(response.body))
            return response
        except RequestRefused as refused:
            status = refused.status
            raise
        except Exception as error:
            # The error's own text may quote the request, so only its type is logged.
            log_event("model failed", level=logging.ERROR, name=name, version=model and model.version, error=type(error).__name__)
            detail = f"{name} failed on this request ({type(error).__name__}); other requests are not affected"
            raise RequestRefused(500, detail) from error
        finally:
            milliseconds = round((time.perf_counter() - started) * 1000, 2)
            version = model.version if model else None
            log_event("predict", name=name, version=version, items=num_items, status=status, milliseconds=milliseconds)

    @app.post(FEEDBACK_ROUTE)
    async def give_feedback(name: str, request: Request) -> JSONResponse:
        model = models.snapshot.live.get(name)
        if model is None:
            raise _unknown(name, models.snapshot)
        items = parse_items(await read_body(request))
        check_feedback(model, items)
        status = 500
        try:
            await feedback_pool.run(lambda: store_feedback(prediction_log.store, name, items))
            status = 202
        except RequestRefused as refused:
            status = refused.status
            raise
        finally:
            log_event("feedback", name=name, items=len(items), status=status)
        return JSONResponse({"name": name, "stored": len(items)}, status_code=202)

    return app


def readiness(snapshot: Snapshot) -> dict:
    """`ready` is true when the registry has been read once and each of its champions is live.

    A registry that has become unreachable does not make it false: what is live keeps answering.
    """
    waiting = {name: _why_not_live(name, snapshot) for name in snapshot.champions if not _is_current(name, snapshot)}
    return {
        "ready": snapshot.registry_read and not waiting,
        "live": {name: model.version for name, model in sorted(snapshot.live.items())},
        "not_live": dict(sorted(waiting.items())),
        "registry": snapshot.registry_error or ("reachable" if snapshot.registry_read else "not read yet"),
    }


def _answer(model: LiveModel, items: list) -> list[dict]:
    model.checker.check(items)
    return model.predictor.predict(items)


def _is_current(name: str, snapshot: Snapshot) -> bool:
    return name in snapshot.live and snapshot.live[name].version == snapshot.champions[name]


def _why_not_live(name: str, snapshot: Snapshot) -> str:
    failure = snapshot.failures.get(name)
    reason = failure.message if failure else "is being loaded"
    still = snapshot.live.get(name)
    return f"champion {snapshot.champions[name]}: {reason}" + (f"; still serving {still.version}" if still else "")


def _summary(name: str, snapshot: Snapshot) -> dict:
    live, failure = snapshot.live.get(name), snapshot.failures.get(name)
    return {
        "name": name,
        "version": live.version if live else None,
        "bundle_digest": live.bundle_digest if live else None,
        "live_since": live.since if live else None,
        "champion": snapshot.champions.get(name),
        "alias_generation": snapshot.generations.get(name),
        "error": {"version": failure.version, "message": failure.message, "attempts": failure.num_attempts} if failure else None,
        "predict_path": PREDICT_ROUTE.format(name=name),
    }


def _unknown(name: str, snapshot: Snapshot) -> RequestRefused:
    known = ", ".join(sorted(snapshot.live)) or "none"
    if name in snapshot.champions:
        return RequestRefused(503, f"{name}: {_why_not_live(name, snapshot)}; try again shortly", retry_after_seconds=1)
    return RequestRefused(404, f"there is no model {name!r}; live models: {known}")
