"""What a run leaves for people: outcome.json, the HTML report, and artifacts on the Prefect run page."""

import json
from datetime import UTC, datetime
from pathlib import Path

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL

from ml.deployment import predict_address
from ml.evaluation.quality import scores_from_frame
from ml.outcome import UNCOMPRESSED_NAME, Addresses, PipelineOutcome, RunRecords, build_outcome
from ml.report.confusion import confusion_matrix
from ml.report.html import render_report
from ml.report.table import render_markdown
from ml.runs import Run, finish_run
from ml.settings import load_settings
from ml.storage.artifacts import ArtifactStore
from ml.storage.connect import open_artifact_store


def publish_outcome(run: Run, records: RunRecords, error: BaseException | None) -> PipelineOutcome:
    """Build the outcome of a run and write it, with the report, to object storage and to the state folder."""
    store = open_artifact_store()
    folder = load_settings().state_dir / "runs" / run.run_id
    records = records.model_copy(update={"addresses": _addresses(run, folder)})
    outcome = build_outcome(run.run_id, run.config, records, run.started, datetime.now(UTC), error)
    html = _render(store, outcome, records)
    finish_run(store, run, records, outcome, html)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html, encoding="utf-8")
    (folder / "outcome.json").write_text(outcome.model_dump_json(indent=1) + "\n", encoding="utf-8")
    latest = folder.parent / "latest"
    pointer = folder.parent / f".latest-{run.run_id}"
    pointer.symlink_to(folder.name)
    pointer.replace(latest)
    create_markdown_artifact(render_markdown(outcome), key=f"{run.config.name.replace('_', '-')}-outcome", description=outcome.status)
    return outcome


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


def _render(store: ArtifactStore, outcome: PipelineOutcome, records: RunRecords) -> str:
    history, matrices, labels = [], {}, ()
    if records.trained is not None:
        history = [json.loads(line) for line in store.get_bytes(records.trained.history).splitlines()]
    if records.splits is not None:
        labels = records.splits.labels
        shown = {UNCOMPRESSED_NAME, records.decision.variant if records.decision else None}
        for evaluation in records.test:
            if evaluation.variant in shown:
                scores = scores_from_frame(store.get_frame(evaluation.quality.scores))
                matrices[evaluation.variant] = confusion_matrix(scores, len(labels))
    summary = records.splits.summary if records.splits else {}
    return render_report(outcome, history, summary, matrices, labels)
