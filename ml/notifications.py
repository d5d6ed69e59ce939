"""Tells people, by mail or chat or webhook, what they should not have to look for: through Apprise.

`MILLSTREAM_NOTIFY_URLS` holds Apprise URLs separated by spaces, e.g. `mailtos://user:password@example.com` or
`json://127.0.0.1:8080/hook`. An address often is a secret, so nothing of it but its kind is ever logged.
"""

import logging

from ml.outcome import PipelineOutcome
from ml.settings import Settings

logger = logging.getLogger(__name__)


def notify(title: str, body: str, settings: Settings) -> int:
    """Send a message to every address; returns how many took it. Never raises: what fails is logged."""
    addresses = settings.notify_urls.get_secret_value().split() if settings.notify_urls else []
    if not addresses:
        return 0
    import apprise

    # Their own lines quote addresses.
    logging.getLogger("apprise").disabled = True
    logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
    asset = apprise.AppriseAsset(app_id="Millstream", app_desc="Millstream", app_url="")
    num_sent = 0
    for number, address in enumerate(addresses, start=1):
        try:
            service = apprise.Apprise.instantiate(address, asset=asset, suppress_exceptions=True)
            sent = service is not None and service.notify(title=title, body=body, body_format=apprise.NotifyFormat.TEXT)
        except Exception as error:
            logger.debug("notification %d raised %s", number, type(error).__name__)
            service, sent = None, False
        if sent:
            num_sent += 1
            continue
        what = "was not taken" if service is not None else "is no Apprise URL"
        logger.warning(
            "notification %r: address %d of %d in MILLSTREAM_NOTIFY_URLS (%s) %s; try it with `apprise -vv --body=test ADDRESS`",
            title,
            number,
            len(addresses),
            address.partition("://")[0] if "://" in address else "no scheme",
            what,
        )
    return num_sent


def notify_of_run(outcome: PipelineOutcome, settings: Settings) -> int:
    """Tell of a run that failed or was rejected; others pass in silence. Returns how many addresses took it."""
    if outcome.status not in ("failed", "rejected"):
        return 0
    lines = [
        outcome.reasons[0] if outcome.reasons else "no reason was given",
        f"Run {outcome.run_id} of model {outcome.name}",
        *(f"Report: {path}" for path in [outcome.addresses.report_path] if path),
        *(f"Run page: {url}" for url in [outcome.addresses.flow_run_url] if url),
    ]
    return notify(f"{outcome.name}: {outcome.status}", "\n".join(lines), settings)
