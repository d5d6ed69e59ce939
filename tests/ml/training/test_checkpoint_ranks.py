"""Any number of ranks reads what any other number wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ml.errors import TrainingError
from ml.training.checkpoint import load_checkpoint
from ml.training.checkpoint_folders import find_damage
from ml.training.checkpoint_storage import read_index
from ml.training.folders import WorkFolder
from ml.training.ranks import RankGroup
from tests.ml.training.checkpoint_cases import SEED, Trained, in_two, run_scenario, split_in_four, work_folder


class Losses:
    def __init__(self, folder: Path):
        self.folder = folder
        single = Trained(RankGroup(), split=False)
        single.step(3)
        single.save(work_folder(folder / "single"), 3)
        self.expected = single.step(3)
        self.four: dict[str, Any] = run_scenario(split_in_four, 4, folder)
        self.two: dict[str, Any] = run_scenario(in_two, 2, folder)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return Losses(tmp_path_factory.mktemp("ranks"))


def test_two_ranks_go_on_from_four_and_split_anew(losses: Losses) -> None:
    assert losses.four["next"] == pytest.approx(losses.expected, abs=1e-6)
    assert losses.two["from four"] == pytest.approx(losses.four["next"], abs=1e-6)


def test_two_ranks_go_on_from_one(losses: Losses) -> None:
    assert losses.two["from one"] == pytest.approx(losses.expected, abs=1e-6)


@pytest.mark.parametrize("written_by", ["split", "pair"])
def test_one_rank_goes_on_from_several(losses: Losses, written_by: str) -> None:
    single = Trained(RankGroup(), split=False, seed=77)
    single.load(WorkFolder(losses.folder / written_by), 3)
    assert single.step(3) == pytest.approx(losses.expected, abs=1e-6)


def test_ranks_write_their_shares_while_the_training_goes_on(losses: Losses) -> None:
    assert losses.two["background"] == [False, True], "the first save tells each rank its share"
    assert 0.3 < losses.two["copied share"] < 0.7
    single = Trained(RankGroup(), split=False, seed=77)
    single.load(WorkFolder(losses.folder / "moving"), 8)
    assert single.step(3) == pytest.approx(losses.two["from moving"], abs=1e-6)


def test_nothing_is_written_twice(losses: Losses) -> None:
    pair = WorkFolder(losses.folder / "pair").checkpoint(3)
    index = read_index(pair)
    assert all(len(stored.pieces) == 1 for stored in index.values())
    assert {file for stored in index.values() for file, _, _ in stored.pieces} == {"rank-00000.safetensors", "rank-00001.safetensors"}
    split = read_index(WorkFolder(losses.folder / "split").checkpoint(3))
    assert len(split["model/0.weight"].pieces) == 4
    assert len(split["optimizer/3.bias/exp_avg"].pieces) == 3, "3 rows lie in 3 of 4 ranks"
    assert {f"random/{rank}/cpu" for rank in range(4)} <= split.keys()


def test_tensors_of_single_ranks_are_all_there(losses: Losses) -> None:
    work = WorkFolder(losses.folder / "stages")
    tensors = {"model/stage-0": torch.ones(3), "model/stage-1": torch.zeros(3), "model/shared": torch.zeros(4, dtype=torch.int64)}
    load_checkpoint(work.checkpoint(3), tensors, RankGroup(), work=work, seed=SEED)
    assert [tensor.tolist() for tensor in tensors.values()] == [[0.0] * 3, [1.0] * 3, [0, 1, 2, 3]]
    del tensors["model/stage-1"]
    with pytest.raises(TrainingError, match="model/stage-1 is stored, here there is none"):
        load_checkpoint(work.checkpoint(3), tensors, RankGroup(), work=work, seed=SEED)


def test_a_rank_that_cannot_write_is_known_to_all(losses: Losses) -> None:
    assert "rank 1: OSError: [Errno 28] No space left on device" in losses.two["message"]
    assert losses.two["ranks that know"] == 2
    assert losses.two["left"] == ["step-00000001"]
    assert losses.two["in the end"] == ["step-00000001", "step-00000003"], "the next one works again"
    assert find_damage(WorkFolder(losses.folder / "stages").checkpoint(3)) is None
