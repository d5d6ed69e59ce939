"""`python -m benchmarks.plain_pipeline REQUEST RESULT`: one run as a plain script makes it.

The same functions of `ml`, the same object store and predictor, the same outcome; no Prefect, no stage cache, no lease.
Read beside flows/training_pipeline.py, whose order it keeps.
"""

import getpass
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx

from benchmarks.pipeline_process import now, read_request, write_result
from ml.artifacts import (
    ArtifactRef,
    BaselineModel,
    Decision,
    Deployment,
    Evaluation,
    RawDataset,
    SplitDataset,
    Timings,
    TrainedModel,
    Variant,
)
from ml.bundles import read_bundle, schema_digest
from ml.compression.compress import compress, export_uncompressed
from ml.compression.registry import methods
from ml.config import RunRequest
from ml.data.cleaning import clean
from ml.data.ingest import ingest
from ml.data.sources import open_source
from ml.data.splitting import split
from ml.data.validation import validate
from ml.deployment import ask, deploy, predict_address
from ml.environment import describe_environment
from ml.errors import CompressionError
from ml.evaluation.held_out import held_out_replies
from ml.evaluation.quality import SplitName, evaluate_bundle, evaluate_scores, scores_from_frame, scores_to_frame
from ml.evaluation.timing import measure_timings
from ml.outcome import BASELINE_NAME, UNCOMPRESSED_NAME, Addresses, PipelineOutcome, RunRecords, Sample, build_outcome
from ml.registry import ModelVersion, Registry, version_id
from ml.report.confusion import confusion_matrix
from ml.report.html import render_report
from ml.runs import finish_run, start_run
from ml.selection import final_gate, select
from ml.settings import load_settings
from ml.solution import TrainContext, load_solution
from ml.storage.artifacts import ArtifactStore
from ml.storage.checkpoints import StoredCheckpoints
from ml.storage.connect import open_artifact_store
from tasks.bundle_folders import bundle_folders, scratch_folder

logger = logging.getLogger("plain_pipeline")

TRAINING_SHARE_OF_BUDGET = 0.4  # as in tasks.training
NUM_SAMPLES = 3


