"""In which number format a step computes. Weights and optimizer state stay in the model's own format."""

from contextlib import AbstractContextManager, nullcontext

import torch

from ml.training.spec import PrecisionName as Precision

# Below this gain bf16 costs exactness for nothing.
SMALLEST_GAIN = 0.05


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Elsewhere it is emulated, and slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Autocast for bf16; nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def faster_precision(step_seconds: dict[Precision, float]) -> Precision:
    """bf16 when it was measured and is faster by more than `SMALLEST_GAIN`."""
    if "bf16" not in step_seconds:
        return "fp32"
    if "fp32" not in step_seconds:
        return "bf16"
    return "bf16" if step_seconds["bf16"] < (1 - SMALLEST_GAIN) * step_seconds["fp32"] else "fp32"
