"""Labels that come later: checked like a request, and accepted only once they are stored."""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime

from ml.errors import StorageError
from ml.monitoring.records import LoggedFeedback, to_line
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from services.predictor.checking import MAX_ITEMS, ItemChecker, RequestRefused
from services.predictor.models import LiveModel

RETRY_AFTER_SECONDS = 5


def feedback_schema(model: LiveModel) -> dict | None:
    """JSON Schema of one feedback item; None for a model that is no classifier, where there is no label to give."""
    labels = model.bundle.options.get("labels")
    if not labels:
        return None
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string", "minLength": 24, "maxLength": 24, "description": "`id` of the predict reply"},
            "item": {"type": "integer", "minimum": 0, "maximum": MAX_ITEMS - 1, "description": "index in its `replies`"},
            "label": {"type": "string", "enum": list(labels), "description": "what the answer should have been"},
        },
        "required": ["id", "item", "label"],
        "additionalProperties": False,
    }


def check_feedback(model: LiveModel, items: list) -> None:
    """
    Raises:
        RequestRefused: 422 with one problem per broken rule, as for a predict request.
    """
    schema = feedback_schema(model)
    if schema is None:
        raise RequestRefused(422, f"{model.name} gives no labels, so it takes none as feedback")
    ItemChecker(schema).check(items)


def store_feedback(store: ArtifactStore, name: str, items: Sequence[dict]) -> None:
    """Write checked items as one object. The same feedback sent twice counts once when it is read.

    Raises:
        RequestRefused: 503, the store did not take it; the caller still has the labels and should send them again.
    """
    now = datetime.now(UTC)
    told = now.isoformat(timespec="milliseconds")
    lines = [to_line(LoggedFeedback(told, item["id"], int(item["item"]), name, item["label"])) for item in items]
    key = keys.feedback_log(name, f"{now:%Y-%m-%d}", f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(6)}")
    try:
        store.objects.put(store.monitoring_bucket, key, b"".join(lines))
    except StorageError as error:
        detail = f"the feedback was not stored: {error}; send it again in a while"
        raise RequestRefused(503, detail, retry_after_seconds=RETRY_AFTER_SECONDS) from error
