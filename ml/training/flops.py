"""How much arithmetic a model is, and how much a device can do: what model FLOPs utilisation (MFU) is made of.

MFU is the arithmetic that the model asks for, forward and backward, per second, over the peak of the device (Chowdhery et al.
2022, PaLM, appendix B). Work done twice to save memory does not count, and neither does padding: the FLOPs of a batch are
divided by its positions, padding included, and multiplied by the tokens that are none.
"""

import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ml.training.precision import Precision, computing_in

if TYPE_CHECKING:
    from ml.training.stepping import Stepper

Shape = tuple[int, ...]

NUM_TIMED_PASSES = 3
# The backward pass of a matrix product is two products of the same size (Hoffmann et al. 2022, appendix F). Counted, not measured: what
# a kernel computes once more in the backward pass, to save memory, is no work of the model.
FORWARD_PASSES = 3
_MATMUL_SIZE = 1024
_MATMUL_SECONDS = 0.2

# FLOP/s of dense matrix products, from NVIDIA's datasheets (theirs are often given with sparsity: twice as much). First match wins.
_T = 1e12
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bB200\b", {"bf16": 2250 * _T, "fp16": 2250 * _T, "tf32": 1125 * _T, "fp32": 75 * _T}),
    (r"\bH200 NVL\b", {"bf16": 836 * _T, "fp16": 836 * _T, "tf32": 418 * _T, "fp32": 60 * _T}),
    (r"\bH200\b", {"bf16": 989.4 * _T, "fp16": 989.4 * _T, "tf32": 494.7 * _T, "fp32": 66.9 * _T}),
    (r"\bH100 NVL\b", {"bf16": 835 * _T, "fp16": 835 * _T, "tf32": 417.5 * _T, "fp32": 60 * _T}),
    (r"\bH100 PCIe\b", {"bf16": 756 * _T, "fp16": 756 * _T, "tf32": 378 * _T, "fp32": 51.2 * _T}),
    (r"\bH100\b", {"bf16": 989.4 * _T, "fp16": 989.4 * _T, "tf32": 494.7 * _T, "fp32": 66.9 * _T}),
    (r"\bA100\b", {"bf16": 312 * _T, "fp16": 312 * _T, "tf32": 156 * _T, "fp32": 19.5 * _T}),
    (r"\bL40S\b", {"bf16": 362 * _T, "fp16": 362 * _T, "tf32": 183 * _T, "fp32": 91.6 * _T}),
    (r"\bL4\b", {"bf16": 121 * _T, "fp16": 121 * _T, "tf32": 60 * _T, "fp32": 30.3 * _T}),
    (r"\bA10\b", {"bf16": 125 * _T, "fp16": 125 * _T, "tf32": 62.5 * _T, "fp32": 31.2 * _T}),
    (r"\bV100-PCIE\b", {"fp16": 112 * _T, "fp32": 14 * _T}),
    (r"\bV100\b", {"fp16": 125 * _T, "fp32": 15.7 * _T}),
    (r"\bT4\b", {"fp16": 65 * _T, "fp32": 8.1 * _T}),
)
_CPU_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Calibration:
    """Facts about a model that do not change while it is trained.

    Args:
        flops_per_token: forward and backward pass, per position of a batch.
        backward_per_forward: seconds of the backward pass over those of the forward pass, with no other rank;
            None where a rank cannot run the model alone.
    """

    flops_per_token: float
    backward_per_forward: float | None = None


