"""What one layout wrote, any other reads: the next steps are those of a training that was never interrupted."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ml.errors import TrainingError
from ml.training.ranks import RankGroup
from tests.ml.training.strategies.in_ranks import CHAINS, STRATEGIES, started, step

NUM_RANKS = pytest.mark.parametrize("num_ranks", [2, 4])


@NUM_RANKS
def test_a_checkpoint_moves_between_layouts(num_ranks: int, ran: dict[int, Path], tmp_path: Path) -> None:
    chain = CHAINS[num_ranks]
    stepper, optimizer = started("ddp", tmp_path, RankGroup())
    expected = [step(stepper, optimizer, index) for index in range(len(chain) + 1)]
    found = json.loads((ran[num_ranks] / f"losses-{num_ranks}.json").read_text())
    # And in the end by one process.
    stepper, optimizer = started("ddp", tmp_path, RankGroup())
    dcp.load(stepper.state_tensors(optimizer), checkpoint_id=ran[num_ranks] / f"of-{num_ranks}-{len(chain)}")
    found.append(step(stepper, optimizer, len(chain)))
    assert found == pytest.approx(expected, rel=1e-10)


@NUM_RANKS
def test_whole_tensors_are_taken_by_any_layout(num_ranks: int, ran: dict[int, Path], tmp_path: Path) -> None:
    stepper, optimizer = started("ddp", tmp_path, RankGroup())
    expected = [step(stepper, optimizer, index) for index in range(3)][-1]
    losses, weights_kept = json.loads((ran[num_ranks] / f"whole-{num_ranks}.json").read_text())
    assert losses == pytest.approx([expected] * len(STRATEGIES[num_ranks]), rel=1e-10)
    assert weights_kept == [True] * len(STRATEGIES[num_ranks])


def test_a_state_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    (untouched, first), (asked, second) = started("ddp", tmp_path, RankGroup()), started("ddp", tmp_path, RankGroup())
    state = asked.state_tensors(second)
    assert {name.split("/")[-1] for name in state if name.startswith("optimizer/")} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(not tensor.any() for name, tensor in state.items() if name.startswith("optimizer/"))
    for index in range(3):
        assert step(untouched, first, index) == step(asked, second, index)
    assert all(torch.equal(tensor, asked.weights()[name]) for name, tensor in untouched.weights().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    stepper, optimizer = started("ddp", tmp_path, RankGroup())
    weights = stepper.weights()
    weights["norm.weight"] = torch.ones(3)
    with pytest.raises(TrainingError, match=r"another model.*norm\.weight"):
        stepper.load_weights(weights)
    state = stepper.state_tensors(optimizer)
    with pytest.raises(TrainingError, match=r"1 tensors differ, first 'optimizer/norm\.weight/exp_avg'"):
        stepper.restore(optimizer, {name: tensor for name, tensor in state.items() if name != "optimizer/norm.weight/exp_avg"})
