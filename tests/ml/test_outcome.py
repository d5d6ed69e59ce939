"""The outcome of a run: status, exit code, the same keys for every ending, and a schema that is kept."""

import json
from datetime import UTC, datetime, timedelta, timezone

import jsonschema
import pytest

from ml.artifacts import Deployment
from ml.errors import BadInputError, ConfigError, DeploymentError, StorageUnavailableError
from ml.outcome import PipelineOutcome, RunRecords, build_outcome, outcome_schema, schema_text
from ml.settings import REPOSITORY_ROOT
from tests.ml.report.example_runs import (
    ALL_RUNS,
    STARTED,
    deployed_english,
    failed_in_training,
    failed_on_bad_input,
    rejected_below_baseline,
    rejected_by_data_contract,
    unchanged,
)

# Dictionaries whose keys come from the run itself: names of files, rules, metrics, labels, settings.
FREE_KEYS = {
    "objects",
    "cleaning_counts",
    "quarantine_counts",
    "split_counts",
    "plan",
    "parameters",
    "metrics",
    "libraries",
    "config",
    "request",
    "reply",
}


def as_document(outcome: PipelineOutcome) -> dict:
    return json.loads(outcome.model_dump_json())


def key_paths(value: object, path: str = "") -> set[str]:
    """All paths of fixed keys outside lists; null where a section would be is a difference."""
    if not isinstance(value, dict):
        return {path}
    found = {path}
    for key, item in value.items():
        found |= {f"{path}.{key}"} if key in FREE_KEYS else key_paths(item, f"{path}.{key}")
    return found


@pytest.mark.parametrize(
    ("run", "status", "exit_code"),
    [
        ("deployed_english", "deployed", 0),
        ("deployed_chinese", "deployed", 0),
        ("deployed_uncompressed", "deployed_uncompressed", 0),
        ("unchanged", "unchanged", 0),
        ("rejected_below_baseline", "rejected", 3),
        ("rejected_by_data_contract", "rejected", 3),
        ("failed_in_training", "failed", 1),
        ("failed_on_bad_input", "failed", 2),
    ],
)
def test_status_and_exit_code_say_how_the_run_ended(run: str, status: str, exit_code: int):
    outcome = ALL_RUNS[run]().outcome()
    assert (outcome.status, outcome.exit_code) == (status, exit_code)
    assert outcome.reasons


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(ConfigError("x"), 2), (BadInputError("x"), 2), (StorageUnavailableError("x"), 1), (KeyError("x"), 1), (KeyboardInterrupt(), 1)],
)
def test_an_error_decides_the_exit_code(error: BaseException, exit_code: int):
    run = deployed_english()
    outcome = build_outcome("id", run.config, RunRecords(), STARTED, STARTED, error)
    assert (outcome.status, outcome.exit_code) == ("failed", exit_code)
    assert outcome.error is not None
    assert outcome.error.type == type(error).__name__
    assert outcome.reasons == (outcome.error.message,)
    assert outcome.error.message


def test_an_error_after_the_decision_still_fails_the_run():
    run = deployed_english()
    records = run.records.model_copy(update={"current_stage": "deploy_model"})
    outcome = build_outcome("id", run.config, records, STARTED, STARTED, DeploymentError("row 7 differs by 0.2"))
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.stage == "deploy_model"
    assert outcome.alias is None


@pytest.mark.parametrize(("status", "exit_code"), [("rejected", 3), ("failed", 1)])
def test_the_words_of_a_deployment_that_did_not_happen_come_first(status: str, exit_code: int):
    run = deployed_english()
    deployment = Deployment.model_validate(
        {"status": status, "name": "sentiment", "version": None, "reasons": ("labels differ; give NAME",)}
    )
    records = run.records.model_copy(update={"deployment": deployment})
    outcome = build_outcome("id", run.config, records, STARTED, STARTED)
    assert (outcome.status, outcome.exit_code) == (status, exit_code)
    assert outcome.reasons[0] == "labels differ; give NAME"
    assert outcome.alias is None


def test_a_run_that_just_stops_is_a_failure_that_says_where():
    run = deployed_english()
    records = RunRecords(raw=run.records.raw, current_stage="clean_data")
    outcome = build_outcome("id", run.config, records, STARTED, STARTED)
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    assert "clean_data" in outcome.reasons[0]


@pytest.mark.parametrize("run", ALL_RUNS)
def test_keys_are_the_same_for_every_ending(run: str):
    expected = key_paths(as_document(deployed_english().outcome())) - {".error"}
    found = {path for path in key_paths(as_document(ALL_RUNS[run]().outcome())) if not path.startswith(".error")}
    assert found == expected


