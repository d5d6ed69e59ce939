"""Every strategy takes the same steps as one process."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ml.training.ranks import RankGroup
from ml.training.spec import GradientSync
from tests.ml.training.strategies.cases import STEPS, Case, Ran, read_case, run_case
from tests.ml.training.strategies.conftest import Texts
from tests.ml.training.strategies.grid import IN_FOUR, IN_TWO, TEXT
from tests.ml.training.strategies.in_ranks import STRATEGIES, started, step


@pytest.mark.parametrize("case", IN_TWO, ids=lambda case: case.name)
def test_two_ranks_take_the_steps_of_one(case: Case, ran: dict[int, Path], texts: Texts) -> None:
    check_same(texts.complete(case), ran[2])


@pytest.mark.parametrize("case", IN_FOUR, ids=lambda case: case.name)
def test_four_ranks_take_the_steps_of_one(case: Case, ran: dict[int, Path], texts: Texts) -> None:
    check_same(texts.complete(case), ran[4])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_rank_takes_a_step_that_is_not_finite(num_ranks: int, ran: dict[int, Path], tmp_path: Path) -> None:
    expected = step(*started("ddp", tmp_path, RankGroup()), 1)
    found = json.loads((ran[num_ranks] / f"poisoned-{num_ranks}.json").read_text())
    assert len(found) == len(STRATEGIES[num_ranks])
    for all_agree, unchanged, next_loss in found:
        assert all_agree
        assert unchanged
        assert next_loss == pytest.approx(expected, rel=1e-10)


def test_strategies_compute_in_bf16(ran: dict[int, Path], tmp_path: Path) -> None:
    stepper, optimizer = started("ddp", tmp_path, RankGroup(), double=False)
    expected = [stepper.train_step(rows, optimizer, "bf16", 1e-2).loss for rows in STEPS]
    for losses in json.loads((ran[2] / "bf16-2.json").read_text()):
        assert losses == pytest.approx(expected, rel=2e-2)


def test_ranks_with_the_same_rows_drop_the_same_values(ran: dict[int, Path]) -> None:
    found = json.loads((ran[2] / "dropout.json").read_text())
    assert found["same"] == [True, True]
    assert found["differ"]
    assert np.isfinite(found["losses"]).all()


def test_a_job_that_builds_unlike_models_is_refused(ran: dict[int, Path]) -> None:
    for rank in range(2):
        assert "different models in different ranks" in (ran[2] / f"unlike-{rank}.txt").read_text()


def test_auto_is_decided_alike_in_all_ranks_and_can_be_kept(ran: dict[int, Path]) -> None:
    large, small = json.loads((ran[2] / "chosen.json").read_text())
    assert large[0] == "ddp"
    assert "2 copies" in large[1]
    assert small[0] == "fsdp"
    assert "ddp (2 copies) would need" in small[1]
    assert large[2:] == small[2:] == [True, ""]


def check_same(case: Case, folder: Path) -> None:
    found = read_case(folder, case.name)
    # Neither accumulation nor unequal shares change what one process computes.
    expected = run_case(replace(case, strategy="ddp", sync=GradientSync(), shares={}), folder, RankGroup())
    exact = bool(case.arguments.get("double"))
    assert loss_difference(expected, found) <= (1e-10 if exact else 1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-10 if exact else 1e-5)
    assert [rest for _, *rest in found.validations] == [rest for _, *rest in expected.validations]
    # A key's bias in BERT starts at zero and has no gradient but rounding: there is nothing to be relative to.
    floor = 0.02 if case.job == TEXT else 0.0
    assert weight_difference(expected, found, floor) <= (1e-10 if exact else 1e-5)


def loss_difference(a: Ran, b: Ran) -> float:
    losses_a, losses_b = ([*ran.losses, *(found[0] for found in ran.validations)] for ran in (a, b))
    return max(abs(x - y) for x, y in zip(losses_a, losses_b, strict=True))


def weight_difference(a: Ran, b: Ran, floor: float) -> float:
    """Largest difference of any weight, relative to the largest weight of its tensor, or to `floor` where all are smaller."""
    assert a.weights.keys() == b.weights.keys()
    return max(float((tensor - b.weights[name]).abs().max()) / max(float(tensor.abs().max()), floor) for name, tensor in a.weights.items())
