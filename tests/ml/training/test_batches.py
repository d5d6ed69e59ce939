import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import TrainingError
from ml.training import batches as batches_module
from ml.training.batches import (
    Sampler,
    Shards,
    count_batches,
    epoch_batches,
    fixed_batches,
    num_batches,
    share_of_rank,
    stratified_sample,
)

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


def test_shares_are_consecutive_rows_of_each_rank() -> None:
    rows = np.array([7, 3, 9, 1])
    assert [share_of_rank(rows, rank, 3, [3, 0, 1])[0].tolist() for rank in range(3)] == [[7, 3, 9], [7], [1]]
    assert [share_of_rank(rows, rank, 3, [3, 0, 1])[1] for rank in range(3)] == [3, 0, 1]
    for wrong in ([3, 1], [2, 1, 0], [4, 1, 0]):
        with pytest.raises(ValueError, match="do not give 4 rows to 3 ranks"):
            share_of_rank(rows, 0, 3, wrong)


@pytest.mark.parametrize("max_tokens", [None, 640])
def test_validation_batches_hold_every_row_once(max_tokens: int | None) -> None:
    batches = fixed_batches(LENGTHS, 32, max_tokens)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert all(len(batch) <= 32 and len(batch) * LENGTHS[batch].max() <= (max_tokens or 10**9) for batch in batches)
    means = [LENGTHS[batch].mean() for batch in batches]
    assert means == sorted(means)


@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=200),
    batch_size=st.integers(1, 40),
    max_tokens=st.one_of(st.none(), st.integers(80, 900)),
    num_cuts=st.integers(0, 6),
    together=st.integers(1, 3),
    seed=st.integers(0, 5),
    in_shards=st.booleans(),
    data=st.data(),
)
def test_every_epoch_has_every_row_once_in_the_same_number_of_batches_within_the_budget(
    lengths: list[int],
    batch_size: int,
    max_tokens: int | None,
    num_cuts: int,
    together: int,
    seed: int,
    in_shards: bool,
    data: st.DataObject,
) -> None:
    size = len(lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=num_cuts, max_size=num_cuts)))
    shards = Shards(np.array([0, *cuts, size]), together) if in_shards else None
    rows = np.flatnonzero(np.random.default_rng(seed).random(size) < 0.8)
    rows = rows if len(rows) else np.array([0])
    array = np.array(lengths)
    count = count_batches(rows, array, batch_size, max_tokens)
    sampler = Sampler(rows, array, batch_size, seed, max_tokens, shards)
    assert sampler.steps_per_epoch == count
    for epoch in range(2):
        batches = epoch_batches(rows, array, batch_size, seed, epoch, max_tokens, shards)
        assert len(batches) == count
        assert np.array_equal(np.sort(np.concatenate(batches)), rows)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        if max_tokens is not None:
            assert all(len(batch) * array[batch].max() <= max_tokens for batch in batches)
        assert all(np.array_equal(sampler.rows(epoch * count + index), batch) for index, batch in enumerate(batches))


def test_a_budget_is_used_and_little_of_it_is_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 20_000), 3, 512).astype(np.int64)
    batches = epoch_batches(np.arange(20_000), lengths, 4096, 0, 0, max_tokens=16_384)
    padded = np.array([len(batch) * lengths[batch].max() for batch in batches])
    assert lengths.sum() / padded.sum() > 0.95
    assert np.median(padded) > 0.85 * 16_384
    order = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2, "batches must not come in order of length"


def test_a_row_beyond_the_budget_is_refused() -> None:
    lengths = np.array([10, 70, 20])
    for ask in (
        lambda: count_batches(np.arange(3), lengths, 4, 64),
        lambda: fixed_batches(lengths, 4, 64),
        lambda: epoch_batches(np.arange(3), lengths, 4, 0, 0, 64),
    ):
        with pytest.raises(TrainingError, match=r"a row has 70 tokens, more than a whole batch may have \(max_tokens_per_batch = 64\)"):
            ask()
    assert count_batches(np.array([0, 2]), lengths, 4, 64) == 1


def test_asking_ahead_and_again_makes_no_epoch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = batches_module._windows
    monkeypatch.setattr(batches_module, "_windows", lambda *arguments: made.append(arguments[4]) or original(*arguments))
    sampler = Sampler(np.arange(100), LENGTHS, 16, seed=5)
    for step in range(40):
        for ahead in range(step, step + 4):
            sampler.rows(ahead)
    assert made == list(range(7))


SHARDS = Shards(np.arange(0, 2001, 100), together=3)
SHARDED_LENGTHS = np.random.default_rng(4).integers(1, 100, 2000)


@pytest.mark.parametrize("max_tokens", [None, 1200])
def test_rows_of_shards_come_a_few_shards_at_a_time(max_tokens: int | None) -> None:
    """What a batch needs was said before it; and all that are needed at once are the window's and those of the one before it."""
    sampler = Sampler(np.arange(2000), SHARDED_LENGTHS, 16, 1, max_tokens, SHARDS)
    needed: list[set[int]] = []
    for step in range(2 * sampler.steps_per_epoch):
        shards = set((np.searchsorted(SHARDS.starts, sampler.rows(step), side="right") - 1).tolist())
        ahead = sampler.shards_ahead(step)
        assert len(ahead) == len(set(ahead)) <= 9
        assert shards <= set(ahead)
        needed.append(shards)
    epoch = needed[: sampler.steps_per_epoch]
    last_use = {shard: max(step for step, shards in enumerate(epoch) if shard in shards) for shard in range(20)}
    first_use = {shard: min(step for step, shards in enumerate(epoch) if shard in shards) for shard in range(20)}
    spans = [last_use[shard] - first_use[shard] for shard in range(20)]
    assert max(spans) < 0.45 * len(epoch)
    assert np.mean([len(shards) for shards in epoch]) > 2.5, "rows of a window's shards must be mixed"


def test_the_next_window_is_known_before_it_begins_also_across_epochs() -> None:
    sampler = Sampler(np.arange(2000), SHARDED_LENGTHS, 16, 1, None, SHARDS)
    for step in range(2 * sampler.steps_per_epoch - 1):
        now = sampler.shards_ahead(step)
        coming = set((np.searchsorted(SHARDS.starts, sampler.rows(step + 1), side="right") - 1).tolist())
        assert coming <= set(now)


@pytest.mark.parametrize("max_tokens", [None, 1200])
def test_a_sampler_of_shards_resumes_in_the_middle(max_tokens: int | None) -> None:
    in_order = Sampler(np.arange(2000), SHARDED_LENGTHS, 16, 1, max_tokens, SHARDS)
    rows = [in_order.rows(step) for step in range(2 * in_order.steps_per_epoch)]
    for step in (100, 3, 150, len(rows) - 1, 0):
        assert np.array_equal(Sampler(np.arange(2000), SHARDED_LENGTHS, 16, 1, max_tokens, SHARDS).rows(step), rows[step])
        assert np.array_equal(in_order.rows(step), rows[step])
    assert not np.array_equal(np.sort(rows[0]), np.sort(rows[in_order.steps_per_epoch]))


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
