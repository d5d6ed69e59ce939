"""Two-sample tests of texts: which words are used, how many are unknown, and whether a classifier can tell the samples apart.

Words of one text depend on each other, so every test treats a text as one observation: p-values come from exchanging
whole texts between the samples, never from counting words as if they were independent.
"""

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import numpy as np

from ml.data.words import words_of
from ml.monitoring.findings import Finding

if TYPE_CHECKING:
    import scipy.sparse as sparse

NUM_PERMUTATIONS = 1999  # the smallest p-value is 1/2000: below the strictest level of six tests
NUM_COMMON_WORDS = 1000
NUM_COMPONENTS = 32
MIN_UNKNOWN_POINTS = 3.0
MIN_WORD_DISTANCE = 0.05
MIN_AUC = 0.6
_CHUNK = 250


def compare_words(sample: str, reference: Sequence[str], current: Sequence[str], known: Set[str], seed: int) -> tuple[Finding, Finding]:
    """Unknown words and word frequencies, by permutation of texts.

    Unknown words: the share of words that are not in `known`; its effect is the rise in points (hundredths), and only a rise
    is tested. Word frequencies: Jensen-Shannon distance (base 2) over the most common words, the others as one; since the distance
    of two samples of one source is not zero but grows as they get smaller, the effect is what lies above the mean of permutations.

    Args:
        known: words of training texts that are in neither sample.
    """
    texts = [words_of(text) for text in (*reference, *current)]
    counts, columns = _count_words(texts, known)
    observed_groups = np.zeros((1, len(texts)), dtype=np.float32)
    observed_groups[0, len(reference) :] = 1
    observed = _word_statistics(counts, columns, observed_groups)
    random = np.random.default_rng(seed)
    permuted = np.hstack(
        [
            _word_statistics(counts, columns, random.permuted(np.repeat(observed_groups, size, axis=0), axis=1))
            for size in _chunks(NUM_PERMUTATIONS)
        ]
    )
    p_values = (1 + (permuted >= observed - 1e-12).sum(axis=1)) / (1 + NUM_PERMUTATIONS)
    unknown_rise, distance = observed[:, 0]
    totals = [_unknown_share(texts[: len(reference)], known), _unknown_share(texts[len(reference) :], known)]
    unknown = Finding(
        test="unknown words",
        sample=sample,
        method="permutation of texts",
        p_value=float(p_values[0]),
        effect=max(0.0, 100 * float(unknown_rise)),
        effect_name="rise in points",
        effect_limit=MIN_UNKNOWN_POINTS,
        details=f"{totals[0]:.1%} → {totals[1]:.1%} of words",
    )
    frequencies = Finding(
        test="word frequencies",
        sample=sample,
        method="Jensen-Shannon, permutation of texts",
        p_value=float(p_values[1]),
        effect=max(0.0, float(distance - permuted[1].mean())),
        effect_name="distance above chance",
        effect_limit=MIN_WORD_DISTANCE,
        details=_risen_words(texts[: len(reference)], texts[len(reference) :]),
    )
    return unknown, frequencies


