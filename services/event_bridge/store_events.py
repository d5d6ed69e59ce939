"""What an object store's webhook sends when an object lands, as Events.

Two formats, told apart by their fields:

- SeaweedFS's filer: one change of its file tree, in which the object is the file /buckets/<bucket>/<key>. What the store
  keeps there for itself (parts of an upload, owners of buckets) is reported as well.
- S3 event notifications, as AWS and MinIO send them: a list of Records.

A repeated delivery gives the same event id; the same bytes written once more give another.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

from ml.data.sources import is_readable
from ml.events import MODEL_NAME_PATTERN, Event
from services.event_bridge.parsing import EventRefused, describe

SOURCE = "object store"
SEAWEEDFS_BUCKETS = "/buckets/"
SEAWEEDFS_ETAG = "Seaweed-X-Amz-ETag"


@dataclass(frozen=True)
class LandedObject:
    """An object that is there now.

    Args:
        etag: empty when the store does not say.
        occasion: what tells this write from another one of the same bytes.
    """

    bucket: str
    key: str
    etag: str
    occasion: str
    occurred: datetime


@dataclass(frozen=True)
class StoreNotification:
    """What one delivery says, as far as it is about data of a model.

    Args:
        ignored: why the rest of it does not matter, one entry each.
    """

    landed: tuple[LandedObject, ...]
    ignored: tuple[str, ...]


def read_notification(content: dict[str, Any], datasets_bucket: str) -> StoreNotification:
    """
    Raises:
        EventRefused: 422, it is of neither format.
    """
    if isinstance(content.get("Records"), list):
        found = [_read_s3_record(record) for record in content["Records"]]
    elif isinstance(content.get("message"), dict) and isinstance(content.get("key"), str):
        found = [_read_seaweedfs(content["message"], content["key"])]
    elif content.get("Event") == "s3:TestEvent":  # AWS sends it when the notification is set up
        found = ["a test"]
    else:
        raise EventRefused(
            422,
            "not a store event",
            f"found {describe(sorted(content))} as fields; expected an S3 notification (Records) "
            "or one of SeaweedFS's filer webhook (key, event_type, message)",
        )
    landed, ignored = [], []
    for item in found:
        reason = item if isinstance(item, str) else _why_not(item, datasets_bucket)
        if reason is None:
            landed.append(item)
        else:
            ignored.append(reason)
    return StoreNotification(tuple(landed), tuple(ignored))


def model_of(key: str) -> str:
    """The model whose data an object of the datasets bucket is: its first folder."""
    return key.partition("/")[0]


def to_event(landed: LandedObject) -> Event:
    address = f"s3://{landed.bucket}/{landed.key}"
    identity = "\n".join((landed.bucket, landed.key, landed.etag, landed.occasion))
    return Event(
        id=f"store-{hashlib.sha256(identity.encode()).hexdigest()[:40]}",
        kind="data.arrived",
        name=model_of(landed.key),
        occurred=landed.occurred,
        source=SOURCE,
        summary=f"{address[:450]} landed",
        objects=(address,),
    )


def _why_not(item: LandedObject, datasets_bucket: str) -> str | None:
    if item.bucket != datasets_bucket:
        return "another bucket"
    name, _, rest = item.key.partition("/")
    if not rest or not re.fullmatch(MODEL_NAME_PATTERN, name):
        return "not below a model's name"
    if not is_readable(item.key.rpartition("/")[2]):
        return "not readable"
    return None


def _read_seaweedfs(message: dict[str, Any], key: str) -> LandedObject | str:
    entry, folder = message.get("new_entry"), message.get("new_parent_path")
    if not isinstance(entry, dict):
        return "deleted"
    if entry.get("is_directory"):
        return "a folder"
    try:
        # Of a renamed file, the webhook's key is the old path.
        path = f"{folder}/{entry['name']}" if folder else key
        attributes = entry.get("attributes", {})
        etag = _decode(entry.get("extended", {}).get(SEAWEEDFS_ETAG)) or _decode(attributes.get("md5"), as_hex=True)
        seconds, size = int(attributes.get("mtime", 0)), int(attributes.get("file_size", 0))
        written = max((int(chunk.get("modified_ts_ns", 0)) for chunk in entry.get("chunks", [])), default=0)
        occurred = datetime.fromtimestamp(seconds, UTC)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        raise EventRefused(422, "not a store event", f"message.new_entry is not an entry of SeaweedFS's filer ({error!r})") from error
    if not path.startswith(SEAWEEDFS_BUCKETS):
        return "another bucket"
    bucket, _, object_key = path.removeprefix(SEAWEEDFS_BUCKETS).partition("/")
    if size == 0 and not entry.get("chunks") and not entry.get("content"):
        return "empty"
    return LandedObject(bucket, object_key, etag, f"{seconds}.{written}", occurred)


def _read_s3_record(record: Any) -> LandedObject | str:
    try:
        name = record["eventName"].removeprefix("s3:")
        if not name.startswith("ObjectCreated:"):
            return "deleted" if name.startswith("ObjectRemoved:") else "not a new object"
        entry = record["s3"]["object"]
        etag, size = str(entry.get("eTag") or "").strip('"'), entry.get("size")
        occurred = record.get("eventTime")
        found = LandedObject(
            bucket=record["s3"]["bucket"]["name"],
            key=unquote_plus(entry["key"]),
            etag=etag,
            occasion=str(entry.get("sequencer") or occurred or size or ""),
            occurred=datetime.fromisoformat(occurred).astimezone(UTC) if occurred else datetime.now(UTC),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EventRefused(
            422, "not a store event", f"a record has no eventName, s3.bucket.name or s3.object.key ({error!r}), found {describe(record)}"
        ) from error
    return "empty" if size == 0 else found


def _decode(text: Any, *, as_hex: bool = False) -> str:
    """A byte field of a protobuf message in JSON; empty when it is absent."""
    if not text:
        return ""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{text!r} is not base64") from error
    return data.hex() if as_hex else data.decode("utf-8", errors="replace").strip('"')
