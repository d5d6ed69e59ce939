"""How the rows of a global batch are shared out: by length and by how fast each rank is.

A rank's work is its padded tokens: rows times the longest. Which rank computes which row changes nothing but the time, for
the loss of every row is divided by the weight of the whole batch (`stepping.Stepper`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ml.training.ranks import RankGroup

# Halvings of the interval in which the smallest possible work lies; the rest is less than a thousandth of a row.
NUM_HALVINGS = 30


def deal_rows(rows: np.ndarray, lengths: np.ndarray, num_ranks: int, fractions: np.ndarray | None = None) -> tuple[np.ndarray, list[int]]:
    """Put a batch's rows in such an order, and give each rank so many of them, that all ranks are done at about the same time.

    Rows of like length go to one rank, and a rank with short rows gets more of them. The rank with the longest rows is
    another one in every batch, so that over an epoch each rank sees rows of all lengths, and what goes with length.

    Args:
        lengths: of every row of the split, indexed by row.
        fractions: (R,) what each rank can do of the work, sum 1; all alike when not given.

    Returns:
        The rows, rank by rank, and the number of rows of each rank, for `batches.share_of_rank`.
    """
    speeds = np.full(num_ranks, 1 / num_ranks) if fractions is None else np.asarray(fractions, dtype=np.float64)
    falling = rows[np.argsort(-lengths[rows], kind="stable")]
    costs = np.maximum(lengths[falling], 1).astype(np.float64)
    turn = int(rows.sum()) % num_ranks
    order = [(turn + i) % num_ranks for i in range(num_ranks)]

    def cut(work: float) -> list[int] | None:
        """Rows of each rank, in `order`, when a rank of fraction f may do work * f; None when rows are left."""
        counts, start = [], 0
        for rank in order:
            # The first row of a rank is its longest one. A hair more, or a whole number falls below itself by rounding.
            fitting = int(work * speeds[rank] / costs[start] + 1e-9) if start < len(falling) else 0
            counts.append(min(fitting, len(falling) - start))
            start += counts[-1]
        return counts if start == len(falling) else None

    low, high = 0.0, float(costs[0]) * (len(falling) + num_ranks) / float(speeds.max())
    best = cut(high)
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        found = cut(middle)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    if best is None:
        raise AssertionError("the fastest rank alone can do all of it")
    starts = np.cumsum([0, *best])
    by_rank = sorted(range(num_ranks), key=lambda i: order[i])
    return np.concatenate([falling[starts[i] : starts[i + 1]] for i in by_rank]), [best[i] for i in by_rank]


def padded_tokens(rows: np.ndarray, lengths: np.ndarray) -> int:
    """A rank's work: rows times the longest; 0 without rows."""
    return len(rows) * int(lengths[rows].max()) if len(rows) else 0


def largest_remainder(fractions: np.ndarray, num_rows: int) -> list[int]:
    """Whole numbers that add up to `num_rows`, each less than one away from its fraction of it (Hamilton's method)."""
    ideal = np.asarray(fractions, dtype=np.float64) * num_rows
    counts = np.floor(ideal + 1e-9).astype(np.int64)
    for index in np.argsort(counts - ideal, kind="stable")[: num_rows - int(counts.sum())]:
        counts[index] += 1
    return counts.tolist()


