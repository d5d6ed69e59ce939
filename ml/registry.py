"""The model registry: immutable versions, and three aliases that move.

A version is written once and never changed. `candidate`, `champion` and `previous` live in one object per model
name, which is replaced only by whoever read its present state (If-Match), so no move is ever lost.
"""

import contextlib
import logging
import random
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import Field, model_validator

from ml.artifacts import BundleRef, Record
from ml.errors import ConfigError, DeploymentError, ObjectNotFoundError, StorageUnavailableError, WriteConflictError
from ml.events import MODEL_NAME_PATTERN
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 30
MAX_BACKOFF_SECONDS = 1.0


def version_id(created: datetime, bundle: BundleRef) -> str:
    """`<utc yyyymmddThhmmssZ>-<first 8 digits of the bundle's digest>`: sorts by time, and names the bytes."""
    return f"{created.astimezone(UTC):%Y%m%dT%H%M%SZ}-{bundle.digest[:8]}"


class ModelVersion(Record):
    """One model that was fit to be deployed: its bundle, where it came from, and how good it was."""

    name: str = Field(pattern=f"^{MODEL_NAME_PATTERN}$")
    version: str = Field(description="see version_id")
    solution: str
    bundle: BundleRef
    schema_digest: str = Field(description="see ml.bundles.schema_digest: what callers see")
    options: dict = Field(default_factory=dict, description="the bundle's options in short: labels, max_length ...")
    run_id: str
    data: dict[str, str] = Field(default_factory=dict, description="source object or table -> sha256")
    metrics: dict = Field(default_factory=dict)
    created: datetime
    provenance: dict = Field(default_factory=dict, description="method and parameters that made it, library versions")

    @model_validator(mode="after")
    def _version_names_the_bundle(self) -> "ModelVersion":
        if self.version != (expected := version_id(self.created, self.bundle)):
            raise ValueError(f"version must be {expected!r} for this time and bundle, found {self.version!r}")
        return self


class Aliases(Record):
    """Where the aliases of one model point, and who moved them last. `generation` counts every move."""

    candidate: str | None = None
    champion: str | None = None
    previous: str | None = Field(default=None, description="the champion before this one; a rollback goes there")
    generation: int = 0
    who: str = ""
    why: str = ""
    when: datetime | None = None


