import json
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from ml.errors import TrainingError
from ml.training import checkpoint_storage
from ml.training.checkpoint import Checkpointer, Progress, load_checkpoint, load_weights, read_state, write_weights
from ml.training.checkpoint_folders import STATE_FILE, find_damage, newest_checkpoint
from ml.training.checkpoint_storage import StoredFile
from ml.training.folders import WorkFolder, write_json
from ml.training.ranks import RankGroup
from ml.training.strategies.states import model_tensors
from tests.ml.training.checkpoint_cases import Trained, save_step, some_plan, work_folder
from tests.ml.training.several_ranks import Interrupted, interrupt_at
from tests.ml.training.test_loop import toy_spec, train_here


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """Stopped after step 23, with checkpoints every 5 steps and a validation every 7."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.raises(Interrupted):
        train_here(toy_spec(folder), finish_step=interrupt_at(23))
    return WorkFolder(folder)


def test_the_last_two_checkpoints_are_kept_whole(trained: WorkFolder) -> None:
    assert sorted(path.name for path in trained.checkpoints.iterdir()) == ["step-00000015", "step-00000020"]
    newest = newest_checkpoint(trained.checkpoints)
    assert newest is not None
    progress, plan = read_state(newest)
    assert (progress.step, progress.best_step, plan.num_steps) == (20, 14, 28)
    names = {path.name for path in newest.iterdir()}
    assert names == {
        "rank-00000.safetensors",
        "tensors.json",
        "best.safetensors",
        "history.jsonl",
        "state.json",
    }


def test_the_best_weights_are_stored_once(trained: WorkFolder) -> None:
    linked = [trained.checkpoint(step) / "best.safetensors" for step in (15, 20)]
    assert linked[0].samefile(linked[1])


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / STATE_FILE, {"format_version": 99, "files": {}})
    with pytest.raises(TrainingError, match="format 99"):
        read_state(tmp_path)


def test_no_checkpoint_holds_a_pickle(trained: WorkFolder) -> None:
    for path in trained.root.rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:4]
            assert start[:1] != b"\x80" and start != b"PK\x03\x04", path


class Tied(nn.Module):
    """One table under two names, a buffer, and a buffer that is not part of the state."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)


