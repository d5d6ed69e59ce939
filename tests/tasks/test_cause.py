"""What asked for a run, told from the flow run that it is."""

import uuid
from datetime import UTC, datetime

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from ml.config import RunRequest
from ml.events import Cause
from tasks.cause import run_title, with_cause

DUE = datetime(2026, 11, 25, 3, 0, tzinfo=UTC)


def flow_run(**fields: object) -> FlowRun:
    return FlowRun.model_validate({"flow_id": uuid.uuid4(), "expected_start_time": DUE, **fields})


def inside(run: FlowRun, request: RunRequest | None = None) -> FlowRunContext:
    return FlowRunContext.model_construct(flow_run=run, parameters={"request": request})


@pytest.mark.parametrize(
    ("run", "cause"),
    [
        (flow_run(), Cause(kind="by hand")),
        (flow_run(deployment_id=uuid.uuid4()), Cause(kind="by hand", summary="in the Prefect UI or through its API")),
        (flow_run(deployment_id=uuid.uuid4(), auto_scheduled=True), Cause(kind="schedule", summary="due at 2026-11-25 03:00 UTC")),
    ],
    ids=["command line", "form", "schedule"],
)
def test_a_request_without_a_cause_gets_that_of_its_flow_run(run: FlowRun, cause: Cause):
    with inside(run):
        assert with_cause(RunRequest()).cause == cause


def test_outside_of_a_flow_a_run_is_by_hand():
    assert with_cause(RunRequest()).cause == Cause(kind="by hand")


def test_the_cause_that_the_event_bridge_gave_is_kept():
    given = Cause(kind="data.arrived", summary="new object s3://datasets/sentiment/a.csv", request_id="r1")
    with inside(flow_run(deployment_id=uuid.uuid4(), auto_scheduled=True)):
        assert with_cause(RunRequest(cause=given)).cause == given


@pytest.mark.parametrize(
    ("request_", "title"),
    [
        (RunRequest(), "sentiment · quick · by hand"),
        (RunRequest(data="/data/Reviews 2026.csv", profile="full"), "sentiment/reviews-2026 · full · by hand"),
        (RunRequest(name="support", cause=Cause(kind="drift.detected")), "sentiment/support · quick · drift.detected"),
    ],
)
def test_a_run_is_called_by_model_profile_and_cause(request_: RunRequest, title: str):
    with inside(flow_run(), request_):
        assert run_title() == title
