"""Every rule of the shipped contract is broken by exactly one row or table here."""

import re
from collections.abc import Callable

import pandas as pd
import pytest

from ml.artifacts import CleanDataset
from ml.data.contracts import load_contract, parse_contract
from ml.data.validation import validate
from ml.errors import ConfigError
from ml.storage.artifacts import ArtifactStore

GOOD = [(f"id{index}", f"a text number {index}", "good" if index % 2 else "bad", f"g{index}") for index in range(40)]

ROW_BREAKERS = {
    "text_present": ("new", None, "good"),
    "text_has_content": ("new", "?!… ***", "good"),
    "text_length": ("new", "x" * 100_001, "good"),
    "label_present": ("new", "a text", None),
    "label_known": ("new", "a text", "never seen"),
}


def dataset(store: ArtifactStore, rows: list[tuple], num_rows_in: int | None = None) -> CleanDataset:
    frame = pd.DataFrame(rows, columns=["row_id", "text", "label", "group"], dtype="str")
    table = store.put_frame(frame)
    return CleanDataset(table=table, dropped=table, num_rows_in=num_rows_in or len(rows), num_rows=len(rows), rule_counts={})


def with_labels(*labels: str) -> dict:
    return {**load_contract("sentiment"), "labels": list(labels)}


def test_good_rows_all_pass(artifact_store: ArtifactStore) -> None:
    result = validate(dataset(artifact_store, GOOD), load_contract("sentiment"), artifact_store)
    assert result.passed
    assert result.num_quarantined == 0
    assert all(rule.passed for rule in result.results)
    assert result.contract["labels"] == ["bad", "good"]


@pytest.mark.parametrize("rule", ROW_BREAKERS)
def test_row_that_breaks_a_rule_is_quarantined_with_its_name(artifact_store: ArtifactStore, rule: str) -> None:
    broken = (*ROW_BREAKERS[rule], "gx")
    result = validate(dataset(artifact_store, [*GOOD, broken]), with_labels("good", "bad"), artifact_store)
    assert result.passed
    assert [found.rule for found in result.results if not found.passed] == [rule]
    quarantine = artifact_store.get_frame(result.quarantine)
    assert quarantine["rule"].tolist() == [rule]
    assert quarantine["row_id"].tolist() == ["new"]
    assert "new" not in set(artifact_store.get_frame(result.table)["row_id"])


def test_rows_with_one_id_are_both_quarantined(artifact_store: ArtifactStore) -> None:
    twin = ("id0", "another text", "good", "gx")
    result = validate(dataset(artifact_store, [*GOOD, twin]), load_contract("sentiment"), artifact_store)
    assert artifact_store.get_frame(result.quarantine)["rule"].tolist() == ["row_id_unique", "row_id_unique"]


def test_every_row_rule_of_the_contract_has_a_breaking_row() -> None:
    contract = parse_contract(load_contract("sentiment"))
    assert {rule.name for rule in contract.row_rules} == {*ROW_BREAKERS, "row_id_unique"}


@pytest.mark.parametrize("text", ["好电影", "очень хорошо", "جيد", "とても良い", "1234"])
def test_letters_and_digits_of_any_script_are_content(artifact_store: ArtifactStore, text: str) -> None:
    result = validate(dataset(artifact_store, [*GOOD, ("new", text, "good", "gx")]), load_contract("sentiment"), artifact_store)
    assert result.num_quarantined == 0


def test_no_row_is_lost(artifact_store: ArtifactStore) -> None:
    rows = [*GOOD, *[(f"b{index}", *values[1:], "gx") for index, values in enumerate(ROW_BREAKERS.values())]]
    result = validate(dataset(artifact_store, rows), with_labels("good", "bad"), artifact_store)
    kept = set(artifact_store.get_frame(result.table)["row_id"]) | set(artifact_store.get_frame(result.quarantine)["row_id"])
    assert kept == {row[0] for row in rows}


def few_rows() -> tuple[list[tuple], int | None]:
    return GOOD[:5], None


def one_class() -> tuple[list[tuple], int | None]:
    return [row for row in GOOD if row[2] == "good"], None


def a_thousand_classes() -> tuple[list[tuple], int | None]:
    return [(f"id{index}", f"a text number {index}", f"class {index}", f"g{index}") for index in range(1001)], None


def large_quarantine() -> tuple[list[tuple], int | None]:
    return [*GOOD, *[(f"b{index}", None, "good", "gx") for index in range(20)]], None


def heavy_cleaning() -> tuple[list[tuple], int | None]:
    return GOOD, 400


TABLE_BREAKERS = [
    ("rule enough_rows", few_rows, "wants {'min_value': 6}, found 5"),
    ("rule enough_classes", one_class, "of label wants .*, found 1"),
    ("rule enough_classes", a_thousand_classes, "found 1001"),
    ("limit max_quarantined_share", large_quarantine, "20 of 60 rows are in quarantine .33%., at most 20%"),
    ("limit max_dropped_share", heavy_cleaning, "360 of 400 rows were dropped by cleaning .90%., at most 80%"),
]


@pytest.mark.parametrize(("name", "breaker", "told"), TABLE_BREAKERS)
def test_table_that_breaks_one_rule_or_limit_stops_the_run_in_words(
    artifact_store: ArtifactStore, name: str, breaker: Callable[[], tuple[list[tuple], int | None]], told: str
) -> None:
    rows, num_rows_in = breaker()
    result = validate(dataset(artifact_store, rows, num_rows_in), load_contract("sentiment"), artifact_store)
    assert not result.passed
    assert [failure.split(":")[0] for failure in result.failures] == [name]
    assert re.search(told, result.failures[0])


def test_every_table_rule_and_limit_of_the_contract_has_a_breaking_table() -> None:
    contract = parse_contract(load_contract("sentiment"))
    rules = {f"rule {rule.name}" for rule in contract.table_rules} | {f"limit {name}" for name in type(contract.limits).model_fields}
    assert rules == {name for name, _, _ in TABLE_BREAKERS}


def test_share_at_the_limit_is_allowed(artifact_store: ArtifactStore) -> None:
    rows = [*GOOD, *[(f"b{index}", None, "good", "gx") for index in range(10)]]
    assert validate(dataset(artifact_store, rows, num_rows_in=250), load_contract("sentiment"), artifact_store).passed


def test_unknown_contract_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sentiment'"):
        load_contract("sentimant")


def test_unknown_key_of_a_contract_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"contract\.ownr.*did you mean 'owner'"):
        parse_contract({**load_contract("sentiment"), "ownr": "me"})


def test_unknown_expectation_is_told_with_its_rule(artifact_store: ArtifactStore) -> None:
    contract = load_contract("sentiment")
    contract["row_rules"] = [{"name": "odd", "column": "text", "expect": "expect_column_values_to_be_odd", "with": {}}]
    with pytest.raises(ConfigError, match="rule odd"):
        validate(dataset(artifact_store, GOOD), contract, artifact_store)


def test_expectation_on_an_absent_column_is_told_with_its_rule(artifact_store: ArtifactStore) -> None:
    contract = load_contract("sentiment")
    contract["row_rules"] = [{"name": "price_present", "column": "price", "expect": "expect_column_values_to_not_be_null", "with": {}}]
    with pytest.raises(ConfigError, match="price_present"):
        validate(dataset(artifact_store, GOOD), contract, artifact_store)
