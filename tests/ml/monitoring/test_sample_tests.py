import numpy as np
import pytest
from scipy import stats

from ml.monitoring.sample_tests import compare_classes, compare_values, stability_index


def test_values_are_compared_as_scipy_does():
    random = np.random.default_rng(0)
    reference, current = random.lognormal(3, 0.5, 700), random.lognormal(3.2, 0.5, 300)
    found = compare_values("length", "requests", list(reference), list(current), "words")
    expected = stats.ks_2samp(reference, current)
    assert (found.p_value, found.effect) == pytest.approx((expected.pvalue, expected.statistic))
    # The distance by its definition: the largest gap between the two distribution functions.
    points = np.sort(np.concatenate([reference, current]))
    gaps = np.searchsorted(np.sort(reference), points, "right") / 700 - np.searchsorted(np.sort(current), points, "right") / 300
    assert found.effect == pytest.approx(np.abs(gaps).max())


def test_classes_are_compared_as_scipy_does():
    reference = ["a"] * 300 + ["b"] * 500 + ["c"] * 200
    current = ["a"] * 150 + ["b"] * 100 + ["c"] * 50
    found = compare_classes("classes", "requests", reference, current)
    assert found.p_value == pytest.approx(stats.chi2_contingency([[300, 500, 200], [150, 100, 50]]).pvalue)
    assert found.details == "a: 30.0% → 50.0%"
    assert found.effect > found.effect_limit


def test_stability_index_follows_its_formula():
    p, q = np.array([0.3, 0.7]), np.array([0.5, 0.5])
    expected = sum((q - p) * np.log(q / p))
    assert stability_index(p * 1e7, q * 1e7) == pytest.approx(expected, rel=1e-4)
    assert stability_index(np.array([5, 0]), np.array([0, 5])) < np.inf


def test_rare_classes_are_put_together_so_that_the_p_value_holds():
    reference = ["common"] * 900 + [f"rare{number}" for number in range(100)]
    current = ["common"] * 270 + [f"other{number}" for number in range(30)]
    found = compare_classes("classes", "requests", reference, current)
    assert found.p_value == pytest.approx(1.0)  # the rare ones together are a tenth on both sides


def test_two_samples_of_one_class_do_not_differ():
    found = compare_classes("classes", "requests", ["a"] * 100, ["a"] * 50)
    assert (found.p_value, found.changed) == (1.0, False)


def test_p_values_of_classes_are_uniform_where_nothing_changed():
    random = np.random.default_rng(1)
    p_values = [
        compare_classes("c", "r", list(random.choice(list("abcd"), 400)), list(random.choice(list("abcd"), 200))).p_value
        for _ in range(300)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
