"""Which rows make up which step: the same for any number of ranks.

A step's global batch is a fixed list of rows, a function of seed, epoch and batch size alone; ranks only share it out.
"""

import numpy as np

# Rows are sorted by length within this many batches at a time: enough to make padding rare, few enough to stay random.
BATCHES_SORTED_TOGETHER = 50


def num_batches(num_rows: int, batch_size: int) -> int:
    return -(-num_rows // batch_size)


def epoch_batches(rows: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Every row once, in batches of rows of like length, in random order. The one uneven batch may be anywhere.

    Args:
        rows: (N,) row indices to train on.
        lengths: length of every row of the split, indexed by row.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(rows)
    batches: list[np.ndarray] = []
    for start in range(0, len(shuffled), batch_size * BATCHES_SORTED_TOGETHER):
        together = shuffled[start : start + batch_size * BATCHES_SORTED_TOGETHER]
        together = together[np.argsort(lengths[together], kind="stable")]
        batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def fixed_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All rows in order of length, for validation."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def share_of_rank(rows: np.ndarray, rank: int, num_ranks: int) -> tuple[np.ndarray, int]:
    """A rank's rows of a global batch, and how many of them count.

    Every num_ranks-th row, so that ranks get like lengths. A rank for which nothing is left takes one row that
    counts nothing, for all ranks must take part in every step.
    """
    share = rows[rank::num_ranks]
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
    """The rows of any step, by its number: resuming needs no state but the step."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int):
        self._rows = rows
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def rows(self, step: int) -> np.ndarray:
        """Rows of the global batch of a step, counted from 0."""
        epoch, index = divmod(step, num_batches(len(self._rows), self._batch_size))
        if epoch != self._epoch:
            self._batches = epoch_batches(self._rows, self._lengths, self._batch_size, self._seed, epoch)
            self._epoch = epoch
        return self._batches[index]
