from pathlib import Path

import numpy as np
import onnx
import pytest

from ml.bundles import read_bundle, write_bundle
from ml.compression.compress import compress
from ml.compression.registry import methods
from tests.ml.compression.conftest import TinyModel, logits
from tests.tiny_encoders import VOCABULARY


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def distance(tiny_model: TinyModel, config: dict, folder: Path) -> float:
    """Mean absolute difference of logits to fp32."""
    found = logits(tiny_model.fetch(tiny_model.compress(config, folder), folder / "fetched"), tiny_model.spec, tiny_model.test_requests)
    return float(np.abs(found - logits(tiny_model.onnx_dir, tiny_model.spec, tiny_model.test_requests)).mean())


def test_every_matrix_is_stored_in_8_bits_the_embedding_too(tiny_model: TinyModel, tmp_path: Path):
    folder = tiny_model.fetch(tiny_model.compress({"method": "dynamic_int8"}, tmp_path), tmp_path / "fetched")
    (graph,) = read_bundle(folder).graphs.values()
    matrices = {name: tensor for name, tensor in initializers(folder / graph.file).items() if len(tensor.dims) == 2}
    in_fp32 = {name: list(tensor.dims) for name, tensor in matrices.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    assert in_fp32 == {}
    width = 32
    assert [len(VOCABULARY), width] in [list(tensor.dims) for tensor in matrices.values()]


def test_a_scale_for_each_channel_is_closer_than_one_for_the_matrix(tiny_model: TinyModel, tmp_path: Path):
    per_channel = distance(tiny_model, {"method": "dynamic_int8"}, tmp_path / "channel")
    per_tensor = distance(tiny_model, {"method": "dynamic_int8", "per_channel": False}, tmp_path / "tensor")
    assert per_channel < per_tensor


def test_seven_bits_are_coarser_than_eight(tiny_model: TinyModel, tmp_path: Path):
    eight = distance(tiny_model, {"method": "dynamic_int8", "reduce_range": False}, tmp_path / "eight")
    seven = distance(tiny_model, {"method": "dynamic_int8", "reduce_range": True}, tmp_path / "seven")
    assert eight < seven


@pytest.mark.parametrize("method", ["dynamic_int8", "static_int8"])
def test_weights_too_large_for_one_file_stay_in_a_file_of_their_own(tiny_model: TinyModel, tmp_path: Path, method: str):
    """Protocol buffers end at 2 GiB; here a small model is split as a large one would be."""
    source = read_bundle(tiny_model.onnx_dir)
    (graph,) = source.graphs.values()
    split_dir = tmp_path / "split"
    split_dir.mkdir()
    for name in source.side_files:
        (split_dir / name).write_bytes((tiny_model.onnx_dir / name).read_bytes())
    model = onnx.load(tiny_model.onnx_dir / graph.file)
    onnx.save_model(model, split_dir / graph.file, save_as_external_data=True, location="weights.data", size_threshold=0)
    write_bundle(split_dir, source.model_copy(update={"side_files": (*source.side_files, "weights.data")}))
    split = tiny_model.store.put_folder(split_dir)

    variant = compress(
        {"method": method}, tiny_model.spec, tiny_model.torch_ref, split, tiny_model.train_requests, tiny_model.store, tmp_path, 0
    )
    folder = tiny_model.fetch(variant, tmp_path / "fetched")
    made = read_bundle(folder)
    assert "weights.data" not in made.digests, "the fp32 weights must not travel along"
    assert len(made.side_files) == len(source.side_files) + 1
    whole = tiny_model.fetch(tiny_model.compress({"method": method}, tmp_path / "whole"), tmp_path / "whole-fetched")
    np.testing.assert_allclose(
        logits(folder, tiny_model.spec, tiny_model.test_requests), logits(whole, tiny_model.spec, tiny_model.test_requests), atol=1e-5
    )


def test_it_needs_no_training_rows():
    assert not methods()["dynamic_int8"].requires_calibration


def test_a_row_s_answer_really_depends_on_its_batch(tiny_model: TinyModel, tmp_path: Path):
    """The reason why the bundle says so; when this fails, rows need no longer run one at a time."""
    folder = tiny_model.fetch(tiny_model.compress({"method": "dynamic_int8"}, tmp_path), tmp_path / "fetched")
    alone = logits(folder, tiny_model.spec, tiny_model.test_requests)
    together = logits(folder, tiny_model.spec, tiny_model.test_requests, batch_size=64)
    assert np.abs(alone - together).max() > 1e-3
    assert not read_bundle(folder).batch_invariant
