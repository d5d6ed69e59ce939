"""What the INT8 methods share: every graph of an ONNX bundle prepared, quantized by ONNX Runtime, and put beside its side files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ml.bundles import Bundle, GraphSpec, read_bundle
from ml.compression.cpu import int8_products_saturate
from ml.compression.registry import CompressionContext
from ml.compression.weights import external_weight_files, weight_files

# Embedding tables are read by Gather; in a small encoder they are half of the weights.
QUANTIZED_OPERATORS = ["MatMul", "Gemm", "Gather"]

ReduceRange = Literal["auto"] | bool
"""7 instead of 8 bits for weights. "auto": where the processor would overflow, see `int8_products_saturate`."""

QuantizeGraph = Callable[[Path, Path, GraphSpec, bool], None]
"""Prepared graph, where the quantized one goes, its tensors, whether its weights must lie in a file of their own."""


def resolve_reduce_range(reduce_range: ReduceRange) -> bool:
    return int8_products_saturate() if reduce_range == "auto" else reduce_range


def quantize_bundle(context: CompressionContext, quantize_graph: QuantizeGraph, *, batch_invariant: bool) -> Bundle:
    """Quantize each graph of the ONNX bundle into the output folder, and copy what else the bundle holds."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = read_bundle(context.onnx_bundle, verify=False)
    old_weights = weight_files(source, context.onnx_bundle)
    for name, graph in source.graphs.items():
        source_path, target = context.onnx_bundle / graph.file, context.output_dir / graph.file
        target.parent.mkdir(parents=True, exist_ok=True)
        too_large = bool(external_weight_files(source_path))
        prepared = context.scratch_dir / name / "prepared.onnx"
        prepared.parent.mkdir()
        # Symbolic shape inference stops on some encoders with two dynamic axes; plain inference is enough here.
        quant_pre_process(source_path, prepared, skip_symbolic_shape=True, save_as_external_data=too_large)
        quantize_graph(prepared, target, graph, too_large)
    side_files = tuple(name for name in source.side_files if name not in old_weights)
    for name in side_files:
        (context.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(context.onnx_bundle / name, context.output_dir / name)
    graph_files = {graph.file for graph in source.graphs.values()}
    new_weights = sorted(weight_files(source, context.output_dir) - graph_files)
    return source.model_copy(update={"side_files": (*side_files, *new_weights), "batch_invariant": batch_invariant, "provenance": {}})
