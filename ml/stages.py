"""The one cache: a finished stage is a record in object storage, found by what went into it.

stage_key = sha256 of the stage's name and version, its inputs, its slice of the config, and the versions of
the libraries it calls. Nothing else is in the key, so editing a README or a compression method re-trains nothing.
"""

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from ml.artifacts import Record
from ml.errors import ObjectNotFoundError
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline that can be skipped when its result is already there.

    Args:
        name: the card's word, e.g. "clean_data".
        version: raise it when the code changes what comes out.
        record: the type of its result.
        libraries: distributions whose version changes what comes out.
    """

    name: str
    version: int
    record: type[Record]
    libraries: Sequence[str] = ()

    def key(self, *parts: object) -> str:
        """The stage key for these inputs: digests, config sections, strings, numbers, dicts of them.

        Give digests of inputs, not whole records: a record also holds times and paths, which change nothing.
        """
        described = {
            "stage": self.name,
            "version": self.version,
            "libraries": {name: importlib.metadata.version(name) for name in self.libraries},
            "parts": [_describe(part) for part in parts],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class StageResult(Generic[R]):
    """A record, and whether it was found instead of computed."""

    record: R
    label: str
    key: str
    reused: bool
    seconds: float


def run_stage(
    store: ArtifactStore,
    stage: Stage,
    key: str,
    compute: Callable[[], R],
    *,
    label: str | None = None,
    keep: Callable[[R], bool] = lambda record: True,
) -> StageResult[R]:
    """Return the stored record of this key, or compute and store it.

    The record is written last, so a stage that was killed half-way leaves nothing that anyone reads. A record that
    `keep` refuses (a failure that may pass next time) is returned but not stored.

    Args:
        label: how logs and reports call it; by default the stage's name.
    """
    started = time.monotonic()
    record_key = keys.stage_record(stage.name, key)
    try:
        found = stage.record.model_validate_json(store.objects.get(store.runs_bucket, record_key))
    except ObjectNotFoundError:
        found = None
    except ValidationError:
        logger.warning("%s: the stored record %s is of an older form and is computed anew", stage.name, record_key)
        found = None
    if found is not None:
        logger.info("%s: reused, nothing that goes into it changed (%s)", label or stage.name, key[:8])
        return StageResult(found, label or stage.name, key, True, time.monotonic() - started)  # type: ignore[arg-type]
    record = compute()
    if keep(record):
        store.objects.put(store.runs_bucket, record_key, record.model_dump_json(indent=1).encode())
    return StageResult(record, label or stage.name, key, False, time.monotonic() - started)


def _describe(part: object) -> object:
    if isinstance(part, BaseModel):
        return part.model_dump(mode="json")
    if isinstance(part, dict):
        return {str(name): _describe(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_describe(value) for value in part]
    if part is None or isinstance(part, str | int | float | bool):
        return part
    raise TypeError(f"{type(part).__name__} cannot be part of a stage key")
