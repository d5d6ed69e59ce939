"""A run holds its lease from before its first look at the store until its outcome is written, and tells people of a bad end."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr

from flows import journal as journal_module
from flows.journal import Journal
from ml.artifacts import ArtifactRef, RawDataset, ValidatedDataset
from ml.config import RunRequest
from ml.errors import DataError, WriteConflictError
from ml.leases import live_runs
from ml.outcome import PipelineOutcome, RunRecords, build_outcome
from ml.runs import Run, finish_run
from ml.settings import Settings
from ml.stages import StageResult
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from tests.ml.message_hook import Hook
from tests.store_checker import find_problems

REF = ArtifactRef(uri=f"s3://runs/artifacts/sha256/00/{'0' * 62}", sha256="0" * 64, size_bytes=1)
RAW = RawDataset(source="reviews.csv", objects={}, table=REF, num_rows=1)


@pytest.fixture
def hook(artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    """The journal over a store in memory; only the artifact on the Prefect run page and the report are left out."""

    def publish(run: Run, records: RunRecords, error: BaseException | None) -> PipelineOutcome:
        assert live(artifact_store) == (run.run_id,)
        outcome = build_outcome(run.run_id, run.config, records, run.started, datetime.now(UTC), error)
        finish_run(artifact_store, run, records, outcome, "<html></html>")
        return outcome

    hook = Hook()
    monkeypatch.setattr(journal_module, "open_artifact_store", lambda: artifact_store)
    monkeypatch.setattr(journal_module, "publish_outcome", publish)
    monkeypatch.setattr(journal_module, "load_settings", lambda: Settings(notify_urls=SecretStr(hook.address)))
    yield hook
    hook.server.shutdown()


def live(store: ArtifactStore) -> tuple[str, ...]:
    return live_runs(store, datetime.now(UTC), revoke=False)


def validated(*, passed: bool) -> ValidatedDataset:
    failures = () if passed else ("too few rows",)
    return ValidatedDataset(
        table=REF, quarantine=REF, num_rows=1, num_quarantined=0, passed=passed, results=(), failures=failures, contract={}
    )


def test_a_run_that_fails_is_told_and_gives_its_lease_back(hook: Hook, artifact_store: ArtifactStore):
    with pytest.raises(DataError, match="no column"), Journal(RunRequest(name="reviews")) as journal:
        assert live(artifact_store) == (journal.run.run_id,)
        raise DataError("reviews.csv has no column 'text'")
    assert live(artifact_store) == ()
    assert [(message["title"], message["message"].splitlines()[0]) for _, message in hook.received] == [
        ("reviews: failed", "reviews.csv has no column 'text'")
    ]


def test_a_rejected_run_is_told(hook: Hook, artifact_store: ArtifactStore):
    with Journal(RunRequest(name="reviews")) as journal:
        journal.keep("validated", StageResult(validated(passed=False), "validate_data", "key", False, 1.0))
        assert journal.close().status == "rejected"
    assert live(artifact_store) == ()
    assert [message["title"] for _, message in hook.received] == ["reviews: rejected"]


def test_a_failure_that_cannot_be_written_down_is_told(hook: Hook, artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(journal_module, "publish_outcome", refuse)
    with pytest.raises(DataError), Journal(RunRequest(name="reviews")):
        raise DataError("no column")
    assert "no column" in hook.received[0][1]["message"] and "could not be written" in hook.received[0][1]["message"]
    assert live(artifact_store) == ()


def test_a_run_that_lost_its_lease_ends_and_names_nothing_that_may_be_gone(hook: Hook, artifact_store: ArtifactStore):
    with pytest.raises(WriteConflictError, match="was revoked"), Journal(RunRequest(name="reviews")) as journal:
        journal.keep("raw", StageResult(RAW, "ingest_data", "key", True, 1.0))
        key = keys.lease(journal.run.run_id)
        artifact_store.objects.delete(artifact_store.runs_bucket, key)
        journal._lease._renew()
        # So that the published outcome meets a lease, as it would in `hook`.
        artifact_store.objects.put(artifact_store.runs_bucket, key, b"{}")
        journal.keep("clean", StageResult(RAW, "clean_data", "key", False, 1.0))
    artifact_store.objects.delete(artifact_store.runs_bucket, key)
    assert find_problems(artifact_store.objects, artifact_store.runs_bucket.removesuffix("runs")) == []
    assert "was revoked" in hook.received[0][1]["message"]
