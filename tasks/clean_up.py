"""Delete what has had its time, and tell what was deleted: tasks around `ml.garbage`, `ml.retention` and `ml.local_state`."""

from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact

from ml import garbage, local_state, retention
from ml.retention import CleanUpReport, CleanUpRequest, join_reports
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from tasks.options import stage_task


@stage_task()
def clean_store(request: CleanUpRequest) -> CleanUpReport:
    """Old runs and versions, and every stage record, checkpoint and artifact that nothing refers to."""
    return garbage.clean_store(open_artifact_store(), request)


@stage_task()
def clean_monitoring(request: CleanUpRequest) -> CleanUpReport:
    """Logged predictions, feedback and drift checks that have had their time."""
    return retention.clean_monitoring(open_artifact_store(), request, default_days=load_settings().prediction_log_days)


@stage_task()
def clean_local_state(request: CleanUpRequest, run_ids: Sequence[str]) -> CleanUpReport:
    """Old folders and logs in the state folder of the machine that this runs on."""
    return local_state.clean_local_state(load_settings().state_dir, request, set(run_ids))


@stage_task()
def publish_clean_up(reports: Sequence[CleanUpReport]) -> CleanUpReport:
    """Put all reports together, and show them on the run page."""
    report = join_reports(reports)
    create_markdown_artifact(render_markdown(report), key="clean-up", description="dry run" if report.dry_run else "deleted")
    return report


def render_markdown(report: CleanUpReport) -> str:
    heading = "Would be deleted (dry run)" if report.dry_run else "Deleted"
    lines = [f"## {heading}: {report.size_bytes / 1e6:,.1f} MB", "", *(f"> {remark}\n" for remark in report.remarks)]
    if not report.totals:
        return "\n".join([*lines, "Nothing."])
    lines += ["| kind | number | MB | why | for example |", "|---|---:|---:|---|---|"]
    for total in report.totals:
        why = "; ".join(f"{reason} ({count:,})" for reason, count in total.reasons.items())
        lines.append(f"| {total.kind} | {total.count:,} | {total.size_bytes / 1e6:,.1f} | {why} | `{total.examples[0]}` |")
    return "\n".join(lines)
