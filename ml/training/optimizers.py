"""The optimizer of a training."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ml.training.spec import Optimizer

# Devices with a kernel that updates all parameters at once; elsewhere each operation is a pass of its own over the memory.
FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with momentum, over the parameters that are trained.

    Matrices decay; vectors (biases, norms) do not. The kernels take tensors of one kind at a time, so parameters that are
    split over different meshes, or not at all, are in groups of their own.

    Args:
        named_parameters: of the model as it will be stepped: after it was split or moved to its device.
    """
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            decays = parameter.ndim >= 2
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((decays, mesh), []).append(parameter)
    # Matrices first, whatever order the parameters came in.
    ordered = sorted(groups.items(), key=lambda item: not item[0][0])
    options = [{"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0} for (decays, _), parameters in ordered]
    fused = device.type in FUSED_DEVICES
    if settings.name == "sgd":
        # torch 2.13 has no fused SGD for tensors that are split.
        fused = fused and all(mesh is None for _, mesh in groups)
        return torch.optim.SGD(options, lr=settings.learning_rate, momentum=settings.momentum, fused=fused)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(options, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, fused=fused)
