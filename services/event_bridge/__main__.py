"""`python -m services.event_bridge --port 8100`: the event bridge in the foreground, until SIGTERM or Ctrl-C."""

import logging
import os
import sys

from ml.errors import ConfigError, MillstreamError
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from ml.storage.keys import bucket_name
from services.event_bridge.app import create_app
from services.event_bridge.decision import Limits
from services.event_bridge.dispatcher import Dispatcher, Pace
from services.event_bridge.event_queue import EventQueue
from services.event_bridge.metrics import BridgeMetrics
from services.event_bridge.prefect_api import PrefectApi
from services.event_log import log_event
from services.serving import parse_arguments, serve
from services.supervisor.launcher import keep_supervisor_alive

QUEUE_FOLDER = "event-bridge"
GRACE_SECONDS = 5


def main() -> None:
    arguments = parse_arguments("services.event_bridge", __doc__, "address to listen on")
    settings = load_settings()
    api_url = os.environ.get("PREFECT_API_URL")
    try:
        if settings.bridge_token is None or not settings.bridge_token.get_secret_value():
            raise ConfigError("MILLSTREAM_BRIDGE_TOKEN is not set; without a secret nobody could be told from a stranger")
        if not api_url:
            raise ConfigError("PREFECT_API_URL is not set; name the API of the Prefect server, such as http://127.0.0.1:4200/api")
        if settings.s3_endpoint is None:
            raise ConfigError("MILLSTREAM_S3_ENDPOINT is not set; name the object store that holds the datasets bucket")
        queue = EventQueue(settings.state_dir / QUEUE_FOLDER)
    except MillstreamError as error:
        log_event("not started", level=logging.ERROR, error=str(error))
        sys.exit(f"the event bridge was not started: {error}")
    metrics = BridgeMetrics()
    # Neither Prefect nor the object store need to be there: events are taken, and decided about when they are.
    dispatcher = Dispatcher(
        queue,
        PrefectApi(api_url),
        lambda: open_artifact_store(settings),
        Limits(settings.debounce_seconds, settings.cool_down_seconds, settings.retrain_minutes_per_day),
        metrics,
        pace=Pace(dataset_poll=settings.dataset_poll_seconds),
    )
    app = create_app(
        queue,
        dispatcher,
        metrics,
        token=settings.bridge_token.get_secret_value(),
        datasets_bucket=bucket_name(settings.bucket_prefix, "datasets"),
    )
    keep_supervisor_alive(settings.state_dir)
    serve(app, arguments, GRACE_SECONDS)


if __name__ == "__main__":
    main()
