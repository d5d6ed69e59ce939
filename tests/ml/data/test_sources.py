import logging
import os
from pathlib import Path

import pytest

from ml.config import DataConfig
from ml.data.sources import Source, open_source
from ml.errors import DataError, StorageUnavailableError
from ml.storage.artifacts import ArtifactStore


def opened(store: ArtifactStore, source: object, **config: object) -> Source:
    return open_source(DataConfig.model_validate({"source": str(source), **config}), store)


def names(source: Source) -> list[str]:
    return [item.name for item in source.objects]


def test_relative_path_home_and_file_uri_are_paths(artifact_store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b.csv").write_text("text\nx\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    digests = [opened(artifact_store, form).digests for form in ("a b.csv", "~/a b.csv", f"file://{tmp_path}/a%20b.csv")]
    assert digests[0] == digests[1] == digests[2]


def test_folder_is_read_in_order_of_names_and_tells_what_it_leaves_out(
    artifact_store: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.csv", "a/z.jsonl", "notes.txt", ".hidden.csv", "_part.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.csv").touch()
    with caplog.at_level(logging.INFO, logger="ml.data.sources"):
        assert names(opened(artifact_store, tmp_path)) == ["a/z.jsonl", "b.csv"]
    assert all(name in caplog.text for name in ("notes.txt", ".hidden.csv", "_part.csv", "empty.csv"))


def test_window_takes_objects_by_their_time(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    for day, name in enumerate(("c.csv", "a.csv", "b.csv"), start=1):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (day * 86_400, day * 86_400))
    assert names(opened(artifact_store, tmp_path, window="last_n", window_last_n=2)) == ["a.csv", "b.csv"]
    assert names(opened(artifact_store, tmp_path, window="since", window_since="1970-01-03")) == ["a.csv", "b.csv"]
    with pytest.raises(DataError, match="the newest is of 1970-01-04"):
        opened(artifact_store, tmp_path, window="since", window_since="1971-01-01")
    with pytest.raises(DataError, match="window_last_n"):
        opened(artifact_store, tmp_path, window="last_n")
    with pytest.raises(DataError, match="ISO date"):
        opened(artifact_store, tmp_path, window="since", window_since="yesterday")


def test_prefix_is_a_folder_and_not_the_start_of_a_name(artifact_store: ArtifactStore) -> None:
    bucket = artifact_store.datasets_bucket
    for key in ("reviews/a.csv", "reviews/2026/b.csv", "reviews-old/c.csv", "reviews/readme.md"):
        artifact_store.objects.put(bucket, key, b"x")
    assert names(opened(artifact_store, f"s3://{bucket}/reviews")) == ["2026/b.csv", "a.csv"]
    assert names(opened(artifact_store, f"s3://{bucket}/reviews/")) == ["2026/b.csv", "a.csv"]
    assert names(opened(artifact_store, f"s3://{bucket}/reviews/a.csv")) == ["a.csv"]


def test_objects_of_the_real_store_are_read(s3_artifact_store: ArtifactStore) -> None:
    bucket = s3_artifact_store.datasets_bucket
    s3_artifact_store.objects.put(bucket, "reviews/a.csv", b"text,label\n")
    source = opened(s3_artifact_store, f"s3://{bucket}/reviews")
    assert [item.read() for item in source.objects] == [b"text,label\n"]


def test_absent_bucket_and_prefix_are_bad_input(artifact_store: ArtifactStore) -> None:
    with pytest.raises(DataError, match="no such bucket"):
        opened(artifact_store, "s3://nowhere/x")
    with pytest.raises(DataError, match="nothing below"):
        opened(artifact_store, f"s3://{artifact_store.datasets_bucket}/x")
    with pytest.raises(DataError, match="names no bucket"):
        opened(artifact_store, "s3://")


def test_store_that_is_away_stays_a_reason_to_try_again(artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise StorageUnavailableError("busy")

    monkeypatch.setattr(artifact_store.objects, "stat", away)
    with pytest.raises(StorageUnavailableError):
        opened(artifact_store, "s3://bucket/x")


def test_package_is_located_and_not_imported(artifact_store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "demo_rows"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "rows.csv").write_text("text\nx\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert names(opened(artifact_store, "package:demo_rows/rows.csv")) == ["rows.csv"]
    with pytest.raises(DataError, match="outside the package"):
        opened(artifact_store, "package:demo_rows/../secret.csv")
    with pytest.raises(DataError, match="not installed"):
        opened(artifact_store, "package:no_such_package/rows.csv")


@pytest.mark.parametrize(
    ("source", "told"),
    [("", "DATA="), ("ftp://host/a.csv", "not a known kind"), ("no/such/folder/a.csv", "the folder .* is not there either")],
)
def test_source_that_cannot_be_is_told(artifact_store: ArtifactStore, source: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        opened(artifact_store, source)


def test_kind_that_cannot_be_read_and_folder_without_data_are_told(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="CSV, TSV, Parquet and JSONL"):
        opened(artifact_store, tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"no file that can be read.*a\.xlsx"):
        opened(artifact_store, tmp_path)
