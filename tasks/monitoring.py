"""Check a served model for drift and for a dropped metric: tasks around `ml.monitoring`."""

import logging
from pathlib import Path

from prefect.artifacts import create_markdown_artifact

from ml.monitoring import check
from ml.monitoring.check import CheckOutcome, CheckWindow, Comparison
from ml.monitoring.config import DriftRequest
from ml.monitoring.live_metric import LiveMetric
from ml.monitoring.report import render_check, render_check_markdown
from ml.monitoring.state import mark_taken
from ml.notifications import notify
from ml.settings import load_settings
from ml.storage import keys
from ml.storage.connect import open_artifact_store
from tasks.options import artifact_key, stage_task

logger = logging.getLogger(__name__)


@stage_task()
def open_window(request: DriftRequest) -> CheckWindow | None:
    """Which champion is checked, on which rows; None when there is no champion."""
    return check.open_window(open_artifact_store(), request)


@stage_task()
def compare_window(request: DriftRequest, window: CheckWindow) -> tuple[Comparison, LiveMetric | None]:
    """Test requests and new data against the training data, and measure the metric on late labels."""
    return check.compare_window(open_artifact_store(), request, window)


@stage_task()
def conclude_check(request: DriftRequest, window: CheckWindow, comparison: Comparison, live_metric: LiveMetric | None) -> CheckOutcome:
    """Write the state of the checks, and decide by the repeat rule whether an event is due."""
    return check.conclude(open_artifact_store(), request, window, comparison, live_metric)


@stage_task()
def publish_check(outcome: CheckOutcome) -> None:
    """Leave the page of the check in object storage, in the state folder, and on the run page."""
    store = open_artifact_store()
    html = render_check(outcome)
    files = {"report.html": html, "outcome.json": outcome.model_dump_json(indent=1) + "\n"}
    for file_name, text in files.items():
        store.objects.put(store.monitoring_bucket, keys.check_file(outcome.name, outcome.check, file_name), text.encode())
    _write_whole(load_settings().state_dir / "checks" / outcome.name / "latest.html", html)
    create_markdown_artifact(
        render_check_markdown(outcome), key=artifact_key(outcome.name, "drift"), description=f"drift check: {outcome.status}"
    )


@stage_task()
def send_events(outcome: CheckOutcome) -> None:
    """Tell the event bridge of what is due. An event that it does not take stays due, and is sent again by the next check."""
    from ml.event_client import send_event

    settings = load_settings()
    if outcome.events and settings.bridge_url is None:
        logger.warning("%d events wait: no event bridge is known, set MILLSTREAM_BRIDGE_URL or `make up`", len(outcome.events))
        return
    for event in outcome.events:
        send_event(event, settings)
        mark_taken(open_artifact_store(), outcome.name, event)
        logger.info("the event bridge took %s: %s", event.id, event.summary)
        notify(f"{event.name}: {event.kind}", event.summary, settings)


def _write_whole(path: Path, text: str) -> None:
    """A reader of the page sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
