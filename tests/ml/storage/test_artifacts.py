"""Bytes are stored once under their digest, and what is read is what was written."""

from pathlib import Path

import pandas as pd
import pytest

from ml.artifacts import ArtifactRef, BundleRef
from ml.errors import DigestMismatchError, ObjectNotFoundError, StorageError
from ml.storage.artifacts import ArtifactStore, digest_bytes, digest_file


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> ArtifactStore:
    return request.getfixturevalue("artifact_store" if request.param == "memory" else "s3_artifact_store")


def damage(store: ArtifactStore, ref: ArtifactRef, data: bytes) -> None:
    store.objects.put(store.runs_bucket, ref.uri.removeprefix(f"s3://{store.runs_bucket}/"), data)


def test_bytes_and_files_of_one_content_are_one_object(store: ArtifactStore, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    ref = store.put_bytes(b"content")
    assert store.put_file(tmp_path / "file") == ref
    assert ref.sha256 == digest_bytes(b"content") == digest_file(tmp_path / "file")
    assert ref.size_bytes == 7
    assert len(list(store.objects.list(store.runs_bucket))) == 1
    assert store.get_bytes(ref) == b"content"
    assert store.get_file(ref, tmp_path / "a" / "b" / "copy").read_bytes() == b"content"


def test_a_table_comes_back_and_has_one_digest(store: ArtifactStore):
    frame = pd.DataFrame({"text": ["a", None, "ü"], "target": [1, 0, 1]})
    ref = store.put_frame(frame)
    pd.testing.assert_frame_equal(store.get_frame(ref), frame)
    assert store.put_frame(frame.copy()) == ref


def test_damaged_bytes_are_never_handed_out(store: ArtifactStore, tmp_path: Path):
    ref = store.put_bytes(b"content")
    damage(store, ref, b"cOntent")
    with pytest.raises(DigestMismatchError, match=ref.sha256):
        store.get_bytes(ref)
    with pytest.raises(DigestMismatchError):
        store.get_file(ref, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_an_object_cut_short_is_written_again(store: ArtifactStore):
    ref = store.put_bytes(b"content")
    damage(store, ref, b"con")
    store.put_bytes(b"content")
    assert store.get_bytes(ref) == b"content"


def test_a_missing_artifact_is_not_found(store: ArtifactStore):
    ref = ArtifactRef(uri=f"s3://{store.runs_bucket}/artifacts/sha256/00/00", sha256="0" * 64, size_bytes=1)
    with pytest.raises(ObjectNotFoundError):
        store.get_bytes(ref)


def test_a_folder_comes_back_and_only_what_changed_is_fetched(store: ArtifactStore, tmp_path: Path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "bundle.json").write_text("{}")
    (source / "inner" / "model.onnx").write_bytes(b"weights")
    ref = store.put_folder(source)
    assert set(ref.files) == {"bundle.json", "inner/model.onnx"}
    assert (ref.size_bytes, ref.digest) == (9, digest_bytes(b"{}"))
    copy = store.get_folder(ref, tmp_path / "copy")
    kept = (copy / "bundle.json").stat().st_mtime_ns
    (copy / "inner" / "model.onnx").write_bytes(b"wEights")
    store.get_folder(ref, copy)
    assert (copy / "inner" / "model.onnx").read_bytes() == b"weights"
    assert (copy / "bundle.json").stat().st_mtime_ns == kept


def test_a_folder_that_points_outside_is_refused(store: ArtifactStore, tmp_path: Path):
    ref = store.put_bytes(b"evil")
    for name in ("../evil", "/tmp/evil", "inner/../../evil"):
        with pytest.raises(StorageError, match="outside"):
            store.get_folder(BundleRef(files={name: ref}), tmp_path / "copy")
    assert not (tmp_path / "evil").exists()
