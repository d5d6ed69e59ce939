"""`python -m services.predictor --port 8000`: the predictor in the foreground, until SIGTERM or Ctrl-C."""

import logging
import sys

from ml.errors import MillstreamError
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from services.event_log import log_event
from services.predictor.app import create_app
from services.predictor.inference import InferencePool, num_inference_threads
from services.predictor.models import Models
from services.predictor.prediction_log import PredictionLog
from services.serving import parse_arguments, serve

GRACE_SECONDS = 8


def main() -> None:
    arguments = parse_arguments("services.predictor", __doc__, "address to listen on; there is no authentication: keep it on loopback")
    settings = load_settings()
    try:
        store = open_artifact_store(settings)
    except MillstreamError as error:
        log_event("not started", level=logging.ERROR, error=str(error))
        sys.exit(f"the predictor was not started: {error}")
    models = Models(store, settings.state_dir / "models", num_threads=settings.threads_per_process)
    pool = InferencePool(num_inference_threads(settings.threads_per_process))
    prediction_log = PredictionLog(store, share=settings.prediction_log_share, rows_per_hour=settings.prediction_log_rows_per_hour)
    serve(create_app(models, pool, prediction_log), arguments, GRACE_SECONDS)


if __name__ == "__main__":
    main()
