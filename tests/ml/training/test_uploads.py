import logging
import time
from pathlib import Path

import pytest
import torch

from ml.storage.artifacts import ArtifactStore
from ml.storage.checkpoints import StoredCheckpoints
from ml.training import uploads
from ml.training.checkpoint_folders import find_damage, verified_checkpoint
from ml.training.folders import WorkFolder, write_json
from ml.training.uploads import CheckpointUploads
from tests.ml.training.checkpoint_cases import save_step, work_folder


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    return work_folder(tmp_path / "work")


@pytest.fixture
def stored(artifact_store: ArtifactStore) -> StoredCheckpoints:
    return StoredCheckpoints(artifact_store, "key")


def save(work: WorkFolder, step: int) -> None:
    save_step(work, step, {"model/w": torch.full((100,), float(step))})


def stored_steps(stored: StoredCheckpoints) -> list[int]:
    return [check.step for check in stored.verify_backups() if check.is_whole]


def test_each_new_checkpoint_is_copied_and_comes_back_whole(
    work: WorkFolder, stored: StoredCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "POLL_SECONDS", 0.01)
    save(work, 1)
    with CheckpointUploads(work, stored, pushed_step=1):
        for step in (2, 3):
            save(work, step)
            while stored_steps(stored)[-1:] != [step]:
                time.sleep(0.01)
    assert stored_steps(stored) == [2, 3]
    assert stored.pull_latest(tmp_path / "elsewhere") == 3
    assert verified_checkpoint(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "step-00000003"
    assert not work.uploading.exists() or not list(work.uploading.iterdir())


@pytest.mark.parametrize("done", [False, True])
def test_the_last_one_is_copied_when_the_training_is_not_done(
    work: WorkFolder, stored: StoredCheckpoints, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "POLL_SECONDS", 600.0)
    with CheckpointUploads(work, stored, pushed_step=0):
        save(work, 1)
        if done:
            write_json(work.result, {})
    assert stored_steps(stored) == ([] if done else [1])


def test_a_checkpoint_that_was_damaged_here_is_not_copied(
    work: WorkFolder, stored: StoredCheckpoints, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "POLL_SECONDS", 600.0)
    save(work, 1)
    file = work.checkpoint(1) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert find_damage(work.checkpoint(1))
    with caplog.at_level(logging.WARNING), CheckpointUploads(work, stored, pushed_step=0):
        pass
    assert stored_steps(stored) == []
    assert "its copy here is damaged: rank-00000.safetensors" in caplog.text
