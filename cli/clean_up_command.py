"""`millstream clean-up`: what may go, in a table; and, when told to, its deletion."""

from rich.console import Console
from rich.table import Table

from ml.garbage import clean_store
from ml.local_state import clean_local_state
from ml.retention import CleanUpReport, CleanUpRequest, clean_monitoring, join_reports
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from services.local_stack import running_stack


def clean_up(request: CleanUpRequest) -> None:
    """Do what the flow `clean-up` does, without a Prefect server in between, and print it."""
    with running_stack(load_settings().state_dir):
        settings, store = load_settings(), open_artifact_store()
        stored = clean_store(store, request)
        monitoring = clean_monitoring(store, request, default_days=settings.prediction_log_days)
        local = clean_local_state(settings.state_dir, request, set(stored.run_ids))
    print_report(join_reports([stored, monitoring, local]))


def print_report(report: CleanUpReport) -> None:
    console = Console()
    if report.totals:
        table = Table("kind", "number", "MB", "why", title="would be deleted" if report.dry_run else "deleted", title_justify="left")
        for total in report.totals:
            why = "\n".join(f"{reason} ({count:,})" for reason, count in total.reasons.items())
            table.add_row(total.kind, f"{total.count:,}", f"{total.size_bytes / 1e6:,.1f}", why)
        console.print(table)
    else:
        console.print("millstream: there is nothing to delete")
    for remark in report.remarks:
        console.print(f"millstream: {remark}", soft_wrap=True)
    if report.dry_run and report.totals:
        console.print("millstream: this was a dry run; `millstream clean-up --delete` deletes it")
