"""The baseline and the model: tasks around a solution's `baseline` and `train`."""

import shutil
import time
from dataclasses import replace

from ml.artifacts import BaselineModel, SplitDataset, TrainedModel
from ml.evaluation.quality import scores_to_frame
from ml.runs import Run
from ml.settings import load_settings
from ml.solution import TrainContext, load_solution
from ml.stages import Stage, StageResult, run_stage
from ml.storage.artifacts import ArtifactStore
from ml.storage.checkpoints import StoredCheckpoints
from ml.storage.connect import open_artifact_store
from tasks.options import stage_task
from tasks.training_progress import TrainingProgress

BASELINE = Stage("train_baseline", 1, BaselineModel, ("scikit-learn",))
TRAIN = Stage("train_model", 1, TrainedModel, ("torch", "transformers", "tokenizers"))

# What the budget leaves to training; the rest goes to data, compression, measuring and deployment.
TRAINING_SHARE_OF_BUDGET = 0.4


@stage_task()
def train_baseline(run: Run, splits: SplitDataset) -> StageResult[BaselineModel]:
    """Train the simple model that anyone would try first; every report shows it beside the real one."""
    store, seed = open_artifact_store(), run.config.seed
    spec = load_solution(run.config.solution)

    def compute() -> BaselineModel:
        started = time.monotonic()
        frames = {name: store.get_frame(getattr(splits, name)) for name in ("train", "validation", "test")}
        result = spec.baseline(frames, splits, seed)
        return BaselineModel(
            validation_scores=store.put_frame(scores_to_frame(result.validation)),
            test_scores=store.put_frame(scores_to_frame(result.test)),
            parameters=result.parameters,
            train_seconds=time.monotonic() - started,
        )

    key = BASELINE.key(splits.train.sha256, splits.validation.sha256, splits.test.sha256, splits.labels, spec.name, seed)
    return run_stage(store, BASELINE, key, compute)


@stage_task()
def train_model(run: Run, splits: SplitDataset) -> StageResult[TrainedModel]:
    """Train through torchrun; a run that was killed resumes from its last checkpoint."""
    store, config = open_artifact_store(), run.config
    spec = load_solution(config.solution)
    model = spec.model_config.model_validate(config.model)
    key = TRAIN.key(
        splits.train.sha256,
        splits.validation.sha256,
        splits.labels,
        config.train,
        model,
        spec.base_model_digest(model),
        config.budget_minutes,
        config.seed,
        spec.name,
    )
    result = run_stage(store, TRAIN, key, lambda: _train(run, splits, store, key))
    _forget_checkpoints(store, key)
    return result


def _train(run: Run, splits: SplitDataset, store: ArtifactStore, key: str) -> TrainedModel:
    started = time.monotonic()
    config, spec = run.config, load_solution(run.config.solution)
    work_dir = load_settings().state_dir / "training" / key
    output_dir = work_dir / "bundle"
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    context = TrainContext(
        solution=config.solution,
        train_table=store.get_file(splits.train, work_dir / "train.parquet"),
        validation_table=store.get_file(splits.validation, work_dir / "validation.parquet"),
        splits=splits,
        config=config.train,
        model=spec.model_config.model_validate(config.model),
        budget_seconds=config.budget_minutes * 60 * TRAINING_SHARE_OF_BUDGET,
        seed=config.seed,
        work_dir=work_dir,
        output_dir=output_dir,
        checkpoints=StoredCheckpoints(store, key, keep_last=config.train.keep_last_checkpoints),
    )
    with TrainingProgress(config.name, work_dir, load_settings().state_dir / "metrics") as progress:
        result = spec.train(replace(context, report=progress))
    return TrainedModel(
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


def _forget_checkpoints(store: ArtifactStore, key: str) -> None:
    """The model is stored: what was kept to resume its training is not needed any more."""
    StoredCheckpoints(store, key).delete_all()
    shutil.rmtree(load_settings().state_dir / "training" / key, ignore_errors=True)
