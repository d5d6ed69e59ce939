import datetime
import decimal

import numpy as np
import pandas as pd
import pytest

from ml.data.values import cell_text, sort_labels, split_name
from ml.errors import DataError


@pytest.mark.parametrize("value", [1, 1.0, "1", " 1 ", "1.0", "1.", np.int64(1), np.float32(1), decimal.Decimal("1.00")])
def test_one_number_has_one_form(value: object) -> None:
    assert cell_text(value) == "1"


@pytest.mark.parametrize("value", [True, "True", "TRUE", "true", np.bool_(True)])
def test_one_boolean_has_one_form(value: object) -> None:
    assert cell_text(value) == "true"


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", pd.NA, pd.NaT])
def test_empty_cells_are_none(value: object) -> None:
    assert cell_text(value) is None


@pytest.mark.parametrize(
    ("value", "text"), [("01", "01"), ("1.50", "1.5"), ("1.2.3", "1.2.3"), ("好", "好"), (datetime.date(2026, 1, 2), "2026-01-02")]
)
def test_other_values_keep_their_form(value: object, text: str) -> None:
    assert cell_text(value) == text


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_cell_that_is_no_value_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="a cell holds"):
        cell_text(value)


def test_numbers_are_sorted_as_numbers_and_names_as_names() -> None:
    assert sort_labels(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert sort_labels(["10", "9", "x"]) == ["10", "9", "x"]


def test_usual_spellings_of_a_split_are_known() -> None:
    assert [split_name(name) for name in ("Train", "dev", "val", " TEST ")] == ["train", "validation", "validation", "test"]
    with pytest.raises(DataError, match="'holdout'"):
        split_name("holdout")