class PlainPipeline:
    """One run; each step is what the task of that name does when its stage record is not there."""

    def __init__(self, request: RunRequest):
        self.store = open_artifact_store()
        self.run = start_run(self.store, request)
        self.config = self.run.config
        self.spec = load_solution(self.config.solution)

    def make(self) -> PipelineOutcome:
        store, config, spec = self.store, self.config, self.spec
        raw = ingest(open_source(config.data, store), config.data, store)
        cleaned = clean(raw, spec, config.clean, store, min_rows_per_class=config.split.min_rows_per_class)
        validated = validate(cleaned, config.contract, store)
        records = RunRecords(raw=raw, clean=cleaned, validated=validated)
        if not validated.passed:
            return self.publish(records)
        splits = split(validated, config.split, config.data, store)
        logger.info("data: %s", splits.counts)

        baseline = self.train_baseline(splits)
        trained = self.train_model(splits)
        exported = self.export_model(trained)
        compressed = [self.compress_model(method, trained, exported, splits) for method in config.compression]
        variants = (exported, *compressed)

        timings = self.measure_models(trained, variants, splits)
        scored = self.evaluate_models("validation", splits, baseline, trained, variants)
        validation = tuple(evaluation.with_timing(timings) for evaluation in scored)
        decision = select(validation, variants, config.select)
        test = self.evaluate_models("test", splits, baseline, trained, variants)
        decision = final_gate(decision, test, config.select)
        found = {"splits": splits, "baseline": baseline, "trained": trained, "variants": variants, "validation": validation}
        records = records.model_copy(update={**found, "test": test, "decision": decision})
        if decision.status == "rejected":
            return self.publish(records)
        deployment = self.deploy_model(decision, variants, test, raw, splits)
        samples = self.ask_samples(deployment, splits)
        return self.publish(records.model_copy(update={"deployment": deployment, "samples": samples}))

    def train_baseline(self, splits: SplitDataset) -> BaselineModel:
        started = time.monotonic()
        frames = {name: self.store.get_frame(getattr(splits, name)) for name in ("train", "validation", "test")}
        result = self.spec.baseline(frames, splits, self.config.seed)
        return BaselineModel(
            validation_scores=self.store.put_frame(scores_to_frame(result.validation)),
            test_scores=self.store.put_frame(scores_to_frame(result.test)),
            parameters=result.parameters,
            train_seconds=time.monotonic() - started,
        )

    def train_model(self, splits: SplitDataset) -> TrainedModel:
        store, config, started = self.store, self.config, time.monotonic()
        with scratch_folder("training") as work_dir:
            output_dir = work_dir / "bundle"
            output_dir.mkdir()
            checkpoints = StoredCheckpoints(store, self.run.run_id)
            result = self.spec.train(
                TrainContext(
                    solution=config.solution,
                    train_table=store.get_file(splits.train, work_dir / "train.parquet"),
                    validation_table=store.get_file(splits.validation, work_dir / "validation.parquet"),
                    splits=splits,
                    config=config.train,
                    model=self.spec.model_config.model_validate(config.model),
                    budget_seconds=config.budget_minutes * 60 * TRAINING_SHARE_OF_BUDGET,
                    seed=config.seed,
                    work_dir=work_dir,
                    output_dir=output_dir,
                    checkpoints=checkpoints,
                    report=lambda record: logger.info("training: %s", record),
                )
            )
            trained = TrainedModel(
                bundle=store.put_folder(output_dir),
                history=store.put_file(result.history_path),
                num_parameters=result.num_parameters,
                num_train_rows=result.num_train_rows,
                num_steps=result.num_steps,
                best_step=result.best_step,
                resumed_from_step=result.resumed_from_step,
                num_recomputed_steps=result.num_recomputed_steps,
                seconds=time.monotonic() - started,
                plan=result.plan,
                warnings=result.warnings,
            )
            checkpoints.delete_all()
            return trained

    def export_model(self, trained: TrainedModel) -> Variant:
        with scratch_folder("export") as folder:
            variant = export_uncompressed(self.spec, trained.bundle, self.store, folder)
        if variant.bundle is None:
            raise CompressionError(f"the trained model could not be exported to ONNX: {variant.failure}")
        return variant

    def compress_model(self, method_config: dict, trained: TrainedModel, exported: Variant, splits: SplitDataset) -> Variant:
        logger.info("compressing: %s", method_config["name"])
        calibrated = methods()[method_config["method"]].requires_calibration
        requests = self.spec.requests(self.store.get_frame(splits.train)) if calibrated else []
        bundle = exported.require_bundle()
        with scratch_folder("compress") as folder:
            return compress(method_config, self.spec, trained.bundle, bundle, requests, self.store, folder, self.config.seed)

    def measure_models(self, trained: TrainedModel, variants: Sequence[Variant], splits: SplitDataset) -> Timings:
        bundles = {UNCOMPRESSED_NAME: trained.bundle} | {variant.name: variant.bundle for variant in variants if variant.bundle is not None}
        environment, config = describe_environment(), self.config.evaluate
        machine = {"cpu": environment.cpu, "num_cores": environment.num_cores, "num_threads": config.num_threads}
        requests = self.spec.requests(self.store.get_frame(splits.validation))
        with bundle_folders(self.store, bundles) as folders:
            return Timings(timings=measure_timings(folders, requests, config, reference=UNCOMPRESSED_NAME), machine=machine)

    def evaluate_models(
        self, split_name: SplitName, splits: SplitDataset, baseline: BaselineModel, trained: TrainedModel, variants: Sequence[Variant]
    ) -> tuple[Evaluation, ...]:
        uncompressed = Variant(name=UNCOMPRESSED_NAME, method="none", bundle=trained.bundle)
        reference = self.evaluate_model(uncompressed, splits, split_name, None)
        scores = reference.quality.scores
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = [variant for variant in variants if variant.bundle is not None]
            others = [pool.submit(self.evaluate_model, variant, splits, split_name, scores) for variant in made]
            own = scores_from_frame(
                self.store.get_frame(baseline.validation_scores if split_name == "validation" else baseline.test_scores)
            )
            paired = scores_from_frame(self.store.get_frame(scores))
            quality = evaluate_scores(own, self.spec, split_name, splits, self.config.evaluate, paired, self.store)
            return (Evaluation(variant=BASELINE_NAME, quality=quality), reference, *(other.result() for other in others))

    def evaluate_model(self, variant: Variant, splits: SplitDataset, split_name: SplitName, reference: ArtifactRef | None) -> Evaluation:
        logger.info("evaluating %s on %s", variant.name, split_name)
        store, config = self.store, self.config.evaluate
        paired = scores_from_frame(store.get_frame(reference)) if reference else None
        with bundle_folders(store, {variant.name: variant.require_bundle()}) as folders:
            frame = store.get_frame(getattr(splits, split_name))
            quality, _ = evaluate_bundle(folders[variant.name], self.spec, frame, split_name, splits, config, paired, store)
        return Evaluation(variant=variant.name, quality=quality)

    def deploy_model(
        self, decision: Decision, variants: Sequence[Variant], test: Sequence[Evaluation], raw: RawDataset, splits: SplitDataset
    ) -> Deployment:
        store, config = self.store, self.config
        bundle = next(variant.require_bundle() for variant in variants if variant.name == decision.variant)
        quality = next(evaluation.quality for evaluation in test if evaluation.variant == decision.variant)
        with bundle_folders(store, {config.name: bundle}) as folders:
            folder = folders[config.name]
            offline = scores_from_frame(store.get_frame(quality.scores))
            held_out = held_out_replies(folder, self.spec, store.get_frame(splits.test), offline, config.deploy.smoke_rows)
            described, created = read_bundle(folder), datetime.now(UTC)
            version = ModelVersion(
                name=config.name,
                version=version_id(created, bundle),
                solution=config.solution,
                bundle=bundle,
                schema_digest=schema_digest(described),
                options=described.options,
                run_id=self.run.run_id,
                data={name: ref.sha256 for name, ref in raw.objects.items()},
                metrics={name: interval.value for name, interval in quality.metrics.items()},
                created=created,
                provenance=described.provenance,
            )
            url, why = load_settings().predictor_url, f"run {self.run.run_id} chose {decision.variant}"
            return deploy(Registry(store), version, folder, held_out, predictor_url=url, who=getpass.getuser(), why=why)

    def ask_samples(self, deployment: Deployment, splits: SplitDataset) -> tuple[Sample, ...]:
        is_demo = self.config.data.source.startswith("package:")
        test = self.store.get_frame(splits.test)
        requests = self.spec.sample_requests if is_demo else self.spec.requests(test.head(NUM_SAMPLES))
        with httpx.Client(base_url=load_settings().predictor_url or "", timeout=30, trust_env=False) as client:
            replies = list(ask(client, deployment.name, requests))
        return tuple(Sample(request=request, reply=reply) for request, reply in zip(requests, replies, strict=True))

    def publish(self, records: RunRecords) -> PipelineOutcome:
        run, folder, url = self.run, load_settings().state_dir / "runs" / self.run.run_id, load_settings().predictor_url
        addresses = Addresses(
            predict_url=predict_address(url, run.config.name) if url else None,
            api_docs_url=f"{url}/openapi.json" if url else None,
            report_path=str(folder / "report.html"),
            outcome_path=str(folder / "outcome.json"),
        )
        records = records.model_copy(update={"addresses": addresses})
        outcome = build_outcome(run.run_id, run.config, records, run.started, datetime.now(UTC), None)
        html = render(self.store, outcome, records)
        finish_run(self.store, run, records, outcome, html)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(html, encoding="utf-8")
        (folder / "outcome.json").write_text(outcome.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return outcome


def render(store: ArtifactStore, outcome: PipelineOutcome, records: RunRecords) -> str:
    history, matrices, labels = [], {}, ()
    if records.trained is not None:
        history = [json.loads(line) for line in store.get_bytes(records.trained.history).splitlines()]
    if records.splits is not None:
        labels = records.splits.labels
        shown = {UNCOMPRESSED_NAME, records.decision.variant if records.decision else None}
        for evaluation in records.test:
            if evaluation.variant in shown:
                scores = scores_from_frame(store.get_frame(evaluation.quality.scores))
                matrices[evaluation.variant] = confusion_matrix(scores, len(labels))
    return render_report(outcome, history, records.splits.summary if records.splits else {}, matrices, labels)


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    for name in ("ml", "solutions", "plain_pipeline"):
        logging.getLogger(name).setLevel(logging.INFO)
    request = read_request(Path(sys.argv[1]))
    began = now()
    outcome = PlainPipeline(request).make()
    moments = {"imported": began, "body_began": began, "body_ended": now()}
    if "prefect" in sys.modules:
        raise SystemExit("prefect was imported: this is no plain script any more")
    write_result(Path(sys.argv[2]), outcome.run_id, moments)


if __name__ == "__main__":
    main()
