"""Checkpoints in object storage: what a training resumes from when its machine is gone.

A checkpoint is a folder of files and a `manifest.json` that lists them with their digests. The manifest is written
last and deleted first, so a checkpoint without one is not there, whatever files lie around. What was uploaded is read back and
compared before the manifest is written, and compared again by whoever downloads it.

A second copy elsewhere is a second `StoredCheckpoints` on another store: both are a `CheckpointStore`.
"""

import logging
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ml.artifacts import Record
from ml.errors import DigestMismatchError, ObjectNotFoundError
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore, digest_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NUM_KEPT = 2

_STEP_FILE = re.compile(r"step-(\d+)/(.+)")


class CheckpointManifest(Record):
    """Which files a checkpoint has: relative name -> sha256."""

    step: int
    files: dict[str, str]


@dataclass(frozen=True)
class BackupCheck:
    """What reading a stored checkpoint again has found; `damage` is None when every byte is as it was written."""

    step: int
    damage: str | None

    @property
    def is_whole(self) -> bool:
        return self.damage is None


class StoredCheckpoints:
    """The checkpoints of one training, in the `runs` bucket. Implements `ml.solution.CheckpointStore`.

    Each holds the best weights so far as one of its files, so keeping the last ones keeps the best.

    Args:
        stage_key: of the training stage; a training of other data or settings has another.
        keep_last: how many are kept.
    """

    def __init__(self, store: ArtifactStore, stage_key: str, *, keep_last: int = NUM_KEPT):
        self._keep_last = keep_last
        self._objects = store.objects
        self._bucket = store.runs_bucket
        self._stage_key = stage_key

    def push(self, step: int, folder: Path) -> None:
        """Copy a committed checkpoint folder; its manifest is written last. Older steps beyond the last ones go.

        Raises:
            DigestMismatchError: the store gives back other bytes than it was given; the checkpoint is then not there.
            StorageError: a file could not be written; the checkpoint is then not there, the older ones are.
        """
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if MANIFEST in files:
            raise ValueError(f"{folder} holds a file named {MANIFEST}, which is the name of the manifest itself")
        manifest = CheckpointManifest(step=step, files={name: digest_file(path) for name, path in files.items()})
        if self._read_manifest(step) == manifest:
            logger.debug("checkpoint of step %d is stored already", step)
            return
        # A resumed training may write other bytes for the same step: until they are whole, there is no such checkpoint.
        self._objects.delete(self._bucket, self._key(step, MANIFEST))
        for name, path in files.items():
            self._objects.put(self._bucket, self._key(step, name), path)
        if damage := self._damage(manifest):
            raise DigestMismatchError(f"checkpoint of step {step} was uploaded, but in the store {damage}; look at the store's disks")
        self._objects.put(self._bucket, self._key(step, MANIFEST), manifest.model_dump_json(indent=1).encode())
        self._delete_older_steps(step)

    def pull_latest(self, destination: Path) -> int | None:
        """Copy the newest whole checkpoint to `destination/step-<8 digits>`; its step, or None when there is none.

        One with missing or damaged files is skipped with a warning, for the one before it.

        Raises:
            StorageUnavailableError: the store does not answer, which says nothing about the checkpoint.
        """
        for step in sorted(self._steps(), reverse=True):
            manifest = self._read_manifest(step)
            if manifest is not None and self._download(manifest, destination / f"step-{step:08d}"):
                return step
        return None

    def verify_backups(self) -> list[BackupCheck]:
        """Read every stored checkpoint again and compare it with its manifest. Oldest first; costs a download of each.

        Raises:
            StorageUnavailableError: the store does not answer, which says nothing about the checkpoints.
        """
        checks = []
        for step in sorted(self._steps()):
            manifest = self._read_manifest(step)
            checks.append(BackupCheck(step, "its manifest is missing or damaged" if manifest is None else self._damage(manifest)))
        return checks

    def _damage(self, manifest: CheckpointManifest) -> str | None:
        """What differs between a manifest and the stored files, which pass through a temporary folder one at a time."""
        for name, sha256 in manifest.files.items():
            with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
                if damage := self._download_file(manifest.step, name, sha256, Path(temporary)):
                    return damage
        return None

    def _download(self, manifest: CheckpointManifest, target: Path) -> bool:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            for name, sha256 in manifest.files.items():
                if damage := self._download_file(manifest.step, name, sha256, folder):
                    logger.warning("checkpoint of step %d is skipped: %s", manifest.step, damage)
                    return False
            if target.exists():
                shutil.rmtree(target)
            folder.replace(target)
        return True

    def _download_file(self, step: int, name: str, sha256: str, folder: Path) -> str | None:
        """Download a file; what is wrong with it, or None."""
        try:
            self._objects.download(self._bucket, self._key(step, name), folder / name)
        except ObjectNotFoundError:
            return f"its file {name} is missing"
        return None if digest_file(folder / name) == sha256 else f"its file {name} is damaged (sha256 differs)"

    def _read_manifest(self, step: int) -> CheckpointManifest | None:
        try:
            manifest = CheckpointManifest.model_validate_json(self._objects.get(self._bucket, self._key(step, MANIFEST)))
            for name in manifest.files:
                keys.check_key(name)
        except ObjectNotFoundError:
            return None
        except (ValidationError, ValueError) as error:
            logger.warning("checkpoint of step %d is skipped: its manifest cannot be read (%s)", step, error)
            return None
        return manifest if manifest.step == step else None

    def delete_all(self) -> None:
        """Forget every checkpoint: what they were to resume is finished."""
        for info in list(self._objects.list(self._bucket, keys.checkpoint_prefix(self._stage_key))):
            self._objects.delete(self._bucket, info.key)

    def _delete_older_steps(self, pushed: int) -> None:
        """Keep the last whole checkpoints up to the one just pushed, and whatever is newer."""
        steps = self._steps()
        whole = sorted((step for step, names in steps.items() if MANIFEST in names and step <= pushed), reverse=True)
        for step, names in steps.items():
            if step < pushed and step not in whole[: self._keep_last]:
                for name in sorted(names, key=lambda name: name != MANIFEST):
                    self._objects.delete(self._bucket, self._key(step, name))

    def _steps(self) -> dict[int, list[str]]:
        """Step -> names of its objects, whole or not."""
        prefix = keys.checkpoint_prefix(self._stage_key)
        steps: dict[int, list[str]] = {}
        for info in self._objects.list(self._bucket, prefix):
            if found := _STEP_FILE.fullmatch(info.key.removeprefix(prefix)):
                steps.setdefault(int(found[1]), []).append(found[2])
        return steps

    def _key(self, step: int, name: str) -> str:
        return keys.checkpoint_file(self._stage_key, step, name)
