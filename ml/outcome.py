"""What came of a run, in one JSON document with the same keys whatever happened: `outcome.json`.

The document is written for scripts as much as for people; docs/outcome.md explains every key, and
docs/outcome.schema.json is its JSON Schema (written by `python -m ml.outcome`).
"""

import json
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field
from pydantic.json_schema import GenerateJsonSchema

from ml.artifacts import (
    EXPORT_METHOD,
    BaselineModel,
    ClauseResult,
    CleanDataset,
    Decision,
    Deployment,
    Evaluation,
    Interval,
    RawDataset,
    Record,
    RuleResult,
    SplitDataset,
    Timing,
    TrainedModel,
    ValidatedDataset,
    Variant,
)
from ml.config import RunConfig
from ml.environment import Environment, describe_environment
from ml.errors import MillstreamError
from ml.events import Cause

# Names of the rows that every run has; the others are named by the `compression` list of the config.
BASELINE_NAME = "baseline"
UNCOMPRESSED_NAME = "pytorch_fp32"

REJECTED_EXIT_CODE = 3

Status = Literal["deployed", "deployed_uncompressed", "unchanged", "rejected", "failed"]


class StageTiming(Record):
    """One stage of the run; `reused` when its stored result was found instead of computed."""

    stage: str
    key: str
    reused: bool
    seconds: float


class Sample(Record):
    """A request that the served model has just answered."""

    request: dict[str, Any]
    reply: dict[str, Any]


class Addresses(Record):
    """Where to look next."""

    predict_url: str | None = None
    api_docs_url: str | None = None
    prefect_ui_url: str | None = None
    flow_run_url: str | None = None
    report_path: str | None = None
    outcome_path: str | None = None


class RunRecords(Record):
    """Everything that a run has produced so far. A run that ends early leaves the rest empty."""

    raw: RawDataset | None = None
    clean: CleanDataset | None = None
    validated: ValidatedDataset | None = None
    splits: SplitDataset | None = None
    baseline: BaselineModel | None = None
    trained: TrainedModel | None = None
    variants: tuple[Variant, ...] = ()
    validation: tuple[Evaluation, ...] = ()
    decision: Decision | None = None
    test: tuple[Evaluation, ...] = ()
    deployment: Deployment | None = None
    stages: tuple[StageTiming, ...] = ()
    samples: tuple[Sample, ...] = ()
    addresses: Addresses = Addresses()
    warnings: tuple[str, ...] = ()
    current_stage: str | None = Field(default=None, description="the stage that was started last; named when the run fails")


class RunFailure(Record):
    type: str
    message: str
    stage: str | None


class SourceObject(Record):
    sha256: str
    size_bytes: int


class RowCounts(Record):
    raw: int | None = None
    clean: int | None = None
    validated: int | None = None
    dropped: int | None = None
    quarantined: int | None = None


class DataSummary(Record):
    source: str
    objects: dict[str, SourceObject] = Field(default_factory=dict)
    rows: RowCounts = RowCounts()
    cleaning_counts: dict[str, int] = Field(default_factory=dict, description="cleaning rule -> rows it changed or dropped")
    quarantine_counts: dict[str, int] = Field(default_factory=dict, description="row rule of the data contract -> rows that broke it")
    rules: tuple[RuleResult, ...] = Field(default=(), description="every rule of the data contract, checked")
    labels: tuple[str, ...] = ()
    positive_label: str | None = None
    split_counts: dict[str, dict[str, int]] = Field(default_factory=dict, description="split -> label -> rows")


class TrainingSummary(Record):
    precision: str | None = None
    epochs: float | None = None
    num_ranks: int | None = None
    num_parameters: int | None = None
    num_rows: int | None = None
    num_steps: int | None = None
    best_step: int | None = None
    resumed_from_step: int | None = None
    num_recomputed_steps: int | None = None
    seconds: float | None = None
    plan: dict[str, Any] = Field(default_factory=dict, description="all that was decided before training")


class SplitQuality(Record):
    num_rows: int | None = None
    metrics: dict[str, Interval] = Field(default_factory=dict, description="metric -> value with 95 % interval; the primary one first")
    drop_points: Interval | None = Field(default=None, description="uncompressed minus this model, primary metric, in points")


class ModelRow(Record):
    """One row of the before/after table."""

    name: str
    role: Literal["baseline", "uncompressed", "variant"]
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    status: Literal["ok", "failed"] = "ok"
    failure: str | None = None
    chosen: bool = False
    bundle_sha256: str | None = None
    seconds: float | None = Field(default=None, description="time it took to make")
    validation: SplitQuality = SplitQuality()
    test: SplitQuality = SplitQuality()
    timing: Timing | None = None
    clauses: tuple[ClauseResult, ...] = ()


