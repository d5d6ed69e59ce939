"""Deletes what nobody needs any more: by schedule, from the Prefect UI, or as `millstream clean-up`."""

from prefect import flow

from ml.retention import CleanUpReport, CleanUpRequest
from tasks.clean_up import clean_local_state, clean_monitoring, clean_store, publish_clean_up


@flow(name="clean-up", persist_result=False)
def clean_up(request: CleanUpRequest = CleanUpRequest()) -> CleanUpReport:  # noqa: B008, the request is frozen
    """Delete old runs, unreferenced bytes, old monitoring data and old local files; by default only tell what would go."""
    stored = clean_store(request)
    return publish_clean_up([stored, clean_monitoring(request), clean_local_state(request, stored.run_ids)])
