"""The whole pipeline on one screen: raw data in, a small, fast, deployed model out, or a clear reason why not."""

import os

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.journal import Journal
from ml.config import RunRequest
from ml.outcome import PipelineOutcome
from tasks.cause import run_title
from tasks.compression import compress_models, export_model
from tasks.data import clean_data, ingest_data, split_data, validate_data
from tasks.deployment import ask_samples, deploy_model
from tasks.evaluation import evaluate_models, judge_model, measure_models, select_model
from tasks.training import train_baseline, train_model


@flow(
    name="training-pipeline",
    flow_run_name=run_title,
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1),  # type: ignore[arg-type]
    persist_result=False,
)
def training_pipeline(request: RunRequest) -> PipelineOutcome:
    """Train, compress, judge and serve one model. Tasks hand each other small records; bytes stay in object storage."""
    with Journal(request) as journal:
        run = journal.run
        raw = journal.keep("raw", ingest_data(run))
        cleaned = journal.keep("clean", clean_data(run, raw))
        validated = journal.keep("validated", validate_data(run, cleaned))
        if not validated.passed:
            return journal.close()
        splits = journal.keep("splits", split_data(run, validated))

        baseline = journal.keep("baseline", train_baseline(run, splits))
        trained = journal.keep("trained", train_model(run, splits))
        exported = journal.keep(None, export_model(run, trained))
        variants = (exported, *journal.keep_all("variants", compress_models(run, trained, exported, splits)))
        journal.note(variants=variants)

        # Chosen on validation; the test split is scored once, after the choice.
        timings = journal.keep(None, measure_models(run, trained, variants, splits))
        scored = evaluate_models(run, "validation", splits, baseline, trained, variants)
        validation = tuple(evaluation.with_timing(timings) for evaluation in journal.keep_all("validation", scored))
        journal.note(validation=validation)
        decision = select_model(run, variants, validation)

        test = journal.keep_all("test", evaluate_models(run, "test", splits, baseline, trained, variants))
        decision = judge_model(run, decision, test)
        journal.note(decision=decision)
        if decision.status == "rejected":
            return journal.close()

        deployment = deploy_model(run, decision, variants, test, raw, splits)
        journal.note(deployment=deployment, samples=ask_samples(run, deployment, splits))
        return journal.close()