class ShareBalancer:
    """Which fraction of the work each rank gets, following its measured speed.

    All ranks feed it the same numbers, so all have the same fractions. Measured should be what a rank computes without waiting
    for others: the forward pass. The backward pass waits for the gradients of the other ranks, but takes the same multiple of
    the forward pass everywhere.

    Args:
        num_ranks: ranks that share a batch out, each with all of the model.
        smoothing: weight of the past in the running mean of a rank's speed, 0 to below 1.
        smallest, largest: bounds of a rank's fraction, as multiples of an equal one. The largest bounds its memory.
        smallest_gain: new fractions are taken up only when a step is expected to become shorter by this share of it. Below
            that, ranks are alike, and what differs is noise.
        num_first: measurements before the first change.
    """

    def __init__(
        self,
        num_ranks: int,
        smoothing: float = 0.9,
        smallest: float = 0.25,
        largest: float = 2.0,
        smallest_gain: float = 0.05,
        num_first: int = 3,
    ):
        if not (0 <= smoothing < 1 and 0 <= smallest <= 1 <= largest):
            raise ValueError(f"smoothing {smoothing} must be in [0, 1), smallest {smallest} and largest {largest} on either side of 1")
        self.num_ranks = num_ranks
        self._smoothing = smoothing
        self._smallest, self._largest = smallest / num_ranks, min(largest / num_ranks, 1.0)
        self._smallest_gain = smallest_gain
        self._num_first = num_first
        self._means = np.zeros(num_ranks)
        self._weights = np.zeros(num_ranks)
        self._num_seen = 0
        self._fractions = np.full(num_ranks, 1 / num_ranks)

    @property
    def fractions(self) -> np.ndarray:
        """(R,) float64, sum 1."""
        return self._fractions.copy()

    @property
    def speeds(self) -> np.ndarray:
        """(R,) tokens per second; the mean of the others for a rank that was never measured."""
        known = self._weights > 0
        speeds = self._means / np.where(known, self._weights, 1.0)
        return np.where(known, speeds, speeds[known].mean() if known.any() else 1.0)

    def observe(self, tokens: Sequence[float], seconds: Sequence[float]) -> bool:
        """Take in what every rank did, and in which time; whether the fractions changed.

        Args:
            tokens: (R,) padded tokens of each rank; a rank with none is left as it was.
            seconds: (R,) that they took it, waiting excluded.
        """
        done, took = np.asarray(tokens, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
        measured = (done > 0) & (took > 0) & np.isfinite(took)
        # Numerator and denominator fade alike, so the first measurements count in full (Kingma and Ba 2015, section 3).
        keep = np.where(measured, self._smoothing, 1.0)
        new = np.where(measured, done / np.where(measured, took, 1.0), 0.0)
        self._means = self._means * keep + new * (1 - keep)
        self._weights = self._weights * keep + (1 - keep)
        self._num_seen += 1
        if self._num_seen < self._num_first or self.num_ranks == 1:
            return False
        speeds = self.speeds
        wanted = _within(speeds / speeds.sum(), self._smallest, self._largest)
        if float((wanted / speeds).max()) > (1 - self._smallest_gain) * float((self._fractions / speeds).max()):
            return False
        self._fractions = wanted
        return True

    def exchange(self, group: "RankGroup", data_rank: int, tokens: float, seconds: float) -> bool:
        """`observe` what all ranks tell of themselves; all ranks call it together. One small all-reduce.

        Args:
            data_rank: whose share this rank computes. Where several ranks hold one model together, their mean speed counts.
            tokens, seconds: of this rank.
        """
        told = [0.0] * (2 * self.num_ranks)
        told[data_rank], told[self.num_ranks + data_rank] = tokens, seconds
        together = group.sum(told)
        return self.observe(together[: self.num_ranks], together[self.num_ranks :])

    def shares(self, num_rows: int) -> list[int]:
        """Rows of each rank by its fraction, where all rows are the same work."""
        return largest_remainder(self._fractions, num_rows)

    def state(self) -> dict[str, Any]:
        """JSON, for a checkpoint."""
        return {
            "means": self._means.tolist(),
            "weights": self._weights.tolist(),
            "num_seen": self._num_seen,
            "fractions": self._fractions.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; with another number of ranks, begin anew."""
        if len(state["fractions"]) != self.num_ranks:
            return
        self._means, self._weights, self._fractions = (
            np.array(state[name], dtype=np.float64) for name in ("means", "weights", "fractions")
        )
        self._num_seen = int(state["num_seen"])


def _within(fractions: np.ndarray, smallest: float, largest: float) -> np.ndarray:
    """The nearest fractions in proportion that are within the bounds and add up to 1."""
    low, high = 0.0, 1.0 / float(fractions[fractions > 0].min())
    # The sum of the clipped multiples rises with the factor, from below 1 to above.
    for _ in range(100):
        factor = (low + high) / 2
        low, high = (factor, high) if np.clip(fractions * factor, smallest, largest).sum() < 1 else (low, factor)
    clipped = np.clip(fractions * high, smallest, largest)
    return clipped / clipped.sum()
