import numpy as np
import pytest

from ml.monitoring.findings import Finding, holm, judge_findings


def finding(p_value: float, effect: float = 1.0) -> Finding:
    return Finding(test="length", sample="requests", method="", p_value=p_value, effect=effect, effect_name="distance", effect_limit=0.1)


def test_holm_gives_the_textbook_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_holds_the_level_of_the_whole_family():
    random = np.random.default_rng(0)
    families = random.uniform(size=(4_000, 6))
    share = np.mean([min(holm(list(family))) <= 0.05 for family in families])
    assert share <= 0.05 + 3 * (0.05 * 0.95 / 4_000) ** 0.5


def test_a_change_needs_both_a_small_p_value_and_a_size_that_matters():
    judged = judge_findings([finding(1e-9), finding(1e-9, effect=0.09), finding(0.2), finding(0.004)], significance=0.01)
    assert [item.verdict for item in judged] == ["changed", "no change", "not significant", "changed"]
    # 0.006 would do alone, but not as one of four.
    assert not judge_findings([finding(0.006)] + [finding(0.5)] * 3, significance=0.01)[0].changed
