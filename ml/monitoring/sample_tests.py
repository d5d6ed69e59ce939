"""Two-sample tests of plain values: lengths, confidences, classes. Statistics are SciPy's."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ml.monitoring.findings import Finding

MIN_KS_DISTANCE = 0.1
MIN_STABILITY_INDEX = 0.1
MIN_EXPECTED_COUNT = 5


def compare_values(test: str, sample: str, reference: Sequence[float], current: Sequence[float], unit: str) -> Finding:
    """Two-sample Kolmogorov-Smirnov. The effect is its distance: the largest gap between the two distribution functions.

    With ties (word counts) the p-value is too large rather than too small.
    """
    from scipy.stats import ks_2samp

    result = ks_2samp(reference, current)
    return Finding(
        test=test,
        sample=sample,
        method="Kolmogorov-Smirnov",
        p_value=float(result.pvalue),  # type: ignore[attr-defined]
        effect=float(result.statistic),  # type: ignore[attr-defined]
        effect_name="distance",
        effect_limit=MIN_KS_DISTANCE,
        details=f"median {np.median(reference):.4g} → {np.median(current):.4g} {unit}".rstrip(),
    )


def compare_classes(test: str, sample: str, reference: Sequence[str], current: Sequence[str]) -> Finding:
    """Chi-square test of homogeneity. The effect is the population stability index, where 0.1 is taken for a moderate shift.

    Classes that are too rare for the approximation (an expected count below 5) are put together.
    """
    from scipy.stats import chi2_contingency

    sides = [Counter(side) for side in (reference, current)]
    classes = sorted(sides[0] | sides[1])
    counts = np.array([[side[name] for name in classes] for side in sides], dtype=np.float64)
    tested = _pool_rare(counts)
    p_value = float(chi2_contingency(tested).pvalue) if tested.shape[1] > 1 else 1.0  # type: ignore[attr-defined]
    shares = counts / counts.sum(axis=1, keepdims=True)
    largest = int(np.abs(shares[1] - shares[0]).argmax())
    return Finding(
        test=test,
        sample=sample,
        method="chi-square",
        p_value=p_value,
        effect=stability_index(counts[0], counts[1]),
        effect_name="stability index",
        effect_limit=MIN_STABILITY_INDEX,
        details=f"{classes[largest]}: {shares[0][largest]:.1%} → {shares[1][largest]:.1%}",
    )


def stability_index(reference: np.ndarray, current: np.ndarray) -> float:
    """Population stability index of two vectors of counts: sum of (q - p) ln(q / p), half a count added to each class."""
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (reference, current))
    return float(((q - p) * np.log(q / p)).sum())


def _pool_rare(counts: np.ndarray) -> np.ndarray:
    """(2, classes): columns with too small an expected count become one, together with the next larger if need be."""
    expected = counts.sum(axis=0) * (counts.sum(axis=1) / counts.sum()).min()
    order = np.argsort(expected)
    num_pooled = int((expected < MIN_EXPECTED_COUNT).sum())
    while 0 < num_pooled < len(order) and expected[order[:num_pooled]].sum() < MIN_EXPECTED_COUNT:
        num_pooled += 1
    if num_pooled == 0:
        return counts
    pooled = counts[:, order[:num_pooled]].sum(axis=1, keepdims=True)
    return np.hstack([pooled, counts[:, order[num_pooled:]]])
