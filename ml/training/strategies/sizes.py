"""What a model needs in training and what a device has: the numbers that `layout.choose_strategy` decides by."""

import psutil
import torch
from torch import nn

from ml.training.job import ParallelPlan
from ml.training.layout import ModelSizes
from ml.training.spec import Optimizer

# Of the values of a layer that are kept for the backward pass, beside what goes in and out of linear layers: norms, activations.
KEPT_BESIDE_LINEAR = 1.5


def model_sizes(model: nn.Module, plan: ParallelPlan, optimizer: Optimizer, num_tokens: int) -> ModelSizes:
    """Sizes of a whole model.

    Activations are an estimate: what goes in and out of all linear layers for each token, times `KEPT_BESIDE_LINEAR`. Attention
    weights are not counted, for fused attention does not keep them.

    Args:
        num_tokens: of one rank's rows, padding included.
    """
    trained = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    averages = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
    linear = sum(module.in_features + module.out_features for module in model.modules() if isinstance(module, nn.Linear))
    item_bytes = next((parameter.element_size() for parameter in model.parameters()), 4)
    blocks = [model.get_submodule(name) for name in plan.blocks]
    return ModelSizes(
        parameters=sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers())),
        gradients=trained,
        optimizer=averages * trained,
        activations=int(num_tokens * linear * item_bytes * KEPT_BESIDE_LINEAR),
        largest_block=max((sum(_bytes(parameter) for parameter in block.parameters()) for block in blocks), default=0),
    )


def device_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Memory that one rank may use: its share of a GPU, or of what is free in the machine."""
    if device.type == "cuda":
        ranks_on_device = -(-ranks_on_node // torch.cuda.device_count())
        return torch.cuda.get_device_properties(device).total_memory // ranks_on_device
    return psutil.virtual_memory().available // ranks_on_node


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
