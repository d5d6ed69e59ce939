"""Two samples side by side, as shares of a few bins: small enough for a record, enough for a picture."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pydantic import Field

from ml.artifacts import Record

MAX_BINS = 12


class Histogram(Record):
    title: str
    bins: tuple[str, ...]
    reference: tuple[float, ...] = Field(description="share of each bin")
    current: tuple[float, ...]


def value_histogram(title: str, reference: Sequence[float], current: Sequence[float]) -> Histogram:
    """Bins hold about the same number of reference values each; whole numbers."""
    inner = np.unique(np.quantile(reference, np.linspace(0, 1, MAX_BINS + 1)[1:-1]).round())
    edges = np.array([-np.inf, *inner, np.inf])
    names = [f"< {inner[0]:g}", *(_whole(low, high - 1) for low, high in pairwise(inner)), f"≥ {inner[-1]:g}"]
    shares = [np.histogram(side, edges)[0] / len(side) for side in (reference, current)]
    return Histogram(title=title, bins=tuple(names), reference=tuple(shares[0].tolist()), current=tuple(shares[1].tolist()))


def share_histogram(title: str, reference: Sequence[str], current: Sequence[str]) -> Histogram:
    """The most frequent classes, the others left out."""
    counts = [Counter(side) for side in (reference, current)]
    totals = counts[0] + counts[1]
    names = sorted(totals, key=lambda name: (-totals[name], name))[:MAX_BINS]
    shares = [tuple(count[name] / count.total() for name in names) for count in counts]
    return Histogram(title=title, bins=tuple(names), reference=shares[0], current=shares[1])


def _whole(first: float, last: float) -> str:
    return f"{first:g}" if first == last else f"{first:g}-{last:g}"
