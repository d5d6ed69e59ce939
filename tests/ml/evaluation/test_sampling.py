import numpy as np
import pandas as pd

from ml.evaluation.sampling import choose_rows


def make_frame(sizes: dict[str, int]) -> pd.DataFrame:
    labels = [label for label, size in sizes.items() for _ in range(size)]
    frame = pd.DataFrame({"row_id": [f"r{index}" for index in range(len(labels))], "label": labels})
    frame["target"] = pd.factorize(frame["label"])[0]
    return frame


def test_a_small_table_is_taken_whole() -> None:
    frame = make_frame({"a": 30, "b": 20})
    assert choose_rows(frame, 50) is frame


def test_classes_keep_their_shares() -> None:
    chosen = choose_rows(make_frame({"a": 600, "b": 300, "c": 100}), 50)
    assert chosen["label"].value_counts().to_dict() == {"a": 30, "b": 15, "c": 5}


def test_a_rare_class_keeps_a_row_and_the_total_holds() -> None:
    chosen = choose_rows(make_frame({"a": 5000, "b": 3, "c": 2}), 60)
    assert len(chosen) == 60
    assert set(chosen["label"]) == {"a", "b", "c"}


def test_shares_that_do_not_divide_still_sum_to_the_limit() -> None:
    for limit in range(7, 100):
        assert len(choose_rows(make_frame({"a": 33, "b": 33, "c": 34, "d": 1}), limit)) == limit


def test_the_choice_does_not_depend_on_the_order_of_rows() -> None:
    frame = make_frame({"a": 300, "b": 200})
    shuffled = frame.sample(frac=1, random_state=3)
    assert set(choose_rows(frame, 60)["row_id"]) == set(choose_rows(shuffled, 60)["row_id"])


def test_a_larger_choice_contains_a_smaller_one_of_like_shares() -> None:
    frame = make_frame({"a": 400, "b": 400})
    assert set(choose_rows(frame, 50)["row_id"]) < set(choose_rows(frame, 100)["row_id"])


def test_rows_are_not_taken_from_one_end() -> None:
    chosen = choose_rows(make_frame({"a": 10_000}), 500)
    positions = chosen["row_id"].str.removeprefix("r").astype(int).to_numpy()
    assert abs(positions.mean() - 5000) < 600
    assert (np.diff(positions) > 0).all()


def test_a_table_without_classes_is_one_stratum() -> None:
    frame = make_frame({"a": 100}).drop(columns=["label", "target"])
    assert len(choose_rows(frame, 10)) == 10
