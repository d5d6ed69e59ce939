"""Measure quality and speed, and decide: tasks around `ml.evaluation` and `ml.selection`."""

from collections.abc import Sequence

from ml.artifacts import ArtifactRef, BaselineModel, Decision, Evaluation, SplitDataset, Timings, TrainedModel, Variant
from ml.environment import describe_environment
from ml.evaluation.quality import SplitName, evaluate_bundle, evaluate_scores, scores_from_frame
from ml.evaluation.timing import measure_timings
from ml.outcome import BASELINE_NAME, UNCOMPRESSED_NAME
from ml.runs import Run
from ml.selection import final_gate, select
from ml.solution import load_solution
from ml.stages import Stage, StageResult, run_stage
from ml.storage.connect import open_artifact_store
from tasks.bundle_folders import bundle_folders
from tasks.options import stage_task
from tasks.progress import ProgressBar

EVALUATE = Stage("evaluate_model", 1, Evaluation, ("numpy", "onnxruntime", "torch", "tokenizers"))
TIMINGS = Stage("measure_models", 1, Timings, ("onnxruntime", "torch", "tokenizers"))


@stage_task()
def measure_models(run: Run, trained: TrainedModel, variants: Sequence[Variant], splits: SplitDataset) -> StageResult[Timings]:
    """Time all variants in turn, each in a process of its own, with nothing else of ours running."""
    store, spec, config = open_artifact_store(), load_solution(run.config.solution), run.config.evaluate
    bundles = {UNCOMPRESSED_NAME: trained.bundle} | {variant.name: variant.bundle for variant in variants if variant.bundle is not None}
    environment = describe_environment()
    machine = {"cpu": environment.cpu, "num_cores": environment.num_cores, "num_threads": config.num_threads}
    key = TIMINGS.key({name: ref.digest for name, ref in bundles.items()}, splits.validation.sha256, config, machine)

    def compute() -> Timings:
        requests = spec.requests(store.get_frame(splits.validation))
        with bundle_folders(store, bundles) as folders:
            return Timings(timings=measure_timings(folders, requests, config, reference=UNCOMPRESSED_NAME), machine=machine)

    return run_stage(store, TIMINGS, key, compute)


def evaluate_models(
    run: Run, split_name: SplitName, splits: SplitDataset, baseline: BaselineModel, trained: TrainedModel, variants: Sequence[Variant]
) -> list[StageResult[Evaluation]]:
    """The uncompressed model, then the baseline and every variant beside it, on the same rows of one split."""
    uncompressed = Variant(name=UNCOMPRESSED_NAME, method="none", bundle=trained.bundle)
    made = [variant for variant in variants if variant.bundle is not None]
    bar, num_models = ProgressBar(f"scoring-on-{split_name}", f"models scored on {split_name}"), 2 + len(made)

    reference = evaluate_model(run, uncompressed, splits, split_name, None)
    bar.show(1, num_models)
    scores = reference.record.quality.scores
    # Quality does not depend on what else runs, as timing does: the variants share the cores, one thread each.
    submitted = [evaluate_model.submit(run, variant, splits, split_name, scores) for variant in made]
    found = [evaluate_baseline(run, baseline, splits, split_name, scores), reference]
    for task in submitted:
        bar.show(len(found), num_models)
        found.append(task.result())
    bar.show(len(found), num_models)
    return found


@stage_task("evaluate_model: {variant.name} on {split_name}")
def evaluate_model(
    run: Run, variant: Variant, splits: SplitDataset, split_name: SplitName, reference: ArtifactRef | None
) -> StageResult[Evaluation]:
    """Score one variant on one split; `reference` holds the uncompressed model's scores of the same rows."""
    store, spec, config = open_artifact_store(), load_solution(run.config.solution), run.config.evaluate
    table, bundle = getattr(splits, split_name), variant.require_bundle()
    key = EVALUATE.key(bundle.digest, table.sha256, splits.labels, reference and reference.sha256, *_key_parts(run), variant.name)

    def compute() -> Evaluation:
        reference_scores = scores_from_frame(store.get_frame(reference)) if reference else None
        with bundle_folders(store, {variant.name: bundle}) as folders:
            folder, frame = folders[variant.name], store.get_frame(table)
            quality, _ = evaluate_bundle(folder, spec, frame, split_name, splits, config, reference_scores, store)
        return Evaluation(variant=variant.name, quality=quality)

    return run_stage(store, EVALUATE, key, compute, label=f"evaluate_model {variant.name} on {split_name}")


@stage_task("evaluate_baseline on {split_name}")
def evaluate_baseline(
    run: Run, baseline: BaselineModel, splits: SplitDataset, split_name: SplitName, reference: ArtifactRef
) -> StageResult[Evaluation]:
    """The baseline on the same rows, by the same metrics."""
    store, spec, config = open_artifact_store(), load_solution(run.config.solution), run.config.evaluate
    scores = baseline.validation_scores if split_name == "validation" else baseline.test_scores
    key = EVALUATE.key(scores.sha256, splits.labels, reference.sha256, *_key_parts(run), split_name)

    def compute() -> Evaluation:
        own, reference_scores = scores_from_frame(store.get_frame(scores)), scores_from_frame(store.get_frame(reference))
        quality = evaluate_scores(own, spec, split_name, splits, config, reference_scores, store)
        return Evaluation(variant=BASELINE_NAME, quality=quality)

    return run_stage(store, EVALUATE, key, compute, label=f"evaluate_model {BASELINE_NAME} on {split_name}")


def _key_parts(run: Run) -> tuple:
    evaluate = run.config.evaluate
    return evaluate.max_rows, evaluate.max_values, evaluate.bootstrap_resamples, run.config.seed, run.config.solution


@stage_task()
def select_model(run: Run, variants: Sequence[Variant], validation: Sequence[Evaluation]) -> Decision:
    """Hold every variant against the compression contract, on the validation split."""
    return select(tuple(validation), tuple(variants), run.config.select)


@stage_task()
def judge_model(run: Run, decision: Decision, test: Sequence[Evaluation]) -> Decision:
    """The last gate, on the test split, which nothing was chosen by: the model must beat the baseline."""
    return final_gate(decision, tuple(test), run.config.select)
