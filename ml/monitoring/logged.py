"""Reads what the predictor logged: a bounded sample of a window, or the answers that certain feedback speaks of."""

import json
import logging
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from ml.monitoring.records import LoggedFeedback, LoggedPrediction
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

MAX_PARTS = 2_000
MAX_JOIN_ROWS = 200_000

R = TypeVar("R", LoggedPrediction, LoggedFeedback)


def read_predictions(
    store: ArtifactStore, name: str, since: datetime, until: datetime, *, max_rows: int, seed: int = 0
) -> list[LoggedPrediction]:
    """Predictions answered within [since, until), in order of time; of more than `max_rows`, those of randomly chosen objects."""
    parts = [key for hour in _hours(since, until) for key in _prediction_parts(store, name, hour)]
    random.Random(seed).shuffle(parts)
    rows: list[LoggedPrediction] = []
    for key in parts[:MAX_PARTS]:
        rows += [row for row in _read_lines(store, key, LoggedPrediction) if since <= row.answered < until]
        if len(rows) >= max_rows:
            break
    return sorted(rows, key=lambda row: (row.time, row.id, row.item))


def read_feedback(store: ArtifactStore, name: str, since: datetime, until: datetime) -> dict[tuple[str, int], LoggedFeedback]:
    """(prediction id, item) -> the last label that was told of it within [since, until)."""
    found: list[LoggedFeedback] = []
    for day in _steps(since, until, timedelta(days=1)):
        for info in store.objects.list(store.monitoring_bucket, keys.feedback_prefix(name, f"{day:%Y-%m-%d}")):
            found += [row for row in _read_lines(store, info.key, LoggedFeedback) if since <= row.told < until]
    return {(row.id, row.item): row for row in sorted(found, key=lambda row: row.time)}


def find_predictions(
    store: ArtifactStore, name: str, wanted: Sequence[tuple[str, int]], since: datetime, until: datetime
) -> dict[tuple[str, int], LoggedPrediction]:
    """The logged answers with these ids, as far as they are found among the last MAX_JOIN_ROWS of the window."""
    missing, found, num_read = set(wanted), {}, 0
    for hour in reversed(list(_hours(since, until))):
        for key in _prediction_parts(store, name, hour):
            for row in _read_lines(store, key, LoggedPrediction):
                num_read += 1
                if (row.id, row.item) in missing:
                    found[row.id, row.item] = row
                    missing.discard((row.id, row.item))
            if not missing or num_read >= MAX_JOIN_ROWS:
                return found
    return found


def _prediction_parts(store: ArtifactStore, name: str, hour: datetime) -> list[str]:
    prefix = keys.predictions_prefix(name, f"{hour:%Y-%m-%d}", f"{hour:%H}")
    return [info.key for info in store.objects.list(store.monitoring_bucket, prefix)]


def _hours(since: datetime, until: datetime) -> Iterator[datetime]:
    return _steps(since, until, timedelta(hours=1))


def _steps(since: datetime, until: datetime, step: timedelta) -> Iterator[datetime]:
    """The starts of the whole hours or days, in UTC, that the window touches."""
    start = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if step >= timedelta(days=1):
        start = start.replace(hour=0)
    while start < until:
        yield start
        start += step


def _read_lines(store: ArtifactStore, key: str, kind: type[R]) -> Iterator[R]:
    """One line that cannot be read must not end all checks to come, so it is told and left out."""
    for number, line in enumerate(store.objects.get(store.monitoring_bucket, key).splitlines(), start=1):
        try:
            yield kind(**json.loads(line))
        except (ValueError, TypeError) as error:
            logger.warning("%s/%s, line %d is no %s (%s); it is left out", store.monitoring_bucket, key, number, kind.__name__, error)
