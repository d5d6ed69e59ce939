"""One run of the pipeline: its identity, its frozen config, and the files it leaves under runs/<run_id>/."""

import json
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ml.artifacts import Record
from ml.config import RunConfig, RunRequest, resolve_config
from ml.data.landed import landed_address, landed_objects
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore, digest_bytes

if TYPE_CHECKING:
    from ml.outcome import PipelineOutcome, RunRecords


class Run(Record):
    """Passed to every task. Holds no secret: endpoints and credentials come from the environment of each process."""

    run_id: str = Field(description="utc time and a random part; sorts by time")
    started: datetime
    config: RunConfig


def start_run(store: ArtifactStore, request: RunRequest) -> Run:
    """Resolve the request and save it as runs/<run_id>/config.json.

    A request that names no data means the model's own: what lies under its prefix in the datasets bucket. Only while
    there is nothing, it means the demo data of the solution, so that no schedule replaces a model of somebody's data by the demo's.

    Raises:
        ConfigError: see `resolve_config`.
    """
    started = datetime.now(UTC)
    name = request.name or request.solution
    if request.data is None and landed_objects(store, name):
        request = request.model_copy(update={"data": landed_address(store, name)})
    run = Run(run_id=f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}", started=started, config=resolve_config(request))
    store.objects.put(store.runs_bucket, keys.run_file(run.run_id, "config.json"), run.config.model_dump_json(indent=1).encode())
    return run


def finish_run(store: ArtifactStore, run: Run, records: "RunRecords", outcome: "PipelineOutcome", report_html: str) -> None:
    """Save what came of a run. manifest.json is written last: a run that has one is whole."""
    files: dict[Literal["outcome.json", "report.html"], bytes] = {
        "outcome.json": outcome.model_dump_json(indent=1).encode(),
        "report.html": report_html.encode(),
    }
    for name, data in files.items():
        store.objects.put(store.runs_bucket, keys.run_file(run.run_id, name), data)
    manifest = {
        "run_id": run.run_id,
        "name": run.config.name,
        "status": outcome.status,
        "records": records.model_dump(mode="json"),
        "files": {name: digest_bytes(data) for name, data in files.items()},
    }
    store.objects.put(store.runs_bucket, keys.run_file(run.run_id, "manifest.json"), json.dumps(manifest, indent=1).encode())
