"""The log of a service: one JSON object a line. No text of a request, no token and no refused body is ever logged."""

import json
import logging
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_FILE_BYTES = 20 * 2**20
NUM_OLD_LOG_FILES = 4

logger = logging.getLogger("millstream.services")


def log_event(event: str, *, level: int = logging.INFO, exc_info: bool = False, **fields: object) -> None:
    """Write one line; `fields` are plain JSON values."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    logger.log(level, json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False, default=str), exc_info=exc_info)


def configure_logging(path: Path | None = None) -> None:
    """Send the lines to a file that is turned over at LOG_FILE_BYTES, or to standard output."""
    if path is None:
        handler: logging.Handler = logging.StreamHandler(sys.stdout)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=LOG_FILE_BYTES, backupCount=NUM_OLD_LOG_FILES, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
