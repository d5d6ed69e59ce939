"""What has landed for a model (ml.data.landed): its digest, and what is new since it was last looked at."""

import hashlib
from collections.abc import Mapping, Sequence

from ml.events import Event
from ml.storage.base import ObjectInfo

POLL_SOURCE = "poll"
MAX_OBJECTS_NAMED = 1000


def data_digest(objects: Sequence[ObjectInfo]) -> str | None:
    """Of names, etags and sizes; None when there is no object."""
    if not objects:
        return None
    digest = hashlib.sha256()
    for info in sorted(objects, key=lambda info: info.key):
        digest.update(f"{info.key}\n{info.etag}\n{info.size_bytes}\n".encode())
    return digest.hexdigest()


def new_objects(objects: Sequence[ObjectInfo], seen: Mapping[str, str]) -> list[ObjectInfo]:
    """Those that were not there, or had another etag, when the model's prefix was last seen."""
    return [info for info in objects if seen.get(info.key) != info.etag]


def polled_event(name: str, new: Sequence[ObjectInfo]) -> Event:
    """The event of objects that a listing found; `new` is not empty. The queue keeps it and the listing in one step, so it comes once."""
    addresses = [f"s3://{info.bucket}/{info.key}" for info in new]
    more = f" and {len(new) - 1} more" if len(new) > 1 else ""
    return Event(
        kind="data.arrived",
        name=name,
        occurred=max(info.modified for info in new),
        source=POLL_SOURCE,
        summary=f"{addresses[0][:450]}{more} found by listing",
        objects=tuple(addresses[:MAX_OBJECTS_NAMED]),
    )
