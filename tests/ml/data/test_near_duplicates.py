import random
import time

import numpy as np
import pytest

from ml.data.near_duplicates import NUM_PERMUTATIONS, banding, find_near_duplicates, jaccard

WORDS = [f"word{index}" for index in range(3000)]


def text(seed: int, num_words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def test_unrelated_texts_lead_themselves() -> None:
    texts = [text(seed) for seed in range(300)]
    found = find_near_duplicates(texts, ["a"] * 300, 0.9)
    assert found.leaders == list(range(300))
    assert not any(found.dropped)


def test_near_duplicates_are_found_wherever_they_stand() -> None:
    texts = [text(seed) for seed in range(200)]
    copies = [f"{original} Indeed" for original in texts]
    found = find_near_duplicates([*texts, *copies], ["a"] * 400, 0.9)
    assert found.leaders[200:] == list(range(200))
    assert found.dropped == [False] * 200 + [True] * 200


def test_case_and_punctuation_make_no_difference() -> None:
    assert find_near_duplicates(["Great movie!", "great  MOVIE"], ["a", "a"], 1.0).dropped == [False, True]


def test_similarity_below_the_threshold_is_no_duplicate() -> None:
    original = text(1, 40)
    half_changed = " ".join([*original.split()[:20], *text(2, 20).split()])
    assert find_near_duplicates([original, half_changed], ["a", "a"], 0.9).leaders == [0, 1]


def test_rows_of_two_classes_stay_in_one_group() -> None:
    found = find_near_duplicates([text(1), text(1) + " so"], ["a", "b"], 0.9)
    assert found.leaders == [0, 0]
    assert found.dropped == [False, False]


def test_rows_of_three_classes_are_led_by_the_first() -> None:
    found = find_near_duplicates([text(1), text(1) + " so", text(1) + " so it"], ["a", "b", "c"], 0.9)
    assert found.leaders == [0, 0, 0]
    assert found.dropped == [False, False, False]


def test_row_that_would_tie_two_groups_is_dropped() -> None:
    # 40 runs of three words, then one or the other ending: the ends differ too much, the middle is close to both.
    start = text(1, 42).split()
    left, right = " ".join([*start, "x1", "x2", "x3"]), " ".join([*start, "y1", "y2", "y3"])
    found = find_near_duplicates([left, right, " ".join(start)], ["a", "b", "c"], 0.9)
    assert found.leaders[:2] == [0, 1]
    assert found.dropped == [False, False, True]


def test_rows_of_two_owners_are_never_in_one_group() -> None:
    found = find_near_duplicates([text(1), text(1) + " so"], ["a", "b"], 0.9, owners=["train", "test"])
    assert found.dropped == [False, True]


def test_appended_rows_change_nothing_that_was_decided() -> None:
    generator = random.Random(5)
    texts = [text(generator.randrange(60)) + generator.choice(["", " so", " indeed", " so it is"]) for _ in range(400)]
    classes = [generator.choice("ab") for _ in texts]
    before = find_near_duplicates(texts[:320], classes[:320], 0.9)
    after = find_near_duplicates(texts, classes, 0.9)
    assert after.leaders[:320] == before.leaders
    assert after.dropped[:320] == before.dropped


@pytest.mark.parametrize(
    "script",
    [
        "这部电影的故事非常感人演员的表演也很出色值得一看再看",
        "หนังเรื่องนี้สนุกมากนักแสดงเล่นดีและเนื้อเรื่องน่าติดตาม",
        "この映画はとても面白くて俳優の演技も素晴らしかったです",
    ],
)
def test_scripts_without_spaces_are_compared_by_character(script: str) -> None:
    found = find_near_duplicates([script, f"{script}!", script[::-1]], ["a"] * 3, 0.9)
    assert found.dropped == [False, True, False]


def test_emoji_alone_are_compared_too() -> None:
    assert find_near_duplicates(["👍👍👍", "👎👎👎", "👍 👍 👍"], ["a"] * 3, 0.9).dropped == [False, False, True]


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9, 0.95, 1.0])
def test_banding_misses_few_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = banding(threshold)
    assert bands * rows <= NUM_PERMUTATIONS
    assert (1 - threshold**rows) ** bands <= 1e-3


def test_boilerplate_does_not_take_quadratic_time() -> None:
    boilerplate = text(1, 40)
    seconds = []
    for num_rows in (1000, 4000):
        texts = [f"{boilerplate} {text(seed, 6)}" for seed in range(num_rows)]
        started = time.process_time()
        find_near_duplicates(texts, ["a"] * num_rows, 0.9)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 10 * seconds[0]


def test_jaccard_is_shared_over_all() -> None:
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4])) == pytest.approx(0.5)