def test_shared_weights_are_written_once_and_stay_shared(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    model.count += 5
    assert model_tensors(model).keys() == {"table.weight", "count"}
    write_weights(model_tensors(model), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.out.weight, model.table.weight)
    assert other.out.weight is other.table.weight
    assert other.count.item() == 5


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    write_weights(model_tensors(nn.Linear(3, 3)), tmp_path / "w.safetensors")
    with pytest.raises(TrainingError, match="another architecture"):
        load_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")


def test_state_is_readable_json(trained: WorkFolder) -> None:
    state = json.loads((trained.checkpoint(20) / STATE_FILE).read_text())
    assert state["files"].keys() == {path.name for path in trained.checkpoint(20).iterdir()} - {STATE_FILE}


def names(work: WorkFolder) -> list[str]:
    return sorted(path.name for path in work.checkpoints.iterdir())


def load(work: WorkFolder, step: int, tensors: dict[str, torch.Tensor]) -> None:
    load_checkpoint(work.checkpoint(step), tensors, RankGroup(), work=work, seed=1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_bit_comes_back(tmp_path: Path, asynchronous: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 256, (7, 24), dtype=torch.uint8, generator=generator)
    tensors = {f"model/{dtype}": values.view(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    tensors |= {f"model/{dtype}": values.view(dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}
    tensors |= {"model/flags": values > 100, "model/number": torch.tensor(-0.1), "model/empty": torch.zeros(0, 3)}
    tensors |= {"model/turned": values.t(), "scaler/scale": torch.tensor(65536.0)}
    work = work_folder(tmp_path)
    before = torch.get_rng_state()
    save_step(work, 4, tensors, asynchronous=asynchronous)
    torch.manual_seed(12)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(work, 4, found)
    for name, tensor in tensors.items():
        assert found[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8)), name
    assert torch.equal(torch.get_rng_state(), before)


def test_a_save_holds_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), checkpoint_storage.write_safetensors

    def write_late(path: Path, tensors: dict[str, torch.Tensor]) -> StoredFile:
        assert may_write.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(checkpoint_storage, "write_safetensors", write_late)
    work = work_folder(tmp_path)
    trained = Trained(RankGroup(), split=False)
    write_weights(model_tensors(trained.model), work.best_weights(2))
    trained.step(2)
    progress = Progress(step=2, best_step=2)
    with Checkpointer(work, RankGroup(), keep_last=2, asynchronous=True) as checkpointer:
        checkpointer.save(progress, some_plan(), trained.tensors())
        then = {name: tensor.clone() for name, tensor in trained.tensors().items()}
        # The training goes on: other weights, other progress, a line of history, and better weights in place of the best.
        expected = trained.step(3)
        progress.step = 5
        work.history.write_text("later\n")
        work.best_weights(2).unlink()
        assert newest_checkpoint(work.checkpoints) is None
        may_write.set()
    assert read_state(work.checkpoint(2))[0].step == 2
    assert (work.checkpoint(2) / "history.jsonl").read_text() == ""
    again = Trained(RankGroup(), split=False, seed=9)
    again.load(work, 2)
    assert all(torch.equal(tensor, then[name]) for name, tensor in again.tensors().items())
    assert again.step(3) == expected
    assert work.best_weights(2).samefile(work.checkpoint(2) / "best.safetensors")


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    work = work_folder(tmp_path)
    tensor = torch.zeros(2**20)
    with Checkpointer(work, RankGroup(), keep_last=3, asynchronous=True) as checkpointer:
        for step in range(1, 6):
            assert checkpointer.save(Progress(step=step), some_plan(), {"model/w": tensor.fill_(step)}) > 0
            assert step == 1 or names(work)[-1] >= f"step-{step - 1:08d}"
    assert names(work) == ["step-00000003", "step-00000004", "step-00000005"]
    for step in (3, 4, 5):
        load(work, step, {"model/w": tensor})
        assert tensor.eq(step).all()
        assert find_damage(work.checkpoint(step)) is None


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    work = work_folder(tmp_path)
    tensor = torch.zeros(3)
    for value in (1, 2):
        save_step(work, 7, {"model/w": tensor.fill_(value)}, keep_last=1)
    tensor.zero_()
    load(work, 7, {"model/w": tensor})
    assert (names(work), tensor.tolist()) == (["step-00000007"], [2.0] * 3)


@contextmanager
def full_disk(kind: str, folder: Path) -> Iterator[None]:
    """A disk, or a limit on the size of a file, that 1 MiB does not fit into."""
    if kind == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    (folder / "filling").write_bytes(b"x" * 7 * 2**18)
    yield
    (folder / "filling").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a disk of its own: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_full_disk_is_said_at_the_next_call_and_older_ones_stay(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("small_disk") if kind == "disk" else tmp_path
    work = work_folder(folder)
    small = {"model/w": torch.ones(2**10)}
    save_step(work, 1, small)
    checkpointer = Checkpointer(work, RankGroup(), keep_last=2, asynchronous=True)
    with full_disk(kind, folder):
        checkpointer.save(Progress(step=2), some_plan(), {"model/w": torch.ones(2**18)})
        with pytest.raises(
            TrainingError, match=r"step 2 could not be written to .*(No space left|File too large).*older ones are untouched"
        ):
            checkpointer.save(Progress(step=3), some_plan(), small)
        assert names(work) == ["step-00000001"]
    assert find_damage(work.checkpoint(1)) is None
    checkpointer.save(Progress(step=4), some_plan(), small)
    checkpointer.close()
    assert names(work) == ["step-00000001", "step-00000004"]


def test_another_architecture_or_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    work = work_folder(tmp_path)
    save_step(work, 1, {"model/w": torch.zeros(3), "optimizer/w/step": torch.tensor(1.0)})
    for tensors, message in (
        ({"model/w": torch.zeros(4), "optimizer/w/step": torch.tensor(0.0)}, r"model/w is stored as torch.float32 \[3\], here .* \[4\]"),
        ({"model/w": torch.zeros(3).double(), "optimizer/w/step": torch.tensor(0.0)}, "here it is torch.float64"),
        ({"model/w": torch.zeros(3)}, "optimizer/w/step is stored, here there is none"),
        ({"model/w": torch.zeros(3), "optimizer/w/step": torch.tensor(0.0), "model/b": torch.zeros(1)}, "model/b is not stored"),
    ):
        with pytest.raises(TrainingError, match=message):
            load(work, 1, tensors)


def test_an_optimizer_that_has_not_stepped_is_saved_as_such(tmp_path: Path) -> None:
    work = work_folder(tmp_path)
    fresh, straight = Trained(RankGroup(), split=False), Trained(RankGroup(), split=False)
    fresh.save(work, 1)
    expected = straight.step(3)
    assert fresh.step(3) == expected
    again = Trained(RankGroup(), split=False, seed=9)
    again.step(1)
    again.load(work, 1)
    assert again.step(3) == expected
