import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from ml.bundles import read_bundle
from tests.ml.compression.conftest import TinyModel, logits


def compressed(tiny_model: TinyModel, folder: Path, **settings: object) -> Path:
    return tiny_model.fetch(tiny_model.compress({"method": "static_int8", **settings}, folder), folder / "fetched")


@pytest.mark.parametrize("calibration", ["min_max", "entropy", "percentile"])
def test_every_calibration_takes_rows_of_any_length(tiny_model: TinyModel, tmp_path: Path, calibration: str, capfd):
    lengths = {len(request["text"].split()) for request in tiny_model.train_requests}
    assert len(lengths) > 10, "rows of one length would prove nothing"
    folder = compressed(tiny_model, tmp_path, calibration=calibration, num_calibration_rows=40)
    expected = logits(tiny_model.onnx_dir, tiny_model.spec, tiny_model.test_requests)
    found = logits(folder, tiny_model.spec, tiny_model.test_requests)
    assert np.corrcoef(found[:, 0], expected[:, 0])[0, 1] > 0.9
    assert capfd.readouterr().out == "", "calibration must not print a line for every row"


def test_activations_have_fixed_ranges_and_products_stay_in_fp32(tiny_model: TinyModel, tmp_path: Path):
    folder = compressed(tiny_model, tmp_path)
    (graph,) = read_bundle(folder).graphs.values()
    nodes = onnx.load(folder / graph.file).graph.node
    operators = {node.op_type for node in nodes}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert "DynamicQuantizeLinear" not in operators
    quantized = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    products = {node.output[0] for node in nodes if node.op_type in ("MatMul", "Gemm")}
    read_by_sums = {name for node in nodes if node.op_type in ("Add", "Softmax") for name in node.input}
    assert products & read_by_sums, "most products go into sums"
    assert not products & read_by_sums & quantized


def test_rows_are_drawn_by_the_seed_and_counted(tiny_model: TinyModel, tmp_path: Path):
    variants = [
        tiny_model.compress({"method": "static_int8", "num_calibration_rows": 10}, tmp_path / str(index), seed=seed)
        for index, seed in enumerate((1, 1, 2))
    ]
    folders = [tiny_model.fetch(variant, tmp_path / f"fetched-{index}") for index, variant in enumerate(variants)]
    graphs = [read_bundle(folder).digests["model.onnx"] for folder in folders]
    assert graphs[0] == graphs[1]
    assert graphs[0] != graphs[2]
    assert read_bundle(folders[0]).provenance["result"]["num_calibration_rows"] == 10


def test_all_rows_are_used_when_there_are_fewer_than_asked_for(tiny_model: TinyModel, tmp_path: Path):
    variant = tiny_model.compress({"method": "static_int8"}, tmp_path, calibration_requests=tiny_model.train_requests[:7])
    bundle = read_bundle(tiny_model.fetch(variant, tmp_path / "fetched"))
    assert bundle.provenance["result"]["num_calibration_rows"] == 7


def test_no_training_rows_is_a_failure_in_words(tiny_model: TinyModel, tmp_path: Path):
    variant = tiny_model.compress({"method": "static_int8"}, tmp_path, calibration_requests=())
    assert variant.failure == "static_int8 needs training rows to measure the range of activations, but got none"


def test_a_graph_that_the_codec_cannot_feed_is_a_failure_in_words(tiny_model: TinyModel, tmp_path: Path):
    codec = tiny_model.spec.load_codec(read_bundle(tiny_model.onnx_dir), tiny_model.onnx_dir)

    class HalfCodec:
        decode = codec.decode

        def encode(self, requests):
            return {"input_ids": codec.encode(requests)["input_ids"]}

    spec = dataclasses.replace(tiny_model.spec, load_codec=lambda bundle, folder: HalfCodec())
    variant = dataclasses.replace(tiny_model, spec=spec).compress({"method": "static_int8"}, tmp_path)
    assert variant.failure == "model.onnx: the solution's codec gives ['input_ids'], but the graph also needs ['attention_mask']"