class Registry:
    """Versions and aliases of all models, in the `registry` bucket.

    Every method raises ConfigError for a name that no model can have, and StorageError as the store does.
    """

    def __init__(self, store: ArtifactStore):
        self._objects = store.objects
        self._bucket = store.registry_bucket

    def add_version(self, version: ModelVersion) -> ModelVersion:
        """Write a version. To write the very same record again does nothing.

        Raises:
            WriteConflictError: there is another record under this version.
        """
        key = keys.model_version(version.name, version.version)
        try:
            self._objects.put(self._bucket, key, version.model_dump_json(indent=1).encode(), if_none_match=True)
        except WriteConflictError as error:
            present = self.get_version(version.name, version.version)
            # As JSON, where a tuple and a list are the same.
            if present.model_dump(mode="json") != version.model_dump(mode="json"):
                raise WriteConflictError(
                    f"{version.name}: version {version.version} is there already with other contents; "
                    "a version is never changed, add a new one"
                ) from error
        return version

    def get_version(self, name: str, version: str) -> ModelVersion:
        """Raises ObjectNotFoundError when there is none, with the latest versions that there are."""
        key = keys.model_version(_check_name(name), version)
        if keys.parse_model_version(key):
            with contextlib.suppress(ObjectNotFoundError):
                return ModelVersion.model_validate_json(self._objects.get(self._bucket, key))
        known = self.list_versions(name)[-5:]
        raise ObjectNotFoundError(f"{name} has no version {version!r}; latest versions: {', '.join(known) or 'none'}")

    def list_versions(self, name: str) -> list[str]:
        """All versions of a model, oldest first."""
        listed = self._objects.list(self._bucket, keys.model_versions_prefix(_check_name(name)))
        return [found[1] for info in listed if (found := keys.parse_model_version(info.key))]

    def list_names(self) -> list[str]:
        """All models that have a version, by name."""
        listed = self._objects.list(self._bucket, keys.models_prefix())
        return sorted({found[0] for info in listed if (found := keys.parse_model_version(info.key))})

    def read_aliases(self, name: str) -> Aliases:
        """The aliases of a model; all empty when none was ever set."""
        return self._read(_check_name(name))[0]

    def check_comparable(self, name: str, schema_digest: str) -> None:
        """A model with other labels or another input than the champion answers another question.

        Raises:
            ConfigError: the schemas differ; the new model needs a name of its own.
        """
        champion = self.read_aliases(name).champion
        if champion is not None:
            self._check_same_schema(name, champion, schema_digest)

    def set_candidate(self, name: str, version: str | None, who: str, why: str) -> Aliases:
        """Point `candidate` at a version, or at nothing.

        Raises:
            ObjectNotFoundError: there is no such version.
            ConfigError: its schema is not that of the champion.
        """
        schema = self.get_version(name, version).schema_digest if version is not None else None

        def change(aliases: Aliases) -> dict[str, str | None]:
            if aliases.champion is not None and schema is not None:
                self._check_same_schema(name, aliases.champion, schema)
            return {"candidate": version}

        return self._move(name, change, who, why)

    def promote(self, name: str, version: str, who: str, why: str) -> Aliases:
        """Make a version the champion; the old champion becomes `previous`. Does nothing when it is the champion already.

        Raises:
            ObjectNotFoundError, ConfigError: see `set_candidate`.
        """
        schema = self.get_version(name, version).schema_digest

        def change(aliases: Aliases) -> dict[str, str | None]:
            if aliases.champion == version:
                return {}
            if aliases.champion is not None:
                self._check_same_schema(name, aliases.champion, schema)
            candidate = None if aliases.candidate == version else aliases.candidate
            return {"champion": version, "previous": aliases.champion, "candidate": candidate}

        return self._move(name, change, who, why)

    def rollback(self, name: str, who: str, why: str) -> Aliases:
        """Exchange `champion` and `previous`.

        Raises:
            DeploymentError: there is no previous version.
        """

        def change(aliases: Aliases) -> dict[str, str | None]:
            if aliases.champion is None or aliases.previous is None:
                raise DeploymentError(
                    f"{name} has no previous version to go back to (champion: {aliases.champion}); promote one of: "
                    f"{', '.join(self.list_versions(name)[-5:]) or 'none, train one first'}"
                )
            return {"champion": aliases.previous, "previous": aliases.champion}

        return self._move(name, change, who, why)

    def withdraw(self, name: str, version: str, before: Aliases, who: str, why: str) -> Aliases:
        """Take a promotion back: `champion` and `previous` are again what they were before it, possibly nothing.

        Unlike a rollback, it does not make the withdrawn version `previous`, so that no later rollback leads to it.
        Does nothing when it was done already.

        Raises:
            DeploymentError: somebody else has made another version the champion since.
        """

        def change(aliases: Aliases) -> dict[str, str | None]:
            if aliases.champion not in (version, before.champion):
                raise DeploymentError(
                    f"{name}: {version} was not withdrawn: the champion is {aliases.champion} by now, "
                    f"moved by {aliases.who!r} ({aliases.why!r}); look at it before moving it again"
                )
            return {"champion": before.champion, "previous": before.previous}

        return self._move(name, change, who, why)

    def _move(self, name: str, change: Callable[[Aliases], dict[str, str | None]], who: str, why: str) -> Aliases:
        """Read, change, write if nobody else did meanwhile; else again."""
        _check_name(name)
        key = keys.model_aliases(name)
        doubtful: tuple[Aliases, Aliases] | None = None  # before and after a write whose reply was lost
        for attempt in range(MAX_ATTEMPTS):
            present, etag = self._read(name)
            if doubtful is not None:
                before, after = doubtful
                if present == after:
                    return present
                if present != before:
                    raise WriteConflictError(
                        f"{name}: the store did not say whether this move was done, and {present.who!r} moved the aliases since "
                        f"({present.why!r}); look at them before moving them again"
                    )
            changed = {field: value for field, value in change(present).items() if getattr(present, field) != value}
            if not changed:
                return present
            moved = present.model_copy(
                update={**changed, "generation": present.generation + 1, "who": who, "why": why, "when": datetime.now(UTC)}
            )
            data = moved.model_dump_json(indent=1).encode()
            try:
                if etag is None:
                    self._objects.put(self._bucket, key, data, if_none_match=True)
                else:
                    self._objects.put(self._bucket, key, data, if_match=etag)
                logger.info("%s: %s by %s: %s", name, ", ".join(f"{alias} -> {value}" for alias, value in changed.items()), who, why)
                return moved
            except WriteConflictError:
                doubtful = None
            except StorageUnavailableError:
                doubtful = (present, moved)
            time.sleep(random.uniform(0, min(MAX_BACKOFF_SECONDS, 0.02 * 2**attempt)))
        raise WriteConflictError(f"{name}: others moved the aliases {MAX_ATTEMPTS} times while this move was tried; try again later")

    def _read(self, name: str) -> tuple[Aliases, str | None]:
        try:
            data, info = self._objects.get_with_info(self._bucket, keys.model_aliases(name))
        except ObjectNotFoundError:
            return Aliases(), None
        return Aliases.model_validate_json(data), info.etag

    def _check_same_schema(self, name: str, champion: str, schema_digest: str) -> None:
        if self.get_version(name, champion).schema_digest != schema_digest:
            raise ConfigError(
                f"{name}: the new model has other labels or another input than the champion {champion}, so the two cannot be compared "
                f"and callers of {name} would break; give the new model a name of its own, e.g. NAME={name}-2"
            )


def _check_name(name: str) -> str:
    if not re.fullmatch(MODEL_NAME_PATTERN, name):
        raise ConfigError(f"{name!r} is not a model name; a name is made of a-z, 0-9, '-' and '_', at most 63 characters")
    return name
