"""Every rule of the shipped contract is broken by exactly one row or table here."""

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


def test_too_few_rows_stop_the_run_in_words(artifact_store: ArtifactStore) -> None:
    result = validate(dataset(artifact_store, GOOD[:1]), with_labels("good", "bad"), artifact_store)
    assert not result.passed
    assert any("enough_rows" in failure and "found 1" in failure for failure in result.failures)


def test_one_class_stops_the_run_in_words(artifact_store: ArtifactStore) -> None:
    rows = [row for row in GOOD if row[2] == "good"]
    result = validate(dataset(artifact_store, rows), load_contract("sentiment"), artifact_store)
    assert [failure.split(":")[0] for failure in result.failures] == ["rule enough_classes"]


def test_large_quarantine_stops_the_run(artifact_store: ArtifactStore) -> None:
    rows = [*GOOD, *[(f"b{index}", None, "good", "gx") for index in range(20)]]
    result = validate(dataset(artifact_store, rows), load_contract("sentiment"), artifact_store)
    assert not result.passed
    assert "max_quarantined_share: 20 of 60" in result.failures[0]


def test_heavy_cleaning_stops_the_run(artifact_store: ArtifactStore) -> None:
    result = validate(dataset(artifact_store, GOOD, num_rows_in=400), load_contract("sentiment"), artifact_store)
    assert not result.passed
    assert "max_dropped_share: 360 of 400" in result.failures[0]


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
