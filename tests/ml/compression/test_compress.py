"""What surrounds a method: fetching, checking, storing, and telling a failure in words."""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ml.artifacts import Variant
from ml.bundles import Bundle, read_bundle
from ml.compression import compress as compress_module
from ml.compression.compress import compression_key_parts, export_uncompressed
from ml.compression.registry import CompressionContext, CompressionMethod, MethodConfig
from ml.compression.weights import weights_bytes
from ml.errors import CompressionError, ConfigError, StorageUnavailableError
from tests.ml.compression.conftest import TinyModel, logits


class MadeUpConfig(MethodConfig):
    method: Literal["made_up"] = "made_up"


Compress = Callable[[MadeUpConfig, CompressionContext], Bundle]


@pytest.fixture
def run_made_up(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Compress], Variant]:
    """Runs a method that exists for one test only."""

    def run(function: Compress) -> Variant:
        method = CompressionMethod("made_up", "Made up", MadeUpConfig, "onnx", False, function)
        monkeypatch.setattr("ml.compression.registry.methods", lambda: {"made_up": method})
        monkeypatch.setattr(compress_module, "methods", lambda: {"made_up": method})
        return tiny_model.compress({"method": "made_up"}, tmp_path)

    return run


def copy_of_source(context: CompressionContext, change: Callable[[np.ndarray], np.ndarray] = lambda values: values) -> Bundle:
    source = read_bundle(context.onnx_bundle)
    for name in (*source.side_files, *(graph.file for graph in source.graphs.values())):
        (context.output_dir / name).write_bytes((context.onnx_bundle / name).read_bytes())
    (graph,) = source.graphs.values()
    model = onnx.load(context.output_dir / graph.file)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, context.output_dir / graph.file)
    return source


@pytest.fixture(scope="module")
def exported(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return export_uncompressed(tiny_model.spec, tiny_model.torch_ref, tiny_model.store, tmp_path_factory.mktemp("export"))


def test_the_export_is_a_variant_with_the_answers_of_the_trained_model(tiny_model: TinyModel, exported: Variant, tmp_path: Path):
    assert (exported.name, exported.method, exported.failure) == ("onnx_fp32", "export", None)
    folder = tiny_model.fetch(exported, tmp_path / "exported")
    bundle = read_bundle(folder)
    assert bundle.provenance["source_bundle"] == tiny_model.torch_ref.digest
    assert bundle.provenance["weights_bytes"] == weights_bytes(bundle, folder)
    assert bundle.provenance["libraries"]["torch"] == importlib.metadata.version("torch")
    found = logits(folder, tiny_model.spec, tiny_model.test_requests)
    expected = logits(tiny_model.onnx_dir, tiny_model.spec, tiny_model.test_requests)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_export_that_fails_is_told_in_words(tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def refuse(torch_folder: Path, output_folder: Path) -> Bundle:
        raise RuntimeError("operator aten::mystery\nis not known")

    spec = dataclasses.replace(tiny_model.spec, export_onnx=refuse)
    variant = export_uncompressed(spec, tiny_model.torch_ref, tiny_model.store, tmp_path)
    assert variant.bundle is None
    assert variant.failure == "RuntimeError: operator aten::mystery is not known"
    assert "Traceback" in caplog.text


def test_a_method_that_raises_is_a_variant_without_a_bundle(run_made_up, caplog: pytest.LogCaptureFixture):
    def fail(config: MadeUpConfig, context: CompressionContext) -> Bundle:
        raise CompressionError("the model has no layer that could shrink")

    with caplog.at_level(logging.ERROR):
        variant = run_made_up(fail)
    assert variant.name == "made_up"
    assert variant.bundle is None
    assert variant.failure == "the model has no layer that could shrink"
    assert "in fail" in caplog.text, "the log must hold the traceback"


def test_a_store_that_does_not_answer_is_not_the_method_s_failure(run_made_up):
    def lose_the_store(config: MadeUpConfig, context: CompressionContext) -> Bundle:
        raise StorageUnavailableError("s3 does not answer")

    with pytest.raises(StorageUnavailableError):
        run_made_up(lose_the_store)


def test_a_copy_of_the_source_passes_the_checks(run_made_up):
    """So that the refusals below are not for another reason."""
    variant = run_made_up(lambda config, context: copy_of_source(context))
    assert variant.failure is None
    assert variant.bundle is not None


def test_answers_that_are_not_finite_are_refused(run_made_up):
    variant = run_made_up(lambda config, context: copy_of_source(context, lambda values: values * np.float32(np.nan)))
    assert variant.bundle is None
    assert "values of 'logits' are not finite" in variant.failure


def test_other_labels_than_the_source_are_refused(run_made_up):
    def relabel(config: MadeUpConfig, context: CompressionContext) -> Bundle:
        source = copy_of_source(context)
        return source.model_copy(update={"options": {**source.options, "labels": ["no", "yes"]}})

    variant = run_made_up(relabel)
    assert variant.bundle is None
    assert "differs from its source in 'options'" in variant.failure


def test_a_graph_that_does_not_load_is_refused(run_made_up):
    def damage(config: MadeUpConfig, context: CompressionContext) -> Bundle:
        source = copy_of_source(context)
        (graph,) = source.graphs.values()
        (context.output_dir / graph.file).write_bytes(b"not a graph")
        return source

    variant = run_made_up(damage)
    assert variant.bundle is None
    assert variant.failure


def test_what_is_left_after_a_failure_is_nothing(run_made_up, tmp_path: Path):
    def leave_litter(config: MadeUpConfig, context: CompressionContext) -> Bundle:
        (context.output_dir / "half.onnx").write_bytes(b"half")
        (context.scratch_dir / "scratch").write_bytes(b"half")
        raise OSError("no space left on device")

    assert run_made_up(leave_litter).failure == "OSError: no space left on device"
    (source_dir,) = tmp_path.iterdir()
    assert source_dir.name.startswith("bundle-")


def test_only_the_bundle_that_is_needed_is_fetched(tiny_model: TinyModel, tmp_path: Path):
    tiny_model.compress({"method": "dynamic_int8"}, tmp_path)
    (source_dir,) = tmp_path.glob("bundle-*")
    assert read_bundle(source_dir).runtime == "onnxruntime"


def test_an_unknown_method_is_the_caller_s_mistake(tiny_model: TinyModel, tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no method 'dynamic_int9'"):
        tiny_model.compress({"method": "dynamic_int9"}, tmp_path)


def test_the_key_changes_with_settings_and_version_only(monkeypatch: pytest.MonkeyPatch):
    parts = compression_key_parts({"method": "dynamic_int8"})
    assert parts == compression_key_parts({"method": "dynamic_int8", "per_channel": True})
    assert parts != compression_key_parts({"method": "dynamic_int8", "per_channel": False})
    assert parts["method_version"] == 1


def test_the_key_knows_processors_that_need_seven_bits(monkeypatch: pytest.MonkeyPatch):
    keys = {}
    for saturates in (False, True):
        monkeypatch.setattr(compress_module, "int8_products_saturate", lambda saturates=saturates: saturates)
        keys[saturates] = [compression_key_parts({"method": name}) for name in ("static_int8", "magnitude_pruning")]
    assert keys[False][0] != keys[True][0]
    assert keys[False][1] == keys[True][1]