def test_rows_of_all_roles_have_the_same_keys():
    rows = as_document(deployed_english().outcome())["models"]
    assert [row["role"] for row in rows] == ["baseline", "uncompressed", "uncompressed", "variant", "variant", "variant", "variant"]
    assert len({tuple(sorted(row)) for row in rows}) == 1


def test_rows_carry_metrics_timings_clauses_and_failures():
    outcome = deployed_english().outcome()
    rows = {row.name: row for row in outcome.models}
    chosen = rows["static_int8"]
    assert [row.name for row in outcome.models if row.chosen] == ["static_int8"]
    assert chosen.test.metrics["accuracy"].value == pytest.approx(0.829)
    assert chosen.validation.num_rows == 851
    assert chosen.timing is not None
    assert chosen.timing.latency_ratio.value == pytest.approx(0.3)
    assert all(clause.passed for clause in chosen.clauses)
    assert rows["baseline"].timing is None
    assert rows["baseline"].validation.metrics
    assert rows["static_int8_pct"].status == "failed"
    assert rows["static_int8_pct"].bundle_sha256 is None
    assert any("static_int8_pct" in warning for warning in outcome.warnings)


def test_a_rejected_run_chose_nothing_and_serves_nothing():
    outcome = rejected_below_baseline().outcome()
    assert not any(row.chosen for row in outcome.models)
    assert (outcome.alias, outcome.version, outcome.addresses.predict_url) == (None, None, None)
    assert any(row.test.metrics for row in outcome.models)


def test_data_summary_counts_what_left_at_each_step():
    rows = deployed_english().outcome().data.rows
    assert rows.raw is not None
    assert rows.clean is not None
    assert rows.validated is not None
    assert rows.dropped == rows.raw - rows.clean
    assert rows.quarantined == rows.clean - rows.validated
    assert rejected_by_data_contract().outcome().data.quarantine_counts["text_has_word"] == 3


def test_an_unchanged_run_names_the_champion_and_what_was_reused():
    outcome = unchanged().outcome()
    assert outcome.alias == "champion"
    assert outcome.version is not None
    assert all(stage.reused for stage in outcome.stages)


def test_predict_url_of_the_deployment_is_an_address():
    assert deployed_english().outcome().addresses.predict_url == "http://127.0.0.1:8080/v1/sentiment/predict"


def test_times_are_written_in_utc():
    run = deployed_english()
    eastern = timezone(timedelta(hours=8))
    started = datetime(2026, 11, 24, 16, 22, tzinfo=eastern)
    outcome = build_outcome("id", run.config, run.records, started, STARTED.astimezone(UTC) + timedelta(seconds=90))
    assert outcome.started == "2026-11-24T08:22:00Z"
    assert outcome.seconds == 90


@pytest.mark.parametrize("run", ALL_RUNS)
def test_real_outcomes_keep_the_schema_and_come_back_whole(run: str):
    outcome = ALL_RUNS[run]().outcome()
    jsonschema.Draft202012Validator(outcome_schema()).validate(as_document(outcome))
    assert PipelineOutcome.model_validate_json(outcome.model_dump_json()) == outcome


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.pop("decision"),
        lambda document: document["data"]["rows"].pop("raw"),
        lambda document: document["models"][0].pop("timing"),
        lambda document: document.update(status="fine"),
        lambda document: document.update(extra=1),
    ],
)
def test_the_schema_refuses_a_document_of_another_shape(damage):
    document = as_document(deployed_english().outcome())
    damage(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(outcome_schema()).validate(document)


def test_the_committed_schema_is_up_to_date():
    committed = (REPOSITORY_ROOT / "docs" / "outcome.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run `python -m ml.outcome` to write docs/outcome.schema.json anew"


def test_every_key_is_explained_to_users():
    page = (REPOSITORY_ROOT / "docs" / "outcome.md").read_text(encoding="utf-8")
    schema = outcome_schema()
    keys = set(schema["properties"])
    for definition in schema["$defs"].values():
        keys |= set(definition["properties"])
    missing = sorted(key for key in keys if f"`{key}`" not in page)
    assert missing == []


def test_the_environment_names_the_machine():
    environment = failed_on_bad_input().outcome().environment
    assert environment.num_cores >= 1
    assert environment.memory_bytes > 1e8
    assert {"torch", "onnxruntime"} <= set(environment.libraries)


def test_training_is_empty_when_it_did_not_finish():
    training = failed_in_training().outcome().training
    assert training.num_steps is None
    assert training.plan == {}