def calibrate(
    losses: Callable[[], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    num_positions: int,
    synchronize: Callable[[], None] = lambda: None,
) -> Calibration:
    """Count the FLOPs of one batch, and time its two passes, in this rank alone: nothing is communicated and nothing changed.

    Args:
        losses: runs the bare model on one batch that is on the device already; returns the rows' losses.
        parameters: those that get a gradient.
        num_positions: rows times length of that batch, padding included.
        synchronize: waits for the device.
    """
    devices = [parameters[0].device] if parameters[0].device.type == "cuda" else []
    seconds: list[tuple[float, float]] = []
    with torch.random.fork_rng(devices):  # dropout must not draw from the training's random state
        with FlopCounterMode(display=False, custom_mapping=_NOT_IN_TORCH) as counter:
            losses()
        for _ in range(NUM_TIMED_PASSES):
            synchronize()
            start = time.perf_counter()
            loss = losses().sum()
            synchronize()
            middle = time.perf_counter()
            _backward(loss, parameters)
            synchronize()
            seconds.append((middle - start, time.perf_counter() - middle))
    return Calibration(
        flops_per_token=FORWARD_PASSES * counter.get_total_flops() / num_positions,
        backward_per_forward=statistics.median(backward / max(forward, 1e-9) for forward, backward in seconds),
    )


def calibrate_step(stepper: "Stepper", rows: np.ndarray, precision: Precision) -> Calibration | None:
    """Calibrate the model of a stepper on its share of a global batch. Every rank may do it at once: nothing is communicated.

    None where a rank cannot run the model alone (sharded parameters, split matrices, a pipeline).

    Args:
        rows: of a global batch of middling length.
    """
    if stepper.layout.strategy != "ddp":
        return None
    job, device = stepper.job, stepper.group.device
    share, _ = stepper.passes(rows)[0]
    batch = {name: tensor.to(device) for name, tensor in job.batch("train", share).items()}

    def losses() -> torch.Tensor:
        with computing_in(precision, device):
            return job.row_losses(stepper.model, batch).loss

    positions = _num_positions(batch, job.lengths["train"][share])
    return calibrate(losses, stepper.parameters, num_positions=positions, synchronize=stepper.group.synchronize)


def _num_positions(batch: dict[str, torch.Tensor], lengths: np.ndarray) -> int:
    """Of all rows, padding included; the lengths together where rows are not padded to one length."""
    longest = int(lengths.max())
    padded = [tensor for tensor in batch.values() if tensor.ndim >= 2 and len(tensor) == len(lengths) and tensor.shape[1] >= longest > 1]
    return len(lengths) * padded[0].shape[1] if padded else max(int(lengths.sum()), 1)


def transformer_flops_per_token(num_parameters: int, *, num_layers: int, width: int, length: int) -> float:
    """Of training a dense transformer on sequences of a length: 6 N + 12 layers width length (PaLM, appendix B).

    6 N: two FLOPs per parameter forward and four backward (also Hoffmann et al. 2022, appendix F). The second term is attention,
    counted in full also where a causal mask hides half of it.

    Args:
        num_parameters: without the input embedding, which multiplies nothing.
        width: heads times size of a head.
    """
    return 6.0 * num_parameters + 12.0 * num_layers * width * length


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device for matrix products in "fp32", "tf32", "bf16" or "fp16"; None for a GPU that is not in the table.

    A GPU's is that of its datasheet. A CPU's is measured, with the threads that this process uses, once per precision.
    """
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), precision)
    return _measured_peak(precision, torch.get_num_threads()) if device.type == "cpu" else None


def gpu_peak_flops(name: str, precision: str) -> float | None:
    """By the name that the driver gives, such as "NVIDIA H100 80GB HBM3"; None when unknown or the GPU lacks the precision."""
    return next((peaks.get(precision) for pattern, peaks in _PEAKS if re.search(pattern, name, re.IGNORECASE)), None)


@functools.cache
def _measured_peak(precision: str, num_threads: int) -> float:
    """The fastest of some products of two square matrices that fit the cache: 2 n^3 FLOPs each. Kept for this number of threads."""
    left = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=_CPU_TYPES[precision])
    right = left.clone()
    fastest = float("inf")
    end = time.perf_counter() + _MATMUL_SECONDS
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * _MATMUL_SIZE**3 / fastest


def _backward(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    # Not `loss.backward()`: that would leave gradients, and set off the averaging of data-parallel ranks.
    torch.autograd.grad(loss, parameters, allow_unused=True)


def _cpu_attention(query: Shape, key: Shape, value: Shape, *others: object, **more: object) -> int:
    return int(sdpa_flop_count(query, key, value))


# Attention on the CPU is missing from torch's own list (2.13).
_NOT_IN_TORCH: dict[Any, Callable[..., int]] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
