import json

from ml.config import RunRequest
from ml.runs import start_run
from ml.storage.artifacts import ArtifactStore


def source_of(store: ArtifactStore, **fields: object) -> str:
    run = start_run(store, RunRequest.model_validate(fields))
    saved = json.loads(store.objects.get(store.runs_bucket, f"runs/{run.run_id}/config.json"))
    assert saved == run.config.model_dump(mode="json")
    return saved["data"]["source"]


def test_a_request_without_data_means_the_demo_data_while_the_model_has_none(artifact_store: ArtifactStore) -> None:
    artifact_store.objects.put(artifact_store.datasets_bucket, "another/a.csv", b"text,label\n")
    artifact_store.objects.put(artifact_store.datasets_bucket, "sentiment/readme.txt", b"nothing to train on")
    assert source_of(artifact_store).startswith("package:")


def test_a_model_with_data_of_its_own_is_never_trained_on_the_demo_data(artifact_store: ArtifactStore) -> None:
    artifact_store.objects.put(artifact_store.datasets_bucket, "sentiment/2026/a.csv", b"text,label\n")
    assert source_of(artifact_store) == f"s3://{artifact_store.datasets_bucket}/sentiment/"
    assert source_of(artifact_store, name="another").startswith("package:")


def test_data_that_is_named_is_what_is_used(artifact_store: ArtifactStore) -> None:
    artifact_store.objects.put(artifact_store.datasets_bucket, "sentiment/a.csv", b"text,label\n")
    assert source_of(artifact_store, data="/data/reviews.csv") == "/data/reviews.csv"
