"""Checks a data contract with Great Expectations: rows that break it are set aside with the rule's name, never lost."""

import logging
from typing import TYPE_CHECKING, Any

from ml.artifacts import CleanDataset, RuleResult, ValidatedDataset
from ml.data.contracts import DataContract, compile_suite, parse_contract
from ml.data.values import sort_labels
from ml.errors import ConfigError
from ml.storage.artifacts import ArtifactStore

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core.expectation_suite import ExpectationSuite

logger = logging.getLogger(__name__)


def validate(clean: CleanDataset, contract: dict, store: ArtifactStore) -> ValidatedDataset:
    """Check the row rules, set the rows that break one aside, then check the table rules on the rest.

    Args:
        contract: as given by `load_contract`; `labels: infer` is frozen to the classes found.

    Returns:
        `passed` is false when a table rule or a limit is broken; `failures` says so in words.

    Raises:
        ConfigError: a rule that Great Expectations cannot check on this table.
    """
    frame = store.get_frame(clean.table)
    parsed = parse_contract(contract)
    labels = sort_labels(frame["label"].dropna()) if parsed.labels == "infer" else list(parsed.labels)

    row_results, broken = check_rows(frame, parsed, labels)
    bad = sorted(broken)
    kept = frame.drop(index=bad).reset_index(drop=True)
    quarantined = frame.loc[bad].assign(rule=[broken[row] for row in bad]).reset_index(drop=True)
    table_results, failures = check_table(kept, parsed, labels)
    failures += _broken_limits(parsed, clean, num_quarantined=len(quarantined))

    logger.info("contract %s: %d of %d rows kept, %d in quarantine", parsed.name, len(kept), len(frame), len(quarantined))
    for failure in failures:
        logger.error("contract %s: %s", parsed.name, failure)
    return ValidatedDataset(
        table=store.put_frame(kept),
        quarantine=store.put_frame(quarantined),
        num_rows=len(kept),
        num_quarantined=len(quarantined),
        passed=not failures,
        results=(*row_results, *table_results),
        failures=tuple(failures),
        contract={**parsed.model_dump(mode="json", by_alias=True), "labels": labels},
    )


def check_rows(frame: "pd.DataFrame", contract: DataContract, labels: list[str]) -> tuple[list[RuleResult], dict[int, str]]:
    """Results of the row rules, and for each row that breaks some the first of them (position -> rule)."""
    results, broken = [], {}
    outcomes = _run(frame, compile_suite(contract, labels, "row"), contract)
    for rule in contract.row_rules:
        rows = outcomes[rule.name].result.get("unexpected_index_list") or []
        for row in rows:
            broken.setdefault(row, rule.name)
        results.append(RuleResult(rule=rule.name, level="row", passed=not rows, num_failed=len(rows)))
    return results, broken


def check_table(frame: "pd.DataFrame", contract: DataContract, labels: list[str]) -> tuple[list[RuleResult], list[str]]:
    """Results of the table rules, and the broken ones in words."""
    results, failures = [], []
    outcomes = _run(frame, compile_suite(contract, labels, "table"), contract) if contract.table_rules else {}
    for rule in contract.table_rules:
        outcome = outcomes[rule.name]
        observed = str(outcome.result.get("observed_value", ""))
        results.append(RuleResult(rule=rule.name, level="table", passed=bool(outcome.success), observed=observed))
        if not outcome.success:
            column = f" of {rule.column}" if rule.column else ""
            failures.append(f"rule {rule.name}: {rule.expect}{column} wants {rule.arguments}, found {observed}")
    return results, failures


def _broken_limits(contract: DataContract, clean: CleanDataset, num_quarantined: int) -> list[str]:
    failures = []
    num_dropped = clean.num_rows_in - clean.num_rows
    shares = {
        "max_quarantined_share": (num_quarantined, clean.num_rows, contract.limits.max_quarantined_share, "rows are in quarantine"),
        "max_dropped_share": (num_dropped, clean.num_rows_in, contract.limits.max_dropped_share, "rows were dropped by cleaning"),
    }
    for name, (number, total, limit, what) in shares.items():
        if total and number / total > limit:
            failures.append(f"limit {name}: {number} of {total} {what} ({number / total:.0%}), at most {limit:.0%} is allowed")
    return failures


def _run(frame: "pd.DataFrame", suite: "ExpectationSuite", contract: DataContract) -> dict[str, Any]:
    """Rule name -> Great Expectations' result."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    # This one logger sets itself to INFO and tells of every temporary folder.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)  # type: ignore[assignment]
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("rows")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    outcomes = {}
    for outcome in batch.validate(context.suites.add(suite), result_format="COMPLETE").results:
        name = outcome.expectation_config.meta["rule"]  # type: ignore[union-attr]
        if (error := _error(outcome.exception_info or {})) is not None:
            raise ConfigError(f"contract {contract.name}, rule {name} cannot be checked: {error}; correct the contract")
        outcomes[name] = outcome
    return outcomes


def _error(exception_info: dict[str, Any]) -> str | None:
    """What an expectation raised; Great Expectations keeps one description, or one for each metric that failed."""
    described = [exception_info, *(value for value in exception_info.values() if isinstance(value, dict))]
    return next((str(found.get("exception_message")) for found in described if found.get("raised_exception")), None)
