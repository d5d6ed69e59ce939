import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.training.batches import Sampler, epoch_batches, fixed_batches, num_batches, share_of_rank, stratified_sample

LENGTHS = np.random.default_rng(0).integers(1, 100, 1000)


@given(num_rows=st.integers(1, 300), batch_size=st.integers(1, 40), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_once(num_rows: int, batch_size: int, epoch: int) -> None:
    batches = epoch_batches(np.arange(num_rows), LENGTHS, batch_size, seed=3, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(num_rows))
    assert len(batches) == num_batches(num_rows, batch_size)
    assert sorted(len(batch) for batch in batches)[1:] == [batch_size] * (len(batches) - 1)


def test_batches_follow_from_seed_and_epoch_alone() -> None:
    rows = np.arange(500)
    first = epoch_batches(rows, LENGTHS, 32, seed=1, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, epoch_batches(rows, LENGTHS, 32, seed=1, epoch=0), strict=True))
    assert not np.array_equal(first[0], epoch_batches(rows, LENGTHS, 32, seed=1, epoch=1)[0])
    assert not np.array_equal(first[0], epoch_batches(rows, LENGTHS, 32, seed=2, epoch=0)[0])


def test_rows_of_like_length_are_batched_together() -> None:
    batches = epoch_batches(np.arange(1000), LENGTHS, 20, seed=0, epoch=0)
    spread = np.mean([LENGTHS[batch].max() - LENGTHS[batch].min() for batch in batches])
    assert spread < 5
    means = [LENGTHS[batch].mean() for batch in batches]
    assert means != sorted(means), "batches must not come in order of length"


def test_sampler_gives_the_same_rows_for_a_step_whatever_was_asked_before() -> None:
    in_order = Sampler(np.arange(101), LENGTHS, 16, seed=5)
    rows = [in_order.rows(step) for step in range(21)]
    resumed = Sampler(np.arange(101), LENGTHS, 16, seed=5)
    assert all(np.array_equal(resumed.rows(step), rows[step]) for step in (13, 20, 2))


@given(num_rows=st.integers(1, 50), num_ranks=st.integers(1, 8))
def test_ranks_share_a_batch_out_completely(num_rows: int, num_ranks: int) -> None:
    rows = np.arange(100, 100 + num_rows)
    counting = []
    for rank in range(num_ranks):
        share, num_counting = share_of_rank(rows, rank, num_ranks)
        assert len(share) >= 1
        counting += share[:num_counting].tolist()
    assert sorted(counting) == rows.tolist()


def test_validation_batches_hold_every_row_once() -> None:
    assert sorted(np.concatenate(fixed_batches(LENGTHS, 32))) == list(range(1000))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.data())
def test_a_sample_keeps_the_shares_of_the_strata(strata: list[int], data: st.DataObject) -> None:
    values = np.array(strata)
    size = data.draw(st.integers(1, len(strata)))
    sample = stratified_sample(values, size, seed=0)
    assert len(sample) == size == len(set(sample.tolist()))
    for value in set(strata):
        ideal = size * (values == value).mean()
        found = (values[sample] == value).sum()
        if size >= len(set(strata)):
            assert found >= 1
        assert found == pytest.approx(ideal, abs=len(set(strata)))


def test_a_sample_is_exact_where_it_can_be() -> None:
    strata = np.array([0] * 600 + [1] * 300 + [2] * 100)
    assert np.bincount(strata[stratified_sample(strata, 100, seed=1)]).tolist() == [60, 30, 10]
