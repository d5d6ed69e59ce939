import time

import pytest

from ml.text_classification.label_leaks import cut_label_leaks

RATINGS = [
    "8/10",
    "7.5 / 10",
    "85/100",
    "3/5 stars",
    "7-8/10",
    "3.5/4",
    "2/4 stars",
    "4 out of 5 stars",
    "ten out of ten",
    "2 stars out of 10",
    "1 (awful) out of 10",
    "*** out of ****",
    "***1/2",
    "**/*****",
    "****",
    "3 stars",
    "3-star",
    "2 1/2 stars",
    "three stars",
    "no stars",
    "★★★☆☆",
    "⭐⭐⭐",
    "★★½",
    "Grade: B+",
    "grade - A",
    "grade of A-",
    "rating: 3",
    "score = 8.5",
    "Vote: seven",
    "打8分",
    "评分：9.5分",
    "四颗星",
]
HONEST = [
    "shot on 9/10/2004",
    "1/5 of the audience left",
    "3/4 of the cast",
    "24/7",
    "the two stars of the film",
    "her two stars",
    "with three stars who can act",
    "starring nobody",
    "a grade B movie",
    "fifth grade",
    "gave it 2 hours",
    "gave it two chances",
    "out of 10 people, nobody laughed",
    "*really* good",
    "s**t",
    "rated PG-13",
    "the score, 40 minutes of strings",
    "30分钟",
    "五星级酒店",
    "星期三",
    "part 2 of 3",
    "10 actors",
    "a star is born",
]


@pytest.mark.parametrize("rating", RATINGS)
@pytest.mark.parametrize("around", ["{}", "fine film, {}", "fine film ({}) and more"])
def test_rating_is_cut_and_nothing_else(rating: str, around: str) -> None:
    assert "".join(cut_label_leaks(around.format(rating)).split()) == "".join(around.format("").split())


@pytest.mark.parametrize("text", HONEST)
def test_ordinary_language_is_left_alone(text: str) -> None:
    assert cut_label_leaks(text) == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("I give it a 7 because of him", "I because of him"),
        ("rated it 3, sadly", ", sadly"),
        ("gave this an A-, no less", ", no less"),
        ("五星好评，推荐", "好评，推荐"),
    ],
)
def test_what_stands_around_a_mark_stays(before: str, after: str) -> None:
    assert " ".join(cut_label_leaks(before).split()) == after


@pytest.mark.parametrize("piece", ["1-", "1 to ", "* ", "*", "one star ", "1 and a half ", "give it a ", "rating: ", "1 (a) ", "给", "5个"])
def test_text_made_to_be_slow_is_not(piece: str) -> None:
    text = f"{piece * (60_000 // len(piece))} out of /10 stars 星 分"
    started = time.process_time()
    cut_label_leaks(text)
    assert time.process_time() - started < 2
