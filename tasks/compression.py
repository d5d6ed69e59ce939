"""Export and compress: tasks around `ml.compression`. A method that fails is a variant without a bundle, not a failed run."""

from ml.artifacts import SplitDataset, TrainedModel, Variant
from ml.compression.compress import compress, compression_key_parts, export_uncompressed
from ml.compression.registry import methods
from ml.errors import CompressionError
from ml.runs import Run
from ml.solution import load_solution
from ml.stages import Stage, StageResult, run_stage
from ml.storage.connect import open_artifact_store
from tasks.bundle_folders import scratch_folder
from tasks.options import stage_task
from tasks.progress import ProgressBar

EXPORT = Stage("export_model", 1, Variant, ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"))


@stage_task()
def export_model(run: Run, trained: TrainedModel) -> StageResult[Variant]:
    """Export the uncompressed model to ONNX Runtime, where every compressed variant starts or ends."""
    store, spec = open_artifact_store(), load_solution(run.config.solution)

    def compute() -> Variant:
        with scratch_folder("export") as folder:
            variant = export_uncompressed(spec, trained.bundle, store, folder)
        if variant.bundle is None:
            raise CompressionError(f"the trained model could not be exported to ONNX, so nothing can be served: {variant.failure}")
        return variant

    return run_stage(store, EXPORT, EXPORT.key(trained.bundle.digest, spec.name), compute)


def compress_models(run: Run, trained: TrainedModel, exported: Variant, splits: SplitDataset) -> list[StageResult[Variant]]:
    """Every variant that the config lists, one after the other."""
    methods_to_try = run.config.compression
    bar, results = ProgressBar("compression", "variants made"), []
    for method_config in methods_to_try:
        results.append(compress_model(run, method_config, trained, exported, splits))
        bar.show(len(results), len(methods_to_try))
    return results


@stage_task("compress_model: {method_config[name]}")
def compress_model(run: Run, method_config: dict, trained: TrainedModel, exported: Variant, splits: SplitDataset) -> StageResult[Variant]:
    """Make one compressed variant."""
    store, spec, seed = open_artifact_store(), load_solution(run.config.solution), run.config.seed
    method = methods()[method_config["method"]]
    stage = Stage("compress_model", 1, Variant, method.libraries)
    onnx_bundle = exported.require_bundle()
    calibration_digest = splits.train.sha256 if method.requires_calibration else None
    parts = compression_key_parts(method_config)
    key = stage.key(trained.bundle.digest, onnx_bundle.digest, calibration_digest, parts, seed, spec.name)

    def compute() -> Variant:
        requests = spec.requests(store.get_frame(splits.train)) if method.requires_calibration else []
        with scratch_folder("compress") as folder:
            return compress(method_config, spec, trained.bundle, onnx_bundle, requests, store, folder, seed)

    # A failure may pass next time (memory, disk): it is reported, but not remembered.
    label = f"compress_model {method_config['name']}"
    return run_stage(store, stage, key, compute, label=label, keep=lambda variant: variant.bundle is not None)
