"""The predictor's log: one JSON object a line. No text of a request is ever logged."""

import json
import logging
import sys
from datetime import UTC, datetime

logger = logging.getLogger("millstream.predictor")


def log_event(event: str, *, level: int = logging.INFO, exc_info: bool = False, **fields: object) -> None:
    """Write one line; `fields` are plain JSON values."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    logger.log(level, json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False, default=str), exc_info=exc_info)


def configure_logging() -> None:
    """Send the lines to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
