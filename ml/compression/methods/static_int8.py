"""Static INT8: weights and activations in 8 bits, with ranges of the activations measured beforehand on training rows.

Weights are s8 with a scale for each channel, activations u8 with a zero point. (Symmetric s8 activations waste half their
steps after a GELU: they cost 4.6 points of accuracy on a MiniLM.)

Padding changes the last bit of some sums, and where such a sum lies at the edge between two steps it is rounded the other way: 3 of
2,130 reviews got logits that differed by up to 7e-4 between batch 1 and batch 32. So the bundle says that its answers depend on the
batch, and a predictor runs its rows one at a time; on one core that takes no longer.
"""

import contextlib
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from ml.bundles import Bundle, GraphSpec, read_bundle
from ml.compression.onnx_quantization import QUANTIZED_OPERATORS, ReduceRange, quantize_bundle, resolve_reduce_range
from ml.compression.registry import CompressionContext, CompressionMethod, MethodConfig
from ml.errors import CompressionError

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationMethod

Calibration = Literal["min_max", "entropy", "percentile"]


class StaticInt8(MethodConfig):
    """Weights s8 per channel, activations u8 with a range from calibration."""

    method: Literal["static_int8"] = "static_int8"
    calibration: Calibration = Field(
        default="min_max",
        description="range of an activation: min_max all that was seen, percentile without outliers, entropy least information lost",
    )
    num_calibration_rows: int = Field(default=256, ge=1, le=10_000, description="training rows, drawn by the seed")
    percentile: float = Field(default=99.99, gt=50, le=100, description="share of values inside the range, for calibration: percentile")
    reduce_range: ReduceRange = Field(default="auto", description="weights in 7 bits; auto: where 8-bit products would overflow")


def compress(config: StaticInt8, context: CompressionContext) -> Bundle:
    reduce_range = resolve_reduce_range(config.reduce_range)
    requests = _draw(context.calibration_requests, config.num_calibration_rows, context.seed)
    codec = context.spec.load_codec(read_bundle(context.onnx_bundle, verify=False), context.onnx_bundle)

    def quantize_graph(prepared: Path, target: Path, graph: GraphSpec, too_large: bool) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        rows = _CalibrationRows([_graph_inputs(codec.encode([request]), graph) for request in requests])
        with _without_prints():
            quantize_static(
                prepared,
                target,
                rows,  # pyright: ignore[reportArgumentType]
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTIZED_OPERATORS,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=too_large,
                calibrate_method=_calibration_method(config.calibration),
                extra_options={
                    # Ranges are merged row by row: memory stays that of one row, and rows may differ in length without padding,
                    # which would otherwise count in the histograms as if it were text.
                    "CalibStridedMinMax": 1,
                    "CalibPercentile": config.percentile,
                    # A product goes on into sums and norms in fp32. Rounding it as well saved no time on a fine-tuned MiniLM
                    # and cost half a point of accuracy; 5.8 instead of 2.7 % of the answers differed from fp32.
                    "OpTypesToExcludeOutputQuantization": QUANTIZED_OPERATORS,
                },
            )

    bundle = quantize_bundle(context, quantize_graph, batch_invariant=False)
    return bundle.model_copy(update={"provenance": {"reduce_range": reduce_range, "num_calibration_rows": len(requests)}})


def _draw(requests: Sequence[dict], num_rows: int, seed: int) -> list[dict]:
    if not requests:
        raise CompressionError("static_int8 needs training rows to measure the range of activations, but got none")
    if len(requests) <= num_rows:
        return list(requests)
    chosen = sorted(random.Random(seed).sample(range(len(requests)), num_rows))
    return [requests[index] for index in chosen]


def _graph_inputs(encoded: dict[str, np.ndarray], graph: GraphSpec) -> dict[str, np.ndarray]:
    names = [tensor.name for tensor in graph.inputs]
    if missing := sorted(set(names) - set(encoded)):
        raise CompressionError(f"{graph.file}: the solution's codec gives {sorted(encoded)}, but the graph also needs {missing}")
    return {name: encoded[name] for name in names}


def _calibration_method(calibration: Calibration) -> "CalibrationMethod":
    from onnxruntime.quantization import CalibrationMethod

    return {
        "min_max": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }[calibration]


class _CalibrationRows:
    """ONNX Runtime's `CalibrationDataReader`, by its methods: rows one at a time, in ranges."""

    def __init__(self, rows: Sequence[dict[str, np.ndarray]]):
        self._rows = rows
        self._remaining: Iterator[dict[str, np.ndarray]] = iter(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._remaining = iter(self._rows[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._remaining, None)


@contextlib.contextmanager
def _without_prints() -> Iterator[None]:
    """ONNX Runtime's histograms print a line for every row."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


METHOD = CompressionMethod(
    name="static_int8",
    title="Static INT8",
    config=StaticInt8,
    starts_from="onnx",
    requires_calibration=True,
    compress=compress,
    libraries=("onnxruntime", "onnx"),
    depends_on_cpu=True,
)
