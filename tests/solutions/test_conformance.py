"""What every solution has to keep, whoever writes it. A new folder in `solutions/` is found and tested by itself."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from ml.bundles import read_bundle
from ml.compression.registry import methods
from ml.config import EvaluateConfig, RunRequest, resolve_config
from ml.evaluation.quality import evaluate_bundle, evaluate_scores
from ml.evaluation.timing import measure_timings
from ml.predictor import load_predictor
from ml.solution import load_solution, solution_folder, solution_names
from tests.solutions.conftest import SOLUTION_NAMES, TrainedSolution

HEAVY = ("torch", "transformers", "pandas", "sklearn", "scipy", "matplotlib", "great_expectations", "onnx", "prefect")
EVALUATE = EvaluateConfig(
    max_rows=60,
    bootstrap_resamples=100,
    latency_length_tokens=8,
    throughput_batch_size=4,
    rounds=3,
    calls_per_round=3,
    memory_requests=20,
)


def test_the_suite_sees_the_shipped_solutions_and_the_example() -> None:
    assert {"sentiment", "retriever"} <= set(SOLUTION_NAMES)
    assert solution_names() == SOLUTION_NAMES


def test_the_spec_bears_the_name_of_its_folder(solution_name: str) -> None:
    spec = load_solution(solution_name)
    assert spec.name == solution_name
    assert spec.title
    assert spec.sample_requests


def test_importing_the_spec_imports_nothing_heavy(solution_name: str) -> None:
    code = f"import sys, solutions.{solution_name}.spec; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_every_profile_resolves(solution_name: str) -> None:
    settings = yaml.safe_load((solution_folder(solution_name) / "config.yaml").read_text(encoding="utf-8"))
    assert "quick" in settings["profiles"]
    for profile in settings["profiles"]:
        config = resolve_config(RunRequest(solution=solution_name, profile=profile))
        assert (config.solution, config.name, config.profile) == (solution_name, solution_name, profile)
        load_solution(solution_name).model_config.model_validate(config.model)
        assert config.contract
        json.loads(config.model_dump_json())


def test_bundles_say_in_json_schema_what_they_take_and_give(trained: TrainedSolution) -> None:
    bundles = [read_bundle(folder) for folder in trained.folders.values()]
    for bundle in bundles:
        assert bundle.solution == trained.spec.name
        for schema in (bundle.input_schema, bundle.output_schema):
            jsonschema.Draft202012Validator.check_schema(schema)
    assert bundles[0].input_schema == bundles[1].input_schema
    assert bundles[0].output_schema == bundles[1].output_schema


def test_requests_and_replies_keep_the_schemas(trained: TrainedSolution) -> None:
    for folder in trained.folders.values():
        predictor = load_predictor(folder)
        requests = [*trained.spec.sample_requests, *trained.requests[:5]]
        replies = predictor.predict(requests)
        assert len(replies) == len(requests)
        for request, reply in zip(requests, replies, strict=True):
            jsonschema.validate(request, predictor.bundle.input_schema)
            jsonschema.validate(json.loads(json.dumps(reply)), predictor.bundle.output_schema)


def test_a_row_gets_the_same_answer_alone_and_in_a_batch(trained: TrainedSolution) -> None:
    predictor = load_predictor(trained.folders["onnx_fp32"])
    together = predictor.outputs(trained.requests[:8])
    for number, request in enumerate(trained.requests[:8]):
        for name, values in predictor.outputs([request]).items():
            np.testing.assert_allclose(together[name][number], values[0], atol=1e-5)


def test_the_codec_gives_what_the_graph_names(trained: TrainedSolution) -> None:
    for folder in trained.folders.values():
        bundle = read_bundle(folder)
        encoded = trained.spec.load_codec(bundle, folder).encode(trained.requests[:3])
        for tensor in next(iter(bundle.graphs.values())).inputs:
            assert encoded[tensor.name].dtype == tensor.dtype
            assert encoded[tensor.name].shape[0] == 3
            assert encoded[tensor.name].ndim == len(tensor.shape)


def test_metrics_of_the_trained_model_are_shares_and_beat_the_baseline_it_brings(trained: TrainedSolution) -> None:
    metrics = trained.spec.metrics(trained.splits)
    assert len({metric.name for metric in metrics}) == len(metrics)
    validation = trained.frames["validation"]
    quality, scores = evaluate_bundle(
        trained.folders["pytorch_fp32"], trained.spec, validation, "validation", trained.splits, EVALUATE, None, trained.store
    )
    assert list(quality.metrics) == [metric.name for metric in metrics]
    assert all(0 <= interval.low <= interval.value <= interval.high <= 1 for interval in quality.metrics.values())
    # The toy questions can be told apart almost without error: whoever does not is not trained or scores other rows.
    primary = quality.metrics[metrics[0].name].value
    assert primary > 0.8 if metrics[0].higher_is_better else primary < 0.2

    baseline = trained.spec.baseline(trained.frames, trained.splits, 0)
    assert list(baseline.validation.row_ids) == list(validation["row_id"])
    assert list(baseline.test.row_ids) == list(trained.frames["test"]["row_id"])
    judged = evaluate_scores(baseline.validation, trained.spec, "validation", trained.splits, EVALUATE, scores, trained.store)
    assert judged.num_rows == quality.num_rows == 60
    assert judged.primary_drop_points is not None


def test_the_export_answers_as_the_trained_model_does(trained: TrainedSolution) -> None:
    validation = trained.frames["validation"]
    torch_scores, onnx_scores = (trained.spec.score(load_predictor(folder), validation) for folder in trained.folders.values())
    assert list(torch_scores.row_ids) == list(onnx_scores.row_ids) == list(validation["row_id"])
    for name, values in torch_scores.columns.items():
        assert len(values) == len(validation)
        np.testing.assert_allclose(values, onnx_scores.columns[name], atol=1e-4)


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_compression_method_takes_it(trained: TrainedSolution, method: str) -> None:
    folder = trained.compressed(method)
    source, made = read_bundle(trained.folders["onnx_fp32"]), read_bundle(folder)
    assert made.options == source.options
    assert made.side_files == source.side_files
    assert made.output_schema == source.output_schema
    metric = trained.spec.metrics(trained.splits)[0]
    validation = trained.frames["validation"]
    folders = (trained.folders["onnx_fp32"], folder)
    before, after = (metric.compute(trained.spec.score(load_predictor(path), validation)) for path in folders)
    assert abs(before - after) < 0.1


def test_it_can_be_timed_in_processes_of_its_own(trained: TrainedSolution) -> None:
    bundles = trained.folders | {"dynamic_int8": trained.compressed("dynamic_int8")}
    timings = measure_timings(bundles, trained.requests, EVALUATE)
    assert set(timings) == set(bundles)
    assert timings["dynamic_int8"].file_bytes < timings["onnx_fp32"].file_bytes
    assert timings["onnx_fp32"].memory_ratio < 1


def test_training_left_weights_without_pickles(trained: TrainedSolution) -> None:
    names = {path.name for folder in trained.folders.values() for path in Path(folder).rglob("*") if path.is_file()}
    assert not [name for name in names if Path(name).suffix in {".pt", ".pth", ".bin", ".pkl", ".pickle", ".joblib", ".npy"}]
