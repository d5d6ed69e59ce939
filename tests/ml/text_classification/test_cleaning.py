import random
import time

import pandas as pd
import pytest

from ml.config import CleanConfig
from ml.text_classification.cleaning import CHANGING_RULES, DROPPING_RULES, clean_texts


def frame(*rows: tuple[str | None, str | None]) -> pd.DataFrame:
    return pd.DataFrame(
        {"row_id": [f"r{index}" for index in range(len(rows))], "text": [row[0] for row in rows], "label": [row[1] for row in rows]},
        dtype="str",
    )


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("html", "good<br /><br />film &amp; cast", "good film & cast"),
        ("html", "a <b>bold</b> move", "a bold move"),
        ("control_characters", "it\x92s fine\x00", "it’s fine"),
        ("encoding", "a cafÃ© scene", "a café scene"),
        ("html", "fine <!-- a > b\nnote --> film", "fine film"),
        ("html", "fine <style type='x'>p > a {}</style> film", "fine film"),
        ("html", "fine <script>if (a<b) c()</script> film", "fine film"),
        ("html", "one<p class=x>two", "one two"),
        ("control_characters", "so\u00adft \u200bzero\ufeff", "soft zero"),
        ("urls", "see https://example.com/a?b=1 now", "see now"),
        ("urls", "see HTTP://Example.com. Good", "see . Good"),
        ("urls", "网址www.example.com/a很好看", "网址 很好看"),
        ("whitespace", "  two \n\n lines\t", "two lines"),
        ("label_leaks", "fine film, 8/10 from me", "fine film, from me"),
        ("label_leaks", "I say 4 out of 5 stars", "I say"),
        ("label_leaks", "Grade: B+ overall", "overall"),
        ("label_leaks", "打8分 很好看", "很好看"),
    ],
)
def test_rule_changes_the_text_and_is_counted(rule: str, before: str, after: str) -> None:
    kept, dropped, counts = clean_texts(frame((before, "a")), CleanConfig())
    assert kept["text"].tolist() == [after]
    assert counts[rule] == 1
    assert dropped.empty


@pytest.mark.parametrize(
    "text",
    [
        "x < y and y > z",
        "这部电影很好看，推荐！",
        "great 👨‍👩‍👧 film 🎬",
        "the two stars of the film",
        "shot on 9/10/2004",
        "3 hours",
        "می‌خواهم",
        "ﬁne",
    ],
)
def test_honest_text_is_left_alone(text: str) -> None:
    kept, _, _ = clean_texts(frame((text, "a")), CleanConfig())
    assert kept["text"].tolist() == [text]


@pytest.mark.parametrize(
    ("setting", "before"),
    [
        ("strip_html", "good<br />film"),
        ("strip_urls", "see https://example.com/a"),
        ("strip_label_leaks", "fine, 8/10"),
        ("fix_encoding", "cafÃ©"),
        ("strip_control_characters", "a\x92b"),
    ],
)
def test_rule_can_be_switched_off(setting: str, before: str) -> None:
    kept, _, _ = clean_texts(frame((before, "a")), CleanConfig.model_validate({setting: False}))
    assert kept["text"].tolist() == [before]


def test_duplicates_conflicts_and_empty_texts_are_dropped_with_the_reason() -> None:
    rows = [("one film", "a"), ("one film", "a"), ("two films", "a"), ("two films", "b"), ("<br/>", "a"), ("a third one", "b")]
    kept, dropped, counts = clean_texts(frame(*rows), CleanConfig())
    assert kept["row_id"].tolist() == ["r0", "r5"]
    assert dict(zip(dropped["row_id"], dropped["reason"], strict=True)) == {
        "r1": "exact_duplicate",
        "r2": "conflicting_label",
        "r3": "conflicting_label",
        "r4": "empty",
    }
    assert dropped["text"].tolist()[-1] == "<br/>"
    assert (counts["exact_duplicate"], counts["conflicting_label"], counts["empty"]) == (1, 2, 1)


def test_no_row_is_lost() -> None:
    generator = random.Random(1)
    rows: list[tuple[str | None, str | None]] = [
        (" ".join(generator.choices(["good", "bad", "film", "<i>", "8/10", ""], k=4)), generator.choice(["a", "b", None]))
        for _ in range(300)
    ]
    kept, dropped, _ = clean_texts(frame(*rows), CleanConfig())
    assert sorted([*kept["row_id"], *dropped["row_id"]]) == sorted(f"r{index}" for index in range(300))


def long_text(seed: int, num_words: int = 120) -> list[str]:
    return random.Random(seed).choices([f"word{index}" for index in range(2_000)], k=num_words)


def test_near_duplicate_of_the_same_class_is_dropped() -> None:
    words = long_text(1)
    changed = [*words[:60], "other", *words[61:]]
    kept, dropped, _ = clean_texts(frame((" ".join(words), "a"), (" ".join(changed), "a"), (" ".join(long_text(2)), "a")), CleanConfig())
    assert dropped["reason"].tolist() == ["near_duplicate"]
    assert len(kept) == 2


def test_near_duplicate_of_another_class_stays_in_the_same_group() -> None:
    words = long_text(1)
    changed = [*words[:60], "other", *words[61:]]
    kept, _, _ = clean_texts(frame((" ".join(words), "a"), (" ".join(changed), "b"), (" ".join(long_text(2)), "b")), CleanConfig())
    assert len(kept) == 3
    groups = kept["group"].tolist()
    assert groups[0] == groups[1] != groups[2]


