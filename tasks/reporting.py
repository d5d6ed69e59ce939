"""What a run leaves for people: outcome.json, the HTML report, and artifacts on the Prefect run page."""

import json
import logging
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL

from ml.deployment import predict_address
from ml.evaluation.quality import scores_from_frame
from ml.outcome import UNCOMPRESSED_NAME, Addresses, PipelineOutcome, RunRecords, build_outcome
from ml.report import run_page
from ml.report.confusion import confusion_matrix
from ml.report.html import render_report
from ml.report.table import table_rows
from ml.runs import Run, finish_run
from ml.settings import load_settings
from ml.storage.artifacts import ArtifactStore
from ml.storage.connect import open_artifact_store
from ml.training.history import settled
from tasks.options import artifact_key

logger = logging.getLogger(__name__)


def publish_outcome(run: Run, records: RunRecords, error: BaseException | None) -> PipelineOutcome:
    """Build the outcome of a run and write it, with the report, to object storage and to the state folder."""
    store = open_artifact_store()
    folder = load_settings().state_dir / "runs" / run.run_id
    records = records.model_copy(update={"addresses": _addresses(run, folder)})
    outcome = build_outcome(run.run_id, run.config, records, run.started, datetime.now(UTC), error)
    history = _history(store, records)
    html = _render(store, outcome, records, history)
    finish_run(store, run, records, outcome, html)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html, encoding="utf-8")
    (folder / "outcome.json").write_text(outcome.model_dump_json(indent=1) + "\n", encoding="utf-8")
    latest = folder.parent / "latest"
    pointer = folder.parent / f".latest-{run.run_id}"
    pointer.symlink_to(folder.name)
    pointer.replace(latest)
    try:
        _show_on_run_page(outcome, history)
    except Exception:  # whatever the Prefect client raises when its server is away; all is written by now
        logger.exception("the run page shows no outcome of run %s", run.run_id)
    return outcome


def _show_on_run_page(outcome: PipelineOutcome, history: list[dict[str, Any]]) -> None:
    """One key per model and kind, so that the Artifacts page of the UI shows how they change from run to run."""
    name, headline = outcome.name, run_page.headline(outcome)
    if rows := table_rows(outcome):
        # The UI reads cells as HTML.
        cells = [{escape(title): escape(cell) for title, cell in row.items()} for row in rows]
        create_table_artifact(cells, key=artifact_key(name, "before-after"), description=headline)
    if curve := run_page.training_curve(outcome, history):
        create_markdown_artifact(curve, key=artifact_key(name, "training-curve"), description=headline)
    create_markdown_artifact(run_page.report(outcome, history), key=artifact_key(name, "report"), description=headline)


def _history(store: ArtifactStore, records: RunRecords) -> list[dict[str, Any]]:
    if records.trained is None:
        return []
    return settled(json.loads(line) for line in store.get_bytes(records.trained.history).splitlines())


def _addresses(run: Run, folder: Path) -> Addresses:
    predictor_url, ui_url = load_settings().predictor_url, str(PREFECT_UI_URL.value() or "").rstrip("/") or None
    return Addresses(
        predict_url=predict_address(predictor_url, run.config.name) if predictor_url else None,
        api_docs_url=f"{predictor_url}/openapi.json" if predictor_url else None,
        prefect_ui_url=ui_url,
        flow_run_url=f"{ui_url}/runs/flow-run/{flow_run.id}" if ui_url and flow_run.id else None,
        report_path=str(folder / "report.html"),
        outcome_path=str(folder / "outcome.json"),
    )


def _render(store: ArtifactStore, outcome: PipelineOutcome, records: RunRecords, history: list[dict[str, Any]]) -> str:
    matrices, labels = {}, ()
    if records.splits is not None:
        labels = records.splits.labels
        shown = {UNCOMPRESSED_NAME, records.decision.variant if records.decision else None}
        for evaluation in records.test:
            if evaluation.variant in shown:
                scores = scores_from_frame(store.get_frame(evaluation.quality.scores))
                matrices[evaluation.variant] = confusion_matrix(scores, len(labels))
    summary = records.splits.summary if records.splits else {}
    return render_report(outcome, history, summary, matrices, labels)
