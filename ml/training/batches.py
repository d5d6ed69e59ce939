"""Which rows make up which step: the same for any number of ranks.

A step's global batch is a fixed list of rows, a function of seed, epoch and sizes alone; ranks only share it out (`shares`).
Every epoch has every row once and the same number of steps.

With a token budget, rows are first put into buckets by how many rows of their length fit into it. A bucket's batches all
have that many rows, so the number of batches follows from the lengths and not from the shuffling. What is left of a bucket
goes on to the next one, whose rows are longer. So at most one batch of an epoch is uneven.

Rows that come in shards are read a few shards at a time: a window. An epoch is all windows, in random order of shards; rows
are shuffled within a window, and what is left of one begins the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ml.errors import TrainingError

# Rows are sorted by length within this many batches at a time: enough to make padding rare, few enough to stay random.
BATCHES_SORTED_TOGETHER = 50
# Rows a batch, in steps of an eighth: 1, 2, ... 8, 9, 10, 11, 12, 13, 14, 15, 17, 19 ...; costs 6 % of the budget on average.
BUCKET_STEP = 1.125
# Remembered by a sampler: more than anybody makes ready ahead.
RECENT_STEPS = 64


@dataclass(frozen=True)
class Shards:
    """Where rows lie, for an order that reads few shards at a time.

    Args:
        starts: (S + 1,) int64, rising: shard s holds rows starts[s] to starts[s + 1] - 1.
        together: shards in a window.
    """

    starts: np.ndarray
    together: int


@dataclass(frozen=True)
class _Window:
    """The batches of one window.

    Args:
        shards: indices of its shards; empty when rows do not come in shards.
        num_mixed: so many of the first batches also hold rows of earlier windows.
    """

    batches: list[np.ndarray]
    shards: tuple[int, ...] = ()
    num_mixed: int = 0


def num_batches(num_rows: int, batch_size: int) -> int:
    """Without a token budget; `count_batches` otherwise."""
    return -(-num_rows // batch_size)


def count_batches(rows: np.ndarray, lengths: np.ndarray, batch_size: int, max_tokens: int | None = None) -> int:
    """Number of batches of every epoch.

    Raises:
        TrainingError: a row is longer than the budget.
    """
    if max_tokens is None:
        return num_batches(len(rows), batch_size)
    sizes, bucket_of_row = _buckets(lengths[rows], batch_size, max_tokens)
    count = left = 0
    for size, num_rows in zip(sizes, np.bincount(bucket_of_row, minlength=len(sizes)), strict=True):
        full, left = divmod(int(num_rows) + left, size)
        count += full
    return count + (left > 0)


def epoch_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    batch_size: int,
    seed: int,
    epoch: int,
    max_tokens: int | None = None,
    shards: Shards | None = None,
) -> list[np.ndarray]:
    """Every row once, in batches of rows of like length, in random order. The one uneven batch may be anywhere.

    Args:
        rows: (N,) row indices to train on.
        lengths: length of every row of the split, indexed by row.
        batch_size: rows of a global batch, at most.
        max_tokens: of a global batch, padding included: rows times the longest.

    Raises:
        TrainingError: a row is longer than `max_tokens`.
    """
    windows = _windows(rows, lengths, batch_size, seed, epoch, max_tokens, shards)
    return [batch for window in windows for batch in window.batches]


def fixed_batches(lengths: np.ndarray, batch_size: int, max_tokens: int | None = None) -> list[np.ndarray]:
    """All rows in order of length, for validation.

    Raises:
        TrainingError: a row is longer than `max_tokens`.
    """
    order = np.argsort(lengths, kind="stable")
    if max_tokens is None:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    fitting = _rows_that_fit(lengths[order], batch_size, max_tokens)
    batches = []
    # From the long end, where the longest row of a batch is the one it begins with.
    end = len(order)
    while end > 0:
        start = max(end - int(fitting[end - 1]), 0)
        batches.append(order[start:end])
        end = start
    return batches[::-1]


def share_of_rank(rows: np.ndarray, rank: int, num_ranks: int, shares: list[int] | None = None) -> tuple[np.ndarray, int]:
    """A rank's rows of a global batch, and how many of them count.

    Every num_ranks-th row, so that ranks get like lengths; with `shares`, as many as these say, one rank's after the other's
    (`ml.training.shares.deal_rows` puts them in that order). A rank for which nothing is left takes one row that counts
    nothing, for all ranks must take part in every step.

    Args:
        shares: rows of each rank; they add up to `len(rows)`.
    """
    if shares is None:
        share = rows[rank::num_ranks]
    else:
        if len(shares) != num_ranks or sum(shares) != len(rows):
            raise ValueError(f"shares {shares} do not give {len(rows)} rows to {num_ranks} ranks")
        start = sum(shares[:rank])
        share = rows[start : start + shares[rank]]
    return (share, len(share)) if len(share) else (rows[:1], 0)


def stratified_sample(strata: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """`num_rows` row indices, sorted, with the shares of the strata kept (largest remainder), at least one of each that fits."""
    if num_rows >= len(strata):
        return np.arange(len(strata))
    random = np.random.default_rng([seed, 0x5A])
    values, counts = np.unique(strata, return_counts=True)
    ideal = counts * num_rows / len(strata)
    quotas = np.maximum(np.floor(ideal).astype(int), 1 if num_rows >= len(values) else 0)
    while quotas.sum() > num_rows:
        quotas[np.argmax(quotas)] -= 1
    for index in np.argsort(quotas - ideal, kind="stable"):
        if quotas.sum() == num_rows:
            break
        quotas[index] += 1
    chosen = [
        random.choice(np.flatnonzero(strata == value), size=quota, replace=False) for value, quota in zip(values, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


class Sampler:
    """The rows of any step, by its number: resuming needs no state but the step.

    Keeps one window of batches. A step before it, or in a later epoch, costs making the windows of that epoch up to it.

    Raises:
        TrainingError: a row is longer than `max_tokens`.
    """

    def __init__(
        self,
        rows: np.ndarray,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        max_tokens: int | None = None,
        shards: Shards | None = None,
    ):
        self._rows = rows
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._max_tokens = max_tokens
        self._shards = shards
        self.steps_per_epoch = count_batches(rows, lengths, batch_size, max_tokens)
        self._epoch = -1
        self._windows: Iterator[_Window] = iter(())
        self._previous = self._window = _Window([])
        self._next: _Window | None = None
        self._first_step = 0
        self._recent: dict[int, tuple[np.ndarray, list[int]]] = {}

    def rows(self, step: int) -> np.ndarray:
        """Rows of the global batch of a step, counted from 0."""
        return self._step(step)[0]

    def shards_ahead(self, step: int) -> list[int]:
        """Shards whose rows this step and those after it need, the soonest needed first, up to the end of the next window."""
        return self._step(step)[1]

    def _step(self, step: int) -> tuple[np.ndarray, list[int]]:
        # Who makes batches ready ahead asks for a step twice, and the second time the window may be another one.
        if step not in self._recent:
            index = self._find(step)
            if len(self._recent) >= RECENT_STEPS:
                del self._recent[next(iter(self._recent))]
            self._recent[step] = (self._window.batches[index], self._shards_from(index))
        return self._recent[step]

    def _shards_from(self, index: int) -> list[int]:
        ahead = [*(self._previous.shards if index < self._window.num_mixed else ()), *self._window.shards]
        coming = self._next.shards if self._next else self._first_shards_of_epoch(self._epoch + 1)
        return ahead + [shard for shard in coming if shard not in ahead]

    def _find(self, step: int) -> int:
        """Make the step's window the current one; the step's index in it."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch or index < self._first_step:
            self._epoch, self._first_step = epoch, 0
            self._windows = _windows(self._rows, self._lengths, self._batch_size, self._seed, epoch, self._max_tokens, self._shards)
            self._previous, self._window, self._next = _Window([]), next(self._windows), next(self._windows, None)
        while index >= self._first_step + len(self._window.batches) and self._next is not None:
            self._first_step += len(self._window.batches)
            self._previous, self._window, self._next = self._window, self._next, next(self._windows, None)
        return index - self._first_step

    def _first_shards_of_epoch(self, epoch: int) -> tuple[int, ...]:
        return next(iter(_shard_windows(self._shards, _random(self._seed, epoch)))) if self._shards else ()


