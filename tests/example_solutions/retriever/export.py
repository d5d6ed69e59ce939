"""The question encoder as an ONNX graph."""

import shutil
from pathlib import Path

import numpy as np

from ml.bundles import Bundle, read_bundle, write_bundle

from .training import GRAPH_NAME, graph_spec

ONNX_FILE = "model.onnx"


def export_onnx(torch_bundle_folder: Path, output_folder: Path) -> Bundle:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    source = read_bundle(torch_bundle_folder)
    weights = load_file(torch_bundle_folder / source.graphs[GRAPH_NAME].file)
    width = weights["projection.weight"].shape[0]
    constants = {
        "embedding_table": weights["embedding.weight"],
        "projection": np.ascontiguousarray(weights["projection.weight"].T),
        "axis_1": np.array([1], dtype=np.int64),
        "axis_2": np.array([2], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["embedding_table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis_2"], ["mask_column"]),
        helper.make_node("Mul", ["embedded", "mask_column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis_1"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "axis_1"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "projection"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        GRAPH_NAME,
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    output_folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), output_folder / ONNX_FILE)
    for name in source.side_files:
        shutil.copyfile(torch_bundle_folder / name, output_folder / name)
    update = {"runtime": "onnxruntime", "graphs": {GRAPH_NAME: graph_spec(ONNX_FILE, width)}, "provenance": {}}
    return write_bundle(output_folder, source.model_copy(update=update))
