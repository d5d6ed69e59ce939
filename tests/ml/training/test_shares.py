"""Shares follow length and speed, add up, and change nothing but the time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ml.training.batches import epoch_batches, share_of_rank
from ml.training.job import load_job
from ml.training.ranks import RankGroup
from ml.training.shares import ShareBalancer, deal_rows, largest_remainder, padded_tokens
from ml.training.stepping import Stepper
from tests.ml.training.share_ranks import Gradients, fractions_while_training, gradients_in_ranks, gradients_of, toy_spec

# Like reviews: most are short, some are ten times as long.
LENGTHS = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 6000), 3, 512).astype(np.int64)


def work_of_ranks(rows: np.ndarray, counts: list[int], lengths: np.ndarray = LENGTHS) -> np.ndarray:
    shares = [share_of_rank(rows, rank, len(counts), counts) for rank in range(len(counts))]
    return np.array([padded_tokens(share[:counting], lengths) for share, counting in shares])


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_dealing_gives_each_row_to_one_rank(lengths: list[int], num_ranks: int, data: st.DataObject) -> None:
    weights = np.array(data.draw(st.lists(st.integers(0, 9), min_size=num_ranks, max_size=num_ranks)), dtype=float) + 0.01
    rows = np.random.default_rng(0).permutation(len(lengths))
    dealt, counts = deal_rows(rows, np.array(lengths), num_ranks, weights / weights.sum())
    assert sorted(dealt.tolist()) == list(range(len(lengths)))
    counting = [share_of_rank(dealt, rank, num_ranks, counts) for rank in range(num_ranks)]
    assert sorted(np.concatenate([share[:number] for share, number in counting]).tolist()) == list(range(len(lengths)))
    assert all(len(share) >= 1 for share, _ in counting)


def test_rows_of_one_length_are_dealt_out_evenly_or_by_fraction() -> None:
    same = np.full(64, 100)
    assert deal_rows(np.arange(64), same, 4)[1] == [16] * 4
    assert sorted(deal_rows(np.arange(63), same, 4)[1]) == [15, 16, 16, 16]
    assert deal_rows(np.arange(64), same, 2, np.array([0.75, 0.25]))[1] == [48, 16]
    assert deal_rows(np.arange(60), same, 3, np.array([0.5, 1 / 3, 1 / 6]))[1] == [30, 20, 10]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_have_like_work_on_skewed_lengths_and_the_slowest_much_less_than_with_every_nth_row(num_ranks: int) -> None:
    random = np.random.default_rng(1)
    excess, ours, every_nth = [], 0, 0
    for rows in np.array_split(random.permutation(len(LENGTHS)), len(LENGTHS) // (32 * num_ranks)):
        work = work_of_ranks(*deal_rows(rows, LENGTHS, num_ranks))
        excess.append(work.max() / work.mean() - 1)
        ours += work.max()
        every_nth += max(padded_tokens(rows[rank::num_ranks], LENGTHS) for rank in range(num_ranks))
    assert np.mean(excess) < 0.05
    assert ours < 0.6 * every_nth


def test_ranks_have_like_work_on_bucketed_batches() -> None:
    for max_tokens in (None, 8192):
        ours = every_nth = 0
        for rows in epoch_batches(np.arange(6000), LENGTHS, 64, 0, 0, max_tokens):
            work = work_of_ranks(*deal_rows(rows, LENGTHS, 2))
            # A row more or less is what cannot be avoided.
            assert work.max() - work.min() <= 2 * LENGTHS[rows].max()
            ours += work.max()
            every_nth += max(padded_tokens(rows[rank::2], LENGTHS) for rank in range(2))
        assert ours <= every_nth


def test_each_ranks_rows_over_an_epoch_represent_the_whole() -> None:
    """Classes go with length here, the worst case; chi-square over 2 ranks and 4 classes, 3 degrees of freedom."""
    random = np.random.default_rng(3)
    classes = np.clip(np.digitize(LENGTHS, [50, 90, 160]) + random.integers(-1, 2, len(LENGTHS)), 0, 3)
    for max_tokens in (None, 6000):
        seen = np.zeros((2, 4))
        tokens = np.zeros(2)
        for rows in epoch_batches(np.arange(6000), LENGTHS, 64, 0, 0, max_tokens):
            dealt, counts = deal_rows(rows, LENGTHS, 2)
            for rank in range(2):
                share, counting = share_of_rank(dealt, rank, 2, counts)
                seen[rank] += np.bincount(classes[share[:counting]], minlength=4)
                tokens[rank] += LENGTHS[share[:counting]].sum()
        assert seen.sum() == 6000
        expected = seen.sum(1, keepdims=True) * seen.sum(0, keepdims=True) / seen.sum()
        chi_square = float(((seen - expected) ** 2 / expected).sum())
        # 0.999 quantile; rows of a batch share their length, so a rank's are not drawn one by one: twice that.
        assert chi_square < 2 * 16.27
        assert tokens.max() / tokens.min() < 1.05


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.integers(0, 500))
def test_whole_numbers_add_up_and_are_near(weights: list[float], num_rows: int) -> None:
    fractions = np.array(weights) / sum(weights)
    counts = largest_remainder(fractions, num_rows)
    assert sum(counts) == num_rows
    assert np.abs(np.array(counts) - fractions * num_rows).max() < 1 + 1e-6


def simulate(balancer: ShareBalancer, speeds: list[float], num_steps: int, noise: float, seed: int = 0) -> int:
    """How often the fractions changed."""
    random = np.random.default_rng(seed)
    changes = 0
    for _ in range(num_steps):
        tokens = balancer.fractions * 1000
        changes += balancer.observe(tokens, tokens / speeds * random.normal(1, noise, len(speeds)))
    return changes


def test_shares_settle_at_two_to_one_for_a_rank_that_is_half_as_fast() -> None:
    balancer = ShareBalancer(2)
    changes = simulate(balancer, [1000, 500], 200, noise=0.05)
    assert balancer.fractions == pytest.approx([2 / 3, 1 / 3], abs=0.03)
    assert balancer.shares(90) == pytest.approx([60, 30], abs=3)
    assert changes <= 5
    simulate(balancer, [1000, 1000], 100, noise=0.05)
    assert balancer.fractions == pytest.approx([0.5, 0.5], abs=0.03), "and back when it has recovered"


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_alike_ranks_keep_their_shares_through_noise(num_ranks: int) -> None:
    balancer = ShareBalancer(num_ranks)
    assert simulate(balancer, [1000] * num_ranks, 500, noise=0.05) <= 5
    assert balancer.fractions == pytest.approx(np.full(num_ranks, 1 / num_ranks), rel=0.06)


def test_shares_are_bounded_and_one_hiccup_changes_little() -> None:
    balancer = ShareBalancer(4, smallest=0.5, largest=1.5)
    simulate(balancer, [1000, 1000, 1000, 1], 50, noise=0)
    assert balancer.fractions == pytest.approx([7 / 24, 7 / 24, 7 / 24, 1 / 8])
    simulate(balancer, [1e6, 1, 1, 1], 400, noise=0)
    assert balancer.fractions.max() == pytest.approx(1.5 / 4)
    balancer = ShareBalancer(2)
    simulate(balancer, [1000, 1000], 50, noise=0)
    balancer.observe([500, 500], [0.5, 50])
    assert balancer.fractions == pytest.approx([0.5, 0.5], abs=0.04)


def test_a_rank_without_rows_or_measure_is_left_as_it_was() -> None:
    balancer = ShareBalancer(2)
    simulate(balancer, [1000, 500], 50, noise=0)
    before = balancer.fractions
    for tokens, seconds in (([700, 0], [0.7, 0]), ([700, 300], [0.7, float("nan")]), ([0, 0], [0, 0])):
        balancer.observe(tokens, seconds)
    assert balancer.fractions == pytest.approx(before)


def test_state_goes_on_where_it_stood() -> None:
    balancer, other = ShareBalancer(2), ShareBalancer(2)
    simulate(balancer, [1000, 700], 7, noise=0.1)
    other.restore(balancer.state())
    simulate(balancer, [1000, 700], 7, noise=0.1, seed=1)
    simulate(other, [1000, 700], 7, noise=0.1, seed=1)
    assert other.state() == balancer.state()
    three = ShareBalancer(3)
    three.restore(balancer.state())
    assert three.fractions.tolist() == [1 / 3] * 3


def relative_difference(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    off = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (off / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


def test_the_gradient_of_unequal_shares_is_that_of_one_rank(tmp_path: Path) -> None:
    rows = np.random.default_rng(5).choice(203, 41, replace=False)
    fractions = [[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [0.9, 0.1], [0.999, 0.001]]
    found_in_ranks = gradients_in_ranks(tmp_path / "ranks", rows, fractions)
    for double, bound in ((False, 1e-6), (True, 1e-13)):
        spec = toy_spec(tmp_path, 1, double)
        loss, expected = gradients_of(Stepper(spec, load_job(spec), RankGroup()), rows, None)
        for (found_loss, found), given_fractions in zip(found_in_ranks[double], fractions, strict=True):
            assert found_loss == pytest.approx(loss, rel=bound), given_fractions
            assert relative_difference(found, expected) < bound, given_fractions
        assert relative_difference({name: 1.01 * tensor for name, tensor in expected.items()}, expected) > 1e-3
        assert all(torch.isfinite(tensor).all() for tensor in expected.values())


def test_ranks_agree_on_fractions_that_follow_their_speed(tmp_path: Path) -> None:
    first, second = fractions_while_training(tmp_path / "ranks", 25)
    assert first == second
    assert first[0] == [0.5, 0.5]
    assert first[-1] == pytest.approx([2 / 3, 1 / 3], abs=0.05)
