"""A checkpoint is whole or it is not there."""

import itertools
from pathlib import Path

import pytest

from ml.errors import DigestMismatchError, StorageUnavailableError
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from ml.storage.base import ObjectInfo
from ml.storage.checkpoints import StoredCheckpoints
from ml.storage.memory import MemoryStore


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> ArtifactStore:
    return request.getfixturevalue("artifact_store" if request.param == "memory" else "s3_artifact_store")


@pytest.fixture
def checkpoints(store: ArtifactStore) -> StoredCheckpoints:
    return StoredCheckpoints(store, "stage-key")


def make_checkpoint(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / f"local-{text}"
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "weights" / "model.safetensors").write_text(f"weights of {text}")
    (folder / "__0_0.distcp").write_text(f"optimizer of {text}")
    return folder


def read_folder(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def stored_steps(store: ArtifactStore) -> set[str]:
    prefix = keys.checkpoint_prefix("stage-key")
    return {info.key.removeprefix(prefix).split("/")[0] for info in store.objects.list(store.runs_bucket, prefix)}


def test_there_is_none_at_first(checkpoints: StoredCheckpoints, tmp_path: Path):
    assert checkpoints.pull_latest(tmp_path / "work") is None


def test_the_newest_comes_back_as_it_was_pushed(checkpoints: StoredCheckpoints, tmp_path: Path):
    for step in (50, 100):
        checkpoints.push(step, make_checkpoint(tmp_path, str(step)))
    assert checkpoints.pull_latest(tmp_path / "work") == 100
    assert read_folder(tmp_path / "work" / "step-00000100") == read_folder(tmp_path / "local-100")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["step-00000100"]


def test_the_last_two_are_kept(checkpoints: StoredCheckpoints, store: ArtifactStore, tmp_path: Path):
    for step in (5, 50, 100, 150):
        checkpoints.push(step, make_checkpoint(tmp_path, str(step)))
    assert stored_steps(store) == {"step-00000100", "step-00000150"}


def test_as_many_are_kept_as_asked_for(store: ArtifactStore, tmp_path: Path):
    checkpoints = StoredCheckpoints(store, "stage-key", keep_last=3)
    for step in (1, 2, 3, 4):
        checkpoints.push(step, make_checkpoint(tmp_path, str(step)))
    assert stored_steps(store) == {"step-00000002", "step-00000003", "step-00000004"}


def test_another_training_does_not_see_it(checkpoints: StoredCheckpoints, store: ArtifactStore, tmp_path: Path):
    checkpoints.push(50, make_checkpoint(tmp_path, "50"))
    assert StoredCheckpoints(store, "stage-key-2").pull_latest(tmp_path / "work") is None
    assert StoredCheckpoints(store, "stage").pull_latest(tmp_path / "work") is None


@pytest.mark.parametrize("harm", ["no manifest", "broken manifest", "missing file", "damaged file"])
def test_a_damaged_one_is_skipped_for_the_one_before(
    checkpoints: StoredCheckpoints, store: ArtifactStore, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
):
    for step in (50, 100):
        checkpoints.push(step, make_checkpoint(tmp_path, str(step)))

    def key(name: str) -> str:
        return keys.checkpoint_file("stage-key", 100, name)

    match harm:
        case "no manifest":
            store.objects.delete(store.runs_bucket, key("manifest.json"))
        case "broken manifest":
            store.objects.put(store.runs_bucket, key("manifest.json"), b'{"step": 100, "files": {"../../up": "x"}}')
        case "missing file":
            store.objects.delete(store.runs_bucket, key("weights/model.safetensors"))
        case "damaged file":
            store.objects.put(store.runs_bucket, key("weights/model.safetensors"), b"weights of 1oo")
    checks = checkpoints.verify_backups()
    assert [(check.step, check.is_whole) for check in checks] == [(50, True), (100, False)]
    assert ("model.safetensors" if "file" in harm else "manifest") in (checks[1].damage or "")
    assert checkpoints.pull_latest(tmp_path / "work") == 50
    assert read_folder(tmp_path / "work" / "step-00000050") == read_folder(tmp_path / "local-50")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["step-00000050"]
    assert harm == "no manifest" or "skipped" in caplog.text
    # The training goes on from there, and what is damaged goes in time.
    for step in (100, 150):
        checkpoints.push(step, make_checkpoint(tmp_path, f"{step} again"))
    assert checkpoints.pull_latest(tmp_path / "work") == 150
    assert stored_steps(store) == {"step-00000100", "step-00000150"}
    assert [check.is_whole for check in checkpoints.verify_backups()] == [True, True]


class ForgettingStore(MemoryStore):
    """Says that it took a file, and holds other bytes."""

    forgets = False

    def put(self, bucket: str, key: str, data: bytes | Path, **conditions) -> ObjectInfo:
        if self.forgets and isinstance(data, Path):
            data = data.read_bytes()[:-1] + b"?"
        return super().put(bucket, key, data, **conditions)


def test_an_upload_that_arrived_damaged_is_no_checkpoint(tmp_path: Path):
    objects = ForgettingStore()
    store = ArtifactStore(objects)
    store.ensure_buckets()
    checkpoints = StoredCheckpoints(store, "key")
    checkpoints.push(50, make_checkpoint(tmp_path, "50"))
    objects.forgets = True
    with pytest.raises(DigestMismatchError, match=r"step 100 was uploaded, but in the store its file __0_0\.distcp is damaged"):
        checkpoints.push(100, make_checkpoint(tmp_path, "100"))
    assert checkpoints.pull_latest(tmp_path / "work") == 50


def test_the_same_step_can_be_pushed_again_with_other_bytes(checkpoints: StoredCheckpoints, tmp_path: Path):
    checkpoints.push(50, make_checkpoint(tmp_path, "first"))
    checkpoints.push(50, make_checkpoint(tmp_path, "second"))
    checkpoints.push(50, make_checkpoint(tmp_path, "second"))
    checkpoints.pull_latest(tmp_path / "work")
    assert read_folder(tmp_path / "work" / "step-00000050") == read_folder(tmp_path / "local-second")


def test_a_local_folder_of_the_same_step_is_replaced(checkpoints: StoredCheckpoints, tmp_path: Path):
    checkpoints.push(50, make_checkpoint(tmp_path, "50"))
    half = tmp_path / "work" / "step-00000050"
    half.mkdir(parents=True)
    (half / "half-written").write_text("x")
    checkpoints.pull_latest(tmp_path / "work")
    assert read_folder(half) == read_folder(tmp_path / "local-50")


class DyingStore(MemoryStore):
    """Dies after a number of changes, as a killed process would."""

    def __init__(self):
        super().__init__()
        self.num_left = 10**9

    def _count(self) -> None:
        if self.num_left == 0:
            raise KeyboardInterrupt
        self.num_left -= 1

    def put(self, bucket: str, key: str, data: bytes | Path, **conditions) -> ObjectInfo:
        self._count()
        return super().put(bucket, key, data, **conditions)

    def delete(self, bucket: str, key: str) -> None:
        self._count()
        super().delete(bucket, key)


def test_wherever_a_push_is_killed_a_whole_checkpoint_is_there(tmp_path: Path):
    """Push 50, 100, then 100 again with other bytes and 150, killed after every possible number of changes."""
    plan = [(50, "50"), (100, "100"), (100, "100 again"), (150, "150")]
    contents = {name: read_folder(make_checkpoint(tmp_path, name)) for _, name in plan}
    num_kills = 0
    for num_changes in itertools.count(5):
        objects = DyingStore()
        store = ArtifactStore(objects)
        store.ensure_buckets()
        checkpoints = StoredCheckpoints(store, "key")
        checkpoints.push(*_local(tmp_path, plan[0]))
        objects.num_left = num_changes
        try:
            for item in plan[1:]:
                checkpoints.push(*_local(tmp_path, item))
        except KeyboardInterrupt:
            num_kills += 1
        else:
            break
        objects.num_left = 10**9
        step = checkpoints.pull_latest(tmp_path / "work")
        assert step is not None
        assert read_folder(tmp_path / "work" / f"step-{step:08d}") in contents.values()
    assert num_kills > 8


def _local(tmp_path: Path, item: tuple[int, str]) -> tuple[int, Path]:
    return item[0], tmp_path / f"local-{item[1]}"


def test_a_store_that_does_not_answer_is_no_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    objects = MemoryStore()
    store = ArtifactStore(objects)
    store.ensure_buckets()
    checkpoints = StoredCheckpoints(store, "key")
    checkpoints.push(50, make_checkpoint(tmp_path, "50"))

    def unavailable(bucket: str, key: str, path: Path) -> None:
        raise StorageUnavailableError("no answer")

    monkeypatch.setattr(objects, "download", unavailable)
    with pytest.raises(StorageUnavailableError):
        checkpoints.pull_latest(tmp_path / "work")