def test_near_duplicate_in_chinese_is_found() -> None:
    text = "".join(random.Random(3).choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜", k=150))
    changed = text[:80] + "电" + text[81:]
    _, dropped, _ = clean_texts(frame((text, "a"), (changed, "a")), CleanConfig())
    assert dropped["reason"].tolist() == ["near_duplicate"]


def test_groups_do_not_change_when_rows_are_appended() -> None:
    first = [(" ".join(long_text(seed)), "ab"[seed % 2]) for seed in range(40)]
    more = [(" ".join([*long_text(seed)[:-1], "new"]), "ab"[(seed + 1) % 2]) for seed in range(0, 40, 3)]
    before, _, _ = clean_texts(frame(*first), CleanConfig())
    after, _, _ = clean_texts(frame(*first, *more), CleanConfig())
    later = dict(zip(after["row_id"], after["group"], strict=True))
    assert {row_id: later[row_id] for row_id in before["row_id"]} == dict(zip(before["row_id"], before["group"], strict=True))


def test_rows_without_text_or_label_are_left_to_the_contract() -> None:
    kept, dropped, _ = clean_texts(frame((None, "a"), ("fine", None)), CleanConfig())
    assert len(kept) == 2
    assert dropped.empty


def test_each_row_counts_once_a_rule_and_untouched_rules_stand_at_zero() -> None:
    _, _, counts = clean_texts(frame(("a <b>fine</b> <i>film</i>", "a"), ("<b>another</b> one", "b"), ("plain", "b")), CleanConfig())
    assert {rule: count for rule, count in counts.items() if count} == {"html": 2}
    assert set(counts) == {*CHANGING_RULES, *DROPPING_RULES}


def test_duplicates_are_seen_after_the_texts_are_clean() -> None:
    _, dropped, _ = clean_texts(frame(("good film", "a"), ("good<br/>film 8/10", "a")), CleanConfig())
    assert dropped["reason"].tolist() == ["exact_duplicate"]


def test_least_length_is_a_setting() -> None:
    kept, dropped, _ = clean_texts(frame(("four", "a"), ("three", "b")), CleanConfig(min_characters=5))
    assert (kept["text"].tolist(), dropped["reason"].tolist()) == (["three"], ["empty"])


def test_duplicates_that_may_stay_are_of_one_group() -> None:
    config = CleanConfig(drop_exact_duplicates=False, drop_near_duplicates=False)
    kept, dropped, _ = clean_texts(frame(("one film", "a"), ("one film", "a"), ("one film", "b"), ("a second", "b")), config)
    assert dropped.empty
    groups = kept["group"].tolist()
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_near_duplicates_that_may_stay_are_told_from_exact_ones() -> None:
    words = long_text(1)
    rows = [(" ".join(words), "a"), (" ".join([*words, "so"]), "a"), (" ".join(words), "a")]
    _, dropped, _ = clean_texts(frame(*rows), CleanConfig(drop_near_duplicates=False))
    assert dict(zip(dropped["row_id"], dropped["reason"], strict=True)) == {"r2": "exact_duplicate"}


@pytest.mark.parametrize(("splits", "kept_row"), [(["train", "test"], "r1"), (["validation", "train"], "r0"), (["train", "train"], "r0")])
def test_held_out_row_stays_and_its_copy_goes(splits: list[str], kept_row: str) -> None:
    words = long_text(1)
    for copy in (words, [*words, "so"]):
        table = frame((" ".join(words), "a"), (" ".join(copy), "a")).assign(split=pd.Series(splits, dtype="str"))
        kept, _, _ = clean_texts(table, CleanConfig())
        assert kept["row_id"].tolist() == [kept_row]


def test_rows_of_the_users_group_share_a_group_and_no_other_row_joins_it() -> None:
    words = long_text(1)
    rows = [(" ".join(words), "a"), (" ".join(long_text(2)), "b"), (" ".join([*words, "so"]), "b"), (" ".join(long_text(3)), "a")]
    table = frame(*rows).assign(group=pd.Series(["ann", "ann", "bob", "bob"], dtype="str"))
    kept, dropped, _ = clean_texts(table, CleanConfig())
    assert dropped["row_id"].tolist() == ["r2"]
    groups = dict(zip(kept["row_id"], kept["group"], strict=True))
    assert groups["r0"] == groups["r1"] != groups["r3"]


def test_half_of_a_surrogate_pair_does_not_stop_cleaning() -> None:
    kept, _, counts = clean_texts(
        pd.DataFrame({"row_id": ["r0"], "text": ["fine \ud83d film"], "label": ["a"]}, dtype=object), CleanConfig()
    )
    assert (kept["text"].tolist(), counts["control_characters"]) == (["fine film"], 1)


@pytest.mark.parametrize("piece", ["<!--", "<script>a<b", "<a ", "<a b=1 ", "www.", "http://a.", "&amp;", "Ã©"])
def test_text_made_to_be_slow_is_not(piece: str) -> None:
    text = "--></style>" + piece * (60_000 // len(piece)) + "</script>"
    started = time.process_time()
    clean_texts(frame((text, "a")), CleanConfig())
    assert time.process_time() - started < 2
