"""In which number format a step computes. Weights and optimizer state stay in the model's own format.

fp32   as it is
tf32   matrix products round their inputs to 10 bits of mantissa; GPUs from Ampere on
bf16   autocast to bfloat16: the range of fp32, 7 bits of mantissa
fp16   autocast to float16: 10 bits of mantissa, a small range, so the loss is scaled (`LossScaler`); GPUs only
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ml.errors import ConfigError
from ml.training.spec import PrecisionName as Precision

# Below this gain a coarser format costs exactness for nothing.
SMALLEST_GAIN = 0.05
# From exact to coarse.
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
_TENSOR_CORES_WITH_TF32 = (8, 0)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Elsewhere it is emulated, and slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TENSOR_CORES_WITH_TF32


def precision_candidates(device: torch.device) -> list[Precision]:
    """What is worth measuring on a device. fp16 only where there is no bf16: it is as fast, and needs its loss scaled."""
    bf16 = has_fast_bf16(device)
    worth: dict[Precision, bool] = {"fp32": True, "tf32": has_tf32(device), "bf16": bf16, "fp16": device.type == "cuda" and not bf16}
    return [precision for precision in PRECISIONS if worth[precision]]


def check_precision(precision: str, device_type: str) -> None:
    """Refuse what a device cannot do.

    Raises:
        ConfigError: with the reason, and the nearest that works.
    """
    if device_type == "cuda" or precision not in ("fp16", "tf32"):
        return
    if precision == "fp16":
        raise ConfigError(
            f"precision fp16 is for GPUs: on the {device_type} most products are converted to fp32 and back, which is slower and no "
            "more exact; set precision to bf16, or auto"
        )
    raise ConfigError(f"precision tf32 is a format of GPUs, the {device_type} has none of it; set precision to fp32, or auto")


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The forward pass of a step. Autocast for bf16 and fp16; fp32 and tf32 set how matrix products round.

    That rounding stays set after the context, for the backward pass, which runs outside of it, must round the same way.

    Raises:
        ConfigError: the device cannot do it.
    """
    check_precision(precision, device.type)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
    return nullcontext()


def fastest_precision(step_seconds: dict[Precision, float]) -> Precision:
    """The most exact one that was measured, unless a coarser one is faster than it by more than `SMALLEST_GAIN`, and so on."""
    measured: list[Precision] = [precision for precision in PRECISIONS if precision in step_seconds]
    chosen = measured[0]
    for precision in measured[1:]:
        if step_seconds[precision] < (1 - SMALLEST_GAIN) * step_seconds[chosen]:
            chosen = precision
    return chosen


class LossScaler:
    """Keeps the small gradients of fp16 from becoming zero: the loss is multiplied by a large number, the gradient divided by it.

    The number grows while all goes well and is halved when a gradient is not finite (Micikevicius et al. 2018, "Mixed
    Precision Training", section 3.2). Does nothing in any other precision.

        scaler.scale(loss).backward()
        finite = scaler.unscale_(optimizer)     # of this rank; ranks that hold parts of the gradient must agree
        if finite: optimizer.step()
        scaler.update(finite)
    """

    def __init__(self, precision: Precision, device: torch.device):
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def factor(self) -> float:
        """What the loss is multiplied by; 1 where nothing is scaled."""
        return float(self._scaler.get_scale())

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self._scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide the gradients in place; whether all of this rank's are finite. True where nothing is scaled.

        A skipped step whose gradient came from a loss that is not finite itself looks the same here.
        """
        if not self._scaler.is_enabled():
            return True
        self._scaler.unscale_(optimizer)
        self._optimizer = optimizer
        found = self._scaler._found_inf_per_device(optimizer).values()
        return not any(bool(tensor.item()) for tensor in found)

    def update(self, finite: bool) -> None:
        """After every step.

        Args:
            finite: as all ranks agreed; it overrules what `unscale_` found in this one.
        """
        if not self._scaler.is_enabled() or self._optimizer is None:
            return
        for tensor in self._scaler._found_inf_per_device(self._optimizer).values():
            tensor.fill_(0.0 if finite else 1.0)
        self._scaler.update()
        self._optimizer = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint, JSON; empty where nothing is scaled."""
        return self._scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. An empty one, of a training in another precision, changes nothing."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)