class DecisionSummary(Record):
    status: Literal["selected", "uncompressed", "rejected"] | None = None
    variant: str | None = None
    reasons: tuple[str, ...] = ()


class PipelineOutcome(Record):
    """`outcome.json`. Keys are the same for every status: null or empty where the run did not get that far."""

    schema_version: Literal[1] = 1
    status: Status
    exit_code: int
    reasons: tuple[str, ...]
    error: RunFailure | None
    run_id: str
    name: str
    solution: str
    profile: str
    cause: Cause = Field(default=Cause(), description="what asked for the run")
    started: str = Field(description="ISO 8601, UTC")
    finished: str = Field(description="ISO 8601, UTC")
    seconds: float
    data: DataSummary
    training: TrainingSummary
    models: tuple[ModelRow, ...]
    decision: DecisionSummary
    alias: str | None
    version: str | None
    previous_version: str | None
    stages: tuple[StageTiming, ...]
    samples: tuple[Sample, ...]
    addresses: Addresses
    environment: Environment
    config: dict[str, Any] = Field(description="the resolved settings of the run")
    warnings: tuple[str, ...]


def build_outcome(
    run_id: str,
    config: RunConfig,
    records: RunRecords,
    started: datetime,
    finished: datetime,
    error: BaseException | None = None,
) -> PipelineOutcome:
    """Put together what a run has produced. Never raises because something is missing.

    Args:
        started, finished: with time zone.
        error: what ended the run, when it did not reach its end; it outweighs all else in `status`.
    """
    status, reasons = _judge(records, error)
    deployment = records.deployment
    live = status in ("deployed", "deployed_uncompressed", "unchanged")
    addresses = records.addresses
    if addresses.predict_url is None and deployment is not None:
        addresses = addresses.model_copy(update={"predict_url": deployment.predict_url})
    decision = records.decision
    return PipelineOutcome(
        status=status,
        exit_code=_exit_code(status, error),
        reasons=reasons,
        error=None if error is None else RunFailure(type=type(error).__name__, message=_message(error), stage=records.current_stage),
        run_id=run_id,
        name=config.name,
        solution=config.solution,
        profile=config.profile,
        cause=config.cause,
        started=_utc(started),
        finished=_utc(finished),
        seconds=round((finished - started).total_seconds(), 3),
        data=_data_summary(config, records),
        training=_training_summary(config, records.trained),
        models=_model_rows(records),
        decision=DecisionSummary(**decision.model_dump(exclude={"clauses"})) if decision else DecisionSummary(),
        alias=config.deploy.alias if live else None,
        version=deployment.version if deployment else None,
        previous_version=deployment.previous_version if deployment else None,
        stages=records.stages,
        samples=records.samples,
        addresses=addresses,
        environment=describe_environment(),
        config=config.model_dump(mode="json"),
        warnings=_warnings(records),
    )


class _EveryKeyRequired(GenerateJsonSchema):
    """A written document holds every key, so a reader may rely on it, also on those that have a default here."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return True


def outcome_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `outcome.json`; all keys are required."""
    schema = PipelineOutcome.model_json_schema(mode="serialization", schema_generator=_EveryKeyRequired)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _judge(records: RunRecords, error: BaseException | None) -> tuple[Status, tuple[str, ...]]:
    """Status and reasons in words. What happened last in the pipeline outweighs what happened before."""
    if error is not None:
        return "failed", (_message(error),)
    deployment, decision, validated = records.deployment, records.decision, records.validated
    reasons = decision.reasons if decision else ()
    if deployment is not None:
        if deployment.status == "deployed":
            chose_uncompressed = decision is not None and decision.status == "uncompressed"
            return "deployed_uncompressed" if chose_uncompressed else "deployed", reasons + deployment.reasons
        # The decision stands, but it is the deployment's words that say why nothing new is served.
        return deployment.status, deployment.reasons + reasons
    if decision is not None and decision.status == "rejected":
        return "rejected", reasons
    if validated is not None and not validated.passed:
        return "rejected", validated.failures
    return "failed", (f"the run ended after {records.current_stage or 'it started'} without a decision and without an error; see its log",)