def compare_meanings(sample: str, reference: Sequence[str], current: Sequence[str], seed: int) -> Finding:
    """A classifier two-sample test (Lopez-Paz and Oquab, Revisiting classifier two-sample tests, 2017).

    TF-IDF, SVD and logistic regression learn on one half of the texts to tell the samples apart; the effect is the area under
    the ROC curve on the other half, its p-value that of Mann and Whitney: on unseen texts it is exact whatever was learnt.
    """
    from scipy.stats import mannwhitneyu
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits

    texts = np.array([*reference, *current], dtype=object)
    is_current = np.r_[np.zeros(len(reference), dtype=bool), np.ones(len(current), dtype=bool)]
    order = np.random.default_rng(seed).permutation(len(texts))
    learn, ask = order[::2], order[1::2]
    # scikit-learn documents a callable analyzer, its type stubs do not.
    vectorizer = TfidfVectorizer(analyzer=words_of, sublinear_tf=True, min_df=2, max_features=20_000)  # type: ignore[arg-type]
    try:
        vectors = vectorizer.fit_transform(texts[learn])
    except ValueError:  # no word is in two texts
        vectors = None
    if vectors is None or vectors.shape[1] <= NUM_COMPONENTS or len(set(is_current[learn])) < 2:
        scores = np.zeros(len(ask))
    else:
        classifier = LogisticRegression(class_weight="balanced", max_iter=1000)
        model = make_pipeline(TruncatedSVD(NUM_COMPONENTS, random_state=seed), classifier)
        # The matrices are small: on a busy machine, several math threads wait for each other ten times as long as they work.
        with threadpool_limits(limits=1):
            model.fit(vectors, is_current[learn])
            scores = model.decision_function(vectorizer.transform(texts[ask]))
    ours, theirs = scores[is_current[ask]], scores[~is_current[ask]]
    result = mannwhitneyu(ours, theirs, alternative="greater")
    area = float(result.statistic) / (len(ours) * len(theirs))  # type: ignore[attr-defined]
    return Finding(
        test="meaning",
        sample=sample,
        method="domain classifier, Mann-Whitney",
        p_value=float(result.pvalue),  # type: ignore[attr-defined]
        effect=max(0.5, area),
        effect_name="area under the curve",
        effect_limit=MIN_AUC,
        details=f"told apart in {area:.0%} of pairs, by chance 50%",
    )


def _count_words(texts: Sequence[Sequence[str]], known: Set[str]) -> "tuple[sparse.csr_matrix, int]":
    """(texts, words): the common words, then the others, then the unknown ones; and the number of columns before the last."""
    import scipy.sparse as sparse

    totals: dict[str, int] = {}
    for words in texts:
        for word in words:
            totals[word] = totals.get(word, 0) + 1
    common = sorted(totals, key=lambda word: (-totals[word], word))[:NUM_COMMON_WORDS]
    column_of = {word: column for column, word in enumerate(common)}
    others, unknown = len(common), len(common) + 1
    rows, columns = [], []
    for row, words in enumerate(texts):
        found = [column_of.get(word, others) for word in words] + [unknown for word in words if word not in known]
        columns += found
        rows += [row] * len(found)
    matrix = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(len(texts), unknown + 1))
    return matrix, unknown


def _word_statistics(counts: "sparse.csr_matrix", num_words: int, groups: np.ndarray) -> np.ndarray:
    """(2, G): rise of the unknown share, and Jensen-Shannon distance, for each way to part the texts.

    Args:
        groups: (G, texts), 1 for a text that counts as current.
    """
    current = np.asarray((counts.T @ groups.T).T, dtype=np.float64)  # (G, columns)
    reference = np.asarray(counts.sum(axis=0), dtype=np.float64) - current
    shares = [side / np.maximum(side[:, :num_words].sum(axis=1, keepdims=True), 1) for side in (reference, current)]
    p, q = (share[:, :num_words] for share in shares)
    divergence = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return np.stack([shares[1][:, num_words] - shares[0][:, num_words], np.sqrt(np.maximum(divergence, 0))])


def _entropy(shares: np.ndarray) -> np.ndarray:
    """In bits, by row."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1)


def _chunks(total: int) -> list[int]:
    """Sizes that add up to `total`; all permutations at once would take too much memory."""
    return [_CHUNK] * (total // _CHUNK) + ([total % _CHUNK] if total % _CHUNK else [])


def _unknown_share(texts: Sequence[Sequence[str]], known: Set[str]) -> float:
    words = [word for text in texts for word in text]
    return sum(word not in known for word in words) / max(1, len(words))


def _risen_words(reference: Sequence[Sequence[str]], current: Sequence[Sequence[str]], num_words: int = 6) -> str:
    """The words whose share of texts rose most."""
    shares = []
    for texts in (reference, current):
        counts: dict[str, int] = {}
        for words in texts:
            for word in set(words):
                counts[word] = counts.get(word, 0) + 1
        shares.append({word: count / len(texts) for word, count in counts.items()})
    rise = {word: share - shares[0].get(word, 0) for word, share in shares[1].items()}
    most = sorted(rise, key=lambda word: (-rise[word], word))[:num_words]
    return "more often: " + ", ".join(most) if most else ""
