"""Dynamic INT8: weights are stored in 8 bits; activations are rounded to 8 bits as they come, with the range they happen to have.

Needs no calibration data. The range of an activation is that of the whole tensor, so a row's answer depends on the rows that
share its batch: the bundle says so, and a predictor runs its rows one at a time.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ml.bundles import Bundle, GraphSpec
from ml.compression.onnx_quantization import QUANTIZED_OPERATORS, ReduceRange, quantize_bundle, resolve_reduce_range
from ml.compression.registry import CompressionContext, CompressionMethod, MethodConfig


class DynamicInt8(MethodConfig):
    """Weights s8, activations u8 with a range found in each call."""

    method: Literal["dynamic_int8"] = "dynamic_int8"
    per_channel: bool = Field(default=True, description="one scale for each column of a weight instead of one for the whole matrix")
    reduce_range: ReduceRange = Field(default="auto", description="weights in 7 bits; auto: where 8-bit products would overflow")


def compress(config: DynamicInt8, context: CompressionContext) -> Bundle:
    reduce_range = resolve_reduce_range(config.reduce_range)

    def quantize_graph(prepared: Path, target: Path, graph: GraphSpec, too_large: bool) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            per_channel=config.per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            use_external_data_format=too_large,
        )

    bundle = quantize_bundle(context, quantize_graph, batch_invariant=False)
    return bundle.model_copy(update={"provenance": {"reduce_range": reduce_range}})


METHOD = CompressionMethod(
    name="dynamic_int8",
    title="Dynamic INT8",
    config=DynamicInt8,
    starts_from="onnx",
    requires_calibration=False,
    compress=compress,
    libraries=("onnxruntime", "onnx"),
    depends_on_cpu=True,
)
