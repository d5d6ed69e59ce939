"""A stage is computed once for what goes into it, and never half."""

import pytest

from ml.artifacts import ArtifactRef, Record
from ml.config import CleanConfig
from ml.stages import Stage, run_stage
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore


class Counted(Record):
    value: int


STAGE = Stage("count_rows", 1, Counted)


def test_a_stage_is_computed_once(artifact_store: ArtifactStore):
    calls = []

    def compute() -> Counted:
        calls.append(1)
        return Counted(value=7)

    first = run_stage(artifact_store, STAGE, "key", compute)
    second = run_stage(artifact_store, STAGE, "key", compute)
    assert (first.record, first.reused) == (Counted(value=7), False)
    assert (second.record, second.reused) == (Counted(value=7), True)
    assert len(calls) == 1
    assert not run_stage(artifact_store, STAGE, "another-key", compute).reused


def test_a_stage_that_fails_leaves_nothing_that_is_read(artifact_store: ArtifactStore):
    def fail() -> Counted:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run_stage(artifact_store, STAGE, "key", fail)
    assert list(artifact_store.objects.list(artifact_store.runs_bucket)) == []
    assert not run_stage(artifact_store, STAGE, "key", lambda: Counted(value=1)).reused


@pytest.mark.parametrize("stored", [b'{"count": 7}', b"{", b""])
def test_a_record_that_cannot_be_read_is_computed_anew(artifact_store: ArtifactStore, stored: bytes, caplog: pytest.LogCaptureFixture):
    artifact_store.objects.put(artifact_store.runs_bucket, keys.stage_record("count_rows", "key"), stored)
    result = run_stage(artifact_store, STAGE, "key", lambda: Counted(value=2))
    assert (result.record.value, result.reused) == (2, False)
    assert "computed anew" in caplog.text
    assert run_stage(artifact_store, STAGE, "key", lambda: Counted(value=3)).record.value == 2


def test_the_key_changes_with_everything_that_changes_the_result():
    ref = ArtifactRef(uri="s3://b/k", sha256="0", size_bytes=1)
    stages = [
        STAGE,
        Stage("count_rows", 2, Counted),
        Stage("count_words", 1, Counted),
        Stage("count_rows", 1, Counted, libraries=("numpy",)),
    ]
    parts = [(), ("a",), ("b",), ("a", "b"), (["a", "b"],), (1,), (1.5,), (None,), ({"a": 1},), (CleanConfig(),), (ref,)]
    found = [stage.key(*values) for stage in stages for values in parts]
    assert len(set(found)) == len(found)
    assert STAGE.key(CleanConfig()) != STAGE.key(CleanConfig(strip_html=False))


def test_the_key_does_not_change_with_what_changes_nothing():
    assert STAGE.key({"a": 1, "b": [1, 2]}) == STAGE.key({"b": (1, 2), "a": 1})
    assert STAGE.key(CleanConfig()) == STAGE.key(CleanConfig().model_dump())
    assert STAGE.key("a") == Stage("count_rows", 1, Counted).key("a")


def test_the_key_changes_with_the_version_of_a_library(monkeypatch: pytest.MonkeyPatch):
    stage = Stage("count_rows", 1, Counted, libraries=("numpy",))
    before = stage.key("a")
    monkeypatch.setattr("ml.stages.importlib.metadata.version", lambda name: "99.0")
    assert stage.key("a") != before
    assert STAGE.key("a") == Stage("count_rows", 1, Counted).key("a")


def test_what_has_no_fixed_form_cannot_be_part_of_a_key():
    with pytest.raises(TypeError, match="object"):
        STAGE.key(object())
