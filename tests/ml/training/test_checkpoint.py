import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ml.errors import TrainingError
from ml.training.checkpoint import load_weights, model_tensors, read_state, save_weights
from ml.training.checkpoint_folders import STATE_FILE, newest_checkpoint, step_of_checkpoint
from ml.training.folders import WorkFolder, write_json
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
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "best.safetensors",
        "history.jsonl",
        "state.json",
    }


def test_the_best_weights_are_stored_once(trained: WorkFolder) -> None:
    linked = [trained.checkpoint(step) / "best.safetensors" for step in (15, 20)]
    assert linked[0].samefile(linked[1])


def test_a_damaged_checkpoint_is_passed_over(trained: WorkFolder, tmp_path: Path) -> None:
    for step, size in ((5, 3), (10, 3), (15, 2)):
        folder = tmp_path / f"step-{step:08d}"
        write_json(folder / STATE_FILE, {"files": {"model.safetensors": 3}})
        (folder / "model.safetensors").write_bytes(b"x" * size)
    (tmp_path / ".writing-00000020").mkdir()
    (tmp_path / "step-00000025").mkdir()
    newest = newest_checkpoint(tmp_path)
    assert step_of_checkpoint(newest) == 10
    (tmp_path / "step-00000010" / "model.safetensors").unlink()
    assert step_of_checkpoint(newest_checkpoint(tmp_path)) == 5
    assert newest_checkpoint(tmp_path / "nothing") is None


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
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.out.weight, model.table.weight)
    assert other.out.weight is other.table.weight
    assert other.count.item() == 5


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_weights(nn.Linear(3, 3), tmp_path / "w.safetensors")
    with pytest.raises(TrainingError, match="another architecture"):
        load_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")


def test_state_is_readable_json(trained: WorkFolder) -> None:
    state = json.loads((trained.checkpoint(20) / STATE_FILE).read_text())
    assert state["files"].keys() == {path.name for path in trained.checkpoint(20).iterdir()} - {STATE_FILE}
