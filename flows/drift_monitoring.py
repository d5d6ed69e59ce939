"""Does a served model still see what it was trained on, and is it still right? An event when twice in a row it is not."""

from prefect import flow

from ml.monitoring.check import CheckOutcome, no_champion
from ml.monitoring.config import DriftRequest
from tasks.monitoring import compare_window, conclude_check, open_window, publish_check, send_events


@flow(name="drift-monitoring", flow_run_name="{request.name}", persist_result=False)
def drift_monitoring(request: DriftRequest) -> CheckOutcome:
    """Compare requests, new data and late labels with the champion's training; tell the event bridge of what repeats."""
    window = open_window(request)
    if window is None:
        return no_champion(request)
    comparison, live_metric = compare_window(request, window)
    outcome = conclude_check(request, window, comparison, live_metric)
    publish_check(outcome)
    send_events(outcome)
    return outcome
