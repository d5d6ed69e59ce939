"""What asked for this run, and what it is called in the Prefect UI."""

from typing import Any

from prefect.context import FlowRunContext
from prefect.runtime import flow_run as runtime

from ml.config import RunRequest, resolve_config
from ml.events import Cause


def with_cause(request: RunRequest) -> RunRequest:
    """The request with its cause: the one that the event bridge gave, else what Prefect knows of the flow run it is called in."""
    return request if request.cause is not None else request.model_copy(update={"cause": _cause_of_flow_run()})


def run_title() -> str:
    """Name of a flow run whose parameter is `request: RunRequest`: model, profile and cause."""
    request: Any = runtime.parameters["request"]
    config = resolve_config(with_cause(request))
    model = config.name if config.name == config.solution else f"{config.solution}/{config.name}"
    return f"{model} · {config.profile} · {config.cause.kind}"


def _cause_of_flow_run() -> Cause:
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run is None or flow_run.deployment_id is None:
        return Cause(kind="by hand")
    if flow_run.auto_scheduled:
        return Cause(kind="schedule", summary=f"due at {flow_run.expected_start_time:%Y-%m-%d %H:%M %Z}")
    return Cause(kind="by hand", summary="in the Prefect UI or through its API")
