"""Near duplicates: texts that share nearly all runs of three words, found by MinHash and checked exactly.

MinHash after Broder, "On the resemblance and containment of documents" (1997); banding after Leskovec, Rajaraman,
Ullman, "Mining of Massive Datasets", section 3.4. The hash only proposes pairs; what counts is the exact Jaccard similarity.

A row is compared with the earlier rows that were kept, and an answer never depends on later rows: rows that
are appended change nothing that was decided before. No chain of small differences can join two groups.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from ml.data.words import words_of

SHINGLE_WORDS = 3
# Two texts whose first words agree are one text; this bounds the time spent on a book in a cell.
MAX_WORDS = 2000
NUM_PERMUTATIONS = 128
# Share of pairs at exactly the threshold that the banding may miss; pairs above it are missed far less often.
MISS_RATE = 1e-3
# Boilerplate shared by thousands of texts proposes every one of them to every other. A bucket proposes only its earliest
# rows, so time stays linear; of texts that are mostly boilerplate, some near duplicates then stay. (This bound is why
# the buckets are ours and not datasketch's MinHashLSH, which took 10 s for 8,000 such texts and grows with their square.)
MAX_BUCKET_ROWS = 50

_MIX = tuple(np.uint64(odd) for odd in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


@dataclass(frozen=True)
class NearDuplicates:
    """Per row: the index of the row that leads its group (itself for most), and whether the row is to be dropped."""

    leaders: list[int]
    dropped: list[bool]


def find_near_duplicates(
    texts: Sequence[str], classes: Sequence[Hashable], threshold: float, owners: Sequence[Hashable] | None = None
) -> NearDuplicates:
    """Group texts whose Jaccard similarity of word shingles is at least `threshold`.

    Within a class the later row is dropped. Across classes both stay, in one group. A row that is close to two
    groups is dropped, for it would tie them together.

    Time on one core: 8,530 reviews of 234 words 2.3 s, as many sentences of 21 words 1.1 s; it grows with the words.

    Args:
        classes: class of each row.
        threshold: in (0, 1].
        owners: where rows belong to groups already (the user's own groups, or splits): the owner of each row.
            Rows of two owners are never put in one group; the later of two that are alike is dropped instead.
    """
    from datasketch import MinHash

    bands, rows_per_band = banding(threshold)
    # Four standard errors of the MinHash estimate below the threshold: what is less alike is not checked exactly.
    least_estimate = threshold - 4 * math.sqrt(threshold * (1 - threshold) / NUM_PERMUTATIONS)
    empty = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)
    signatures = np.empty((len(texts), NUM_PERMUTATIONS), dtype=empty.hashvalues.dtype)
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    shingles: dict[int, np.ndarray] = {}
    hashes = _WordHashes()
    leaders = list(range(len(texts)))
    dropped = [False] * len(texts)
    for row, text in enumerate(texts):
        found = _shingles(text, hashes)
        minhash = empty.copy()
        minhash.update_batch(found.tolist())
        signatures[row] = minhash.hashvalues
        keys = [(band, part.tobytes()) for band, part in enumerate(signatures[row, : bands * rows_per_band].reshape(bands, rows_per_band))]
        proposed = sorted({other for key in keys if key in buckets for other in buckets[key]})
        if proposed:
            estimates = (signatures[proposed] == signatures[row]).mean(axis=1)
            proposed = [other for other, estimate in zip(proposed, estimates, strict=True) if estimate >= least_estimate]
        alike = [other for other in proposed if jaccard(found, shingles[other]) >= threshold]
        if alike:
            leaders[row] = leaders[alike[0]]
            same_class = any(classes[other] == classes[row] for other in alike)
            ties_groups = len({leaders[other] for other in alike}) > 1
            ties_owners = owners is not None and any(owners[other] != owners[row] for other in alike)
            if same_class or ties_groups or ties_owners:
                dropped[row] = True
                continue
        shingles[row] = found
        for key in keys:
            if len(buckets[key]) < MAX_BUCKET_ROWS:
                buckets[key].append(row)
    return NearDuplicates(leaders, dropped)


def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows per band): the strictest banding that misses a pair at the threshold at most `MISS_RATE` of the time."""
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        bands = NUM_PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= MISS_RATE:
            return bands, rows
    return NUM_PERMUTATIONS, 1


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Jaccard similarity of two arrays of distinct values."""
    shared = np.intersect1d(left, right, assume_unique=True).size
    return shared / (left.size + right.size - shared)


class _WordHashes(dict[str, int]):
    """Word -> 64-bit hash, computed once a word."""

    def __missing__(self, word: str) -> int:
        self[word] = value = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return value


def _shingles(text: str, hashes: _WordHashes) -> np.ndarray:
    """Distinct 32-bit hashes of the runs of three words; a shorter text is one run."""
    words = words_of(text)[:MAX_WORDS]
    values = np.array([hashes[word] for word in words], dtype=np.uint64)
    length = min(SHINGLE_WORDS, len(values))
    count = len(values) - length + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        mixed += values[offset : offset + count] * _MIX[offset]
    return np.unique(mixed >> np.uint64(32))
