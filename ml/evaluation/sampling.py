"""Which rows of a split are used when it holds more than there is time for."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def choose_rows(frame: "pd.DataFrame", max_rows: int) -> "pd.DataFrame":
    """At most `max_rows` rows, the same ones for everybody who asks.

    Within a stratum the rows with the smallest digest of their `row_id` are taken, so the choice depends neither on the
    order of the rows nor on a random state, and a larger choice contains a smaller one. Strata are the classes
    (`target`, else `label`, else one stratum); each gets its share of the rows, rounded by largest remainder, and at
    least one row while there is room.
    """
    if len(frame) <= max_rows:
        return frame
    column = next((name for name in ("target", "label") if name in frame.columns), None)
    strata = frame[column].to_numpy() if column else np.zeros(len(frame), dtype=np.int64)
    names, membership, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    quotas = _quotas(sizes, max_rows)
    digests = np.array([hashlib.sha256(str(row_id).encode()).hexdigest() for row_id in frame["row_id"]])
    chosen = []
    for stratum in range(len(names)):
        rows = np.flatnonzero(membership == stratum)
        chosen.append(rows[np.argsort(digests[rows], kind="stable")[: quotas[stratum]]])
    return frame.iloc[np.sort(np.concatenate(chosen))].reset_index(drop=True)


def _quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """Rows per stratum, proportional to `sizes`, summing to `total`; the largest remainders are rounded up."""
    shares = sizes * total / sizes.sum()
    quotas = np.floor(shares).astype(np.int64)
    if len(sizes) <= total:
        quotas = np.maximum(quotas, 1)
    order = np.argsort(-(shares - np.floor(shares)), kind="stable")
    while (missing := total - int(quotas.sum())) > 0:
        room = order[quotas[order] < sizes[order]]
        quotas[room[:missing]] += 1
    while quotas.sum() > total:
        # Raising empty strata to one row took too many: the largest stratum gives them back.
        quotas[int(quotas.argmax())] -= 1
    return quotas