def _exit_code(status: Status, error: BaseException | None) -> int:
    if isinstance(error, MillstreamError):
        return error.exit_code
    return {"rejected": REJECTED_EXIT_CODE, "failed": 1}.get(status, 0)


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _data_summary(config: RunConfig, records: RunRecords) -> DataSummary:
    raw, clean, validated, splits = records.raw, records.clean, records.validated, records.splits
    row_rules = [result for result in validated.results if result.level == "row"] if validated else []
    return DataSummary(
        source=raw.source if raw else config.data.source,
        objects={name: SourceObject(sha256=ref.sha256, size_bytes=ref.size_bytes) for name, ref in raw.objects.items()} if raw else {},
        rows=RowCounts(
            raw=raw.num_rows if raw else None,
            clean=clean.num_rows if clean else None,
            validated=validated.num_rows if validated else None,
            dropped=clean.num_rows_in - clean.num_rows if clean else None,
            quarantined=validated.num_quarantined if validated else None,
        ),
        cleaning_counts=clean.rule_counts if clean else {},
        quarantine_counts={result.rule: result.num_failed for result in row_rules},
        rules=validated.results if validated else (),
        labels=splits.labels if splits else (),
        positive_label=splits.positive_label if splits else None,
        split_counts=splits.counts if splits else {},
    )


def _training_summary(config: RunConfig, trained: TrainedModel | None) -> TrainingSummary:
    if trained is None:
        return TrainingSummary()
    return TrainingSummary(
        precision=trained.plan.get("precision"),
        epochs=trained.plan.get("epochs"),
        num_ranks=trained.plan.get("num_ranks", config.train.num_ranks),
        num_parameters=trained.num_parameters,
        num_rows=trained.num_train_rows,
        num_steps=trained.num_steps,
        best_step=trained.best_step,
        resumed_from_step=trained.resumed_from_step,
        num_recomputed_steps=trained.num_recomputed_steps,
        seconds=trained.seconds,
        plan=trained.plan,
    )


def _model_rows(records: RunRecords) -> tuple[ModelRow, ...]:
    """Baseline, the trained model, its export, the compressed variants: in the order in which they were made."""
    rows = []
    if records.baseline is not None:
        baseline = records.baseline
        rows.append(
            ModelRow(name=BASELINE_NAME, role="baseline", method="baseline", parameters=baseline.parameters, seconds=baseline.train_seconds)
        )
    if records.trained is not None:
        trained = records.trained
        rows.append(
            ModelRow(
                name=UNCOMPRESSED_NAME,
                role="uncompressed",
                method="train",
                bundle_sha256=trained.bundle.digest,
                seconds=trained.seconds,
            )
        )
    for variant in records.variants:
        rows.append(
            ModelRow(
                name=variant.name,
                role="uncompressed" if variant.method == EXPORT_METHOD else "variant",
                method=variant.method,
                parameters=variant.parameters,
                status="ok" if variant.failure is None else "failed",
                failure=variant.failure,
                bundle_sha256=variant.bundle.digest if variant.bundle else None,
                seconds=variant.seconds,
            )
        )
    return tuple(_judged_row(row, records) for row in rows)


def _judged_row(row: ModelRow, records: RunRecords) -> ModelRow:
    decision = records.decision
    validation = next((item for item in records.validation if item.variant == row.name), None)
    test = next((item for item in records.test if item.variant == row.name), None)
    return row.model_copy(
        update={
            "chosen": decision is not None and decision.status != "rejected" and decision.variant == row.name,
            "validation": _split_quality(validation),
            "test": _split_quality(test),
            "timing": validation.timing if validation else None,
            "clauses": decision.clauses.get(row.name, ()) if decision else (),
        }
    )


def _split_quality(evaluation: Evaluation | None) -> SplitQuality:
    if evaluation is None:
        return SplitQuality()
    quality = evaluation.quality
    return SplitQuality(num_rows=quality.num_rows, metrics=quality.metrics, drop_points=quality.primary_drop_points)


def _warnings(records: RunRecords) -> tuple[str, ...]:
    found = [*records.warnings]
    found += records.splits.warnings if records.splits else ()
    found += records.trained.warnings if records.trained else ()
    found += [f"compression method {variant.name} failed: {variant.failure}" for variant in records.variants if variant.failure]
    return tuple(dict.fromkeys(found))


def schema_text() -> str:
    """The text of docs/outcome.schema.json."""
    return json.dumps(outcome_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from ml.settings import REPOSITORY_ROOT

    (REPOSITORY_ROOT / "docs" / "outcome.schema.json").write_text(schema_text(), encoding="utf-8")