def _random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


def _shard_windows(shards: Shards, random: np.random.Generator) -> list[tuple[int, ...]]:
    order = random.permutation(len(shards.starts) - 1).tolist()
    return [tuple(order[i : i + shards.together]) for i in range(0, len(order), shards.together)]


def _windows(
    rows: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int, max_tokens: int | None, shards: Shards | None
) -> Iterator[_Window]:
    """The windows of an epoch, one after the other."""
    random = _random(seed, epoch)
    groups: list[tuple[int, ...]] = _shard_windows(shards, random) if shards else [()]
    every_size, _ = _buckets(lengths[rows], batch_size, max_tokens)
    left: list[np.ndarray] = [rows[:0] for _ in every_size]
    is_used = None
    if shards is not None:
        is_used = np.zeros(int(shards.starts[-1]), dtype=bool)
        is_used[rows] = True
    for number, group in enumerate(groups):
        if shards is None or is_used is None:
            inside = rows
        else:
            inside = np.concatenate([np.arange(shards.starts[shard], shards.starts[shard + 1]) for shard in group])
            inside = inside[is_used[inside]]
        is_last = number == len(groups) - 1
        batches: list[np.ndarray] = []
        _, bucket_of_row = _buckets(lengths[inside], batch_size, max_tokens, every_size)
        for bucket, size in enumerate(every_size):
            pool = random.permutation(inside[bucket_of_row == bucket])
            num_old = len(left[bucket])
            pool = np.concatenate([left[bucket], pool]) if num_old else pool
            is_end = is_last and bucket == len(every_size) - 1
            num_full = len(pool) if is_end else len(pool) // size * size
            # What was left goes into as few batches as it takes, so that shards of an earlier window are done with soon.
            num_mixed = min(-(-num_old // size) * size, num_full)
            batches += _cut(pool[:num_mixed], lengths, size) + _cut(pool[num_mixed:num_full], lengths, size)
            remaining = pool[num_full:]
            left[bucket] = remaining
            if is_last and not is_end:
                left[bucket + 1] = np.concatenate([remaining, left[bucket + 1]])
        batches = [batches[i] for i in random.permutation(len(batches))]
        mixed = [_has_row_outside(batch, shards, group) for batch in batches] if shards else [False] * len(batches)
        # Python's sort is stable: both kinds stay in random order.
        in_order = sorted(range(len(batches)), key=lambda i, mixed=mixed: not mixed[i])
        yield _Window([batches[i] for i in in_order], group, sum(mixed))


def _has_row_outside(batch: np.ndarray, shards: Shards, group: tuple[int, ...]) -> bool:
    return not np.isin(np.searchsorted(shards.starts, batch, side="right") - 1, group).all()


def _cut(rows: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Shuffled rows into batches, sorted by length some batches at a time."""
    batches: list[np.ndarray] = []
    for start in range(0, len(rows), size * BATCHES_SORTED_TOGETHER):
        together = rows[start : start + size * BATCHES_SORTED_TOGETHER]
        together = together[np.argsort(lengths[together], kind="stable")]
        batches += [together[i : i + size] for i in range(0, len(together), size)]
    return batches


def _rows_that_fit(lengths: np.ndarray, batch_size: int, max_tokens: int) -> np.ndarray:
    """(N,) how many rows as long as each fit into a batch.

    Raises:
        TrainingError: not even one does.
    """
    if len(lengths) and int(lengths.max()) > max_tokens:
        raise TrainingError(
            f"a row has {int(lengths.max())} tokens, more than a whole batch may have (max_tokens_per_batch = {max_tokens}); "
            "raise train.max_tokens_per_batch, or shorten the rows"
        )
    return np.minimum(max_tokens // np.maximum(lengths, 1), batch_size)


def _buckets(lengths: np.ndarray, batch_size: int, max_tokens: int | None, sizes: list[int] | None = None) -> tuple[list[int], np.ndarray]:
    """Rows a batch of each bucket, falling (longer rows come later), and the bucket of each row.

    Args:
        sizes: of buckets that were made for all rows.
    """
    if max_tokens is None:
        return [batch_size], np.zeros(len(lengths), dtype=np.int64)
    fitting = _rows_that_fit(lengths, batch_size, max_tokens)
    if sizes is None:
        grid = [1]
        while grid[-1] < batch_size:
            grid.append(min(max(grid[-1] + 1, int(grid[-1] * BUCKET_STEP)), batch_size))
        used = np.unique(np.searchsorted(grid, fitting, side="right") - 1)
        sizes = [grid[i] for i in used[::-1]] or [batch_size]
    rising = np.array(sizes[::-1])
    return sizes, len(sizes) - np.searchsorted(rising, fitting, side="right")
