"""`millstream clean-up` tells first, and deletes when told to."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import clean_up_command
from ml.leases import run_lease
from ml.retention import CleanUpRequest
from ml.settings import Settings
from ml.storage.artifacts import ArtifactStore
from tests.ml.stored_runs import all_keys, simulate_run

DELETE = CleanUpRequest(dry_run=False, keep_runs=1, keep_run_days=0, grace_hours=0)


@pytest.fixture
def store(artifact_store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArtifactStore]:
    monkeypatch.setattr(clean_up_command, "running_stack", lambda state_dir: contextlib.nullcontext())
    monkeypatch.setattr(clean_up_command, "open_artifact_store", lambda: artifact_store)
    monkeypatch.setattr(clean_up_command, "load_settings", lambda: Settings(state_dir=tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    for number in range(2):
        simulate_run(artifact_store, number, "reviews", [number])
    yield artifact_store


def test_it_tells_and_then_deletes(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    before = all_keys(store)
    clean_up_command.clean_up(DELETE.model_copy(update={"dry_run": True}))
    told = capsys.readouterr().out
    assert all_keys(store) == before
    assert "would be deleted" in told and "millstream clean-up --delete" in told
    assert "nothing refers to it (2)" in told and "not of the last 1 runs of its model, and old (3)" in told

    clean_up_command.clean_up(DELETE)
    done = capsys.readouterr().out
    assert len(before - all_keys(store)) == 6
    assert "would be" not in done and "dry run" not in done and "nothing refers to it (2)" in done

    clean_up_command.clean_up(DELETE)
    assert "there is nothing to delete" in capsys.readouterr().out


def test_it_says_why_it_left_things(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    with run_lease(store, "a-run"):
        clean_up_command.clean_up(DELETE)
    assert "what is left stays for another time, since runs are going on: a-run" in capsys.readouterr().out
