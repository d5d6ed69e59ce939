"""`python -m services.predictor --port 8000`: the predictor in the foreground, until SIGTERM or Ctrl-C."""

import argparse
import logging
import os
import sys
from pathlib import Path

import uvicorn

from ml.errors import MillstreamError
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from services.event_log import configure_logging, log_event
from services.predictor.app import create_app
from services.predictor.inference import InferencePool, num_inference_threads
from services.predictor.models import Models
from services.predictor.prediction_log import PredictionLog

GRACE_SECONDS = 8  # below the ten seconds after which a process that was asked to end is killed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.predictor", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; there is no authentication: keep it on loopback")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log-file", type=Path, help="write the log there, with old files kept to a limit, and not to standard output")
    arguments = parser.parse_args()

    configure_logging(arguments.log_file)
    settings = load_settings()
    try:
        store = open_artifact_store(settings)
    except MillstreamError as error:
        log_event("not started", level=logging.ERROR, error=str(error))
        sys.exit(f"the predictor was not started: {error}")
    models = Models(store, settings.state_dir / "models", num_threads=settings.threads_per_process)
    pool = InferencePool(num_inference_threads(settings.threads_per_process))
    prediction_log = PredictionLog(store, share=settings.prediction_log_share, rows_per_hour=settings.prediction_log_rows_per_hour)
    log_event("starting", host=arguments.host, port=arguments.port, pid=os.getpid())
    # Server errors still reach the log; each request has its own line already.
    uvicorn.run(
        create_app(models, pool, prediction_log),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
