"""Parameters, buffers and optimizer state by the names that they have in the whole model, whatever part of it a rank holds.

So what one layout wrote, another can read: with torch.distributed.checkpoint in parts, or as whole tensors.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ml.errors import TrainingError
from ml.training.ranks import RankGroup


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; what is shared under several names comes once."""
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = {name: parameter.data for name, parameter in model.named_parameters()}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in state}
    return tensors


def tensor_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of a whole model, before it is split."""
    return {name: tensor.shape for name, tensor in model_tensors(model).items()}


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's part of "model/<name>" and "optimizer/<name>/<key>": a DTensor where others hold the rest of the tensor.

    The tensors are those in use: what torch.distributed.checkpoint loads into them takes effect. An optimizer that has not
    stepped yet gets its state first, as it is before the first step.
    """
    create_optimizer_state(optimizer)
    tensors = {f"model/{name}": tensor for name, tensor in model_tensors(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's state what it is before the first step, for parameters that have none yet.

    A step with a gradient of zero and a learning rate of zero leaves weights and averages as they are; only steps are counted.
    """
    parameters = [parameter for entry in optimizer.param_groups for parameter in entry["params"]]
    if any(optimizer.state.get(parameter) for parameter in parameters):
        return
    gradients = [parameter.grad for parameter in parameters]
    rates = [entry["lr"] for entry in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for entry in optimizer.param_groups:
        entry["lr"] = 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
        if "step" in optimizer.state.get(parameter, {}):
            optimizer.state[parameter]["step"].zero_()
    for entry, rate in zip(optimizer.param_groups, rates, strict=True):
        entry["lr"] = rate


def whole_weights(model: nn.Module, shapes: dict[str, torch.Size], mesh: DeviceMesh | None, group: RankGroup) -> dict[str, torch.Tensor]:
    """All tensors of the whole model on the CPU in the first rank, nothing in the others; one tensor at a time is on its way."""
    own = model_tensors(model)
    stages = mesh.get_group("pipeline") if mesh is not None and "pipeline" in (mesh.mesh_dim_names or ()) else None
    owners = _owning_stages(list(shapes), own, stages, group.device)
    whole: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        tensor = own.get(name)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if stages is not None:
            tensor = _from_stage(tensor, owners[name], shape, stages, group.device)
        if group.is_first and tensor is not None:
            whole[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return whole


def load_whole_weights(model: nn.Module, shapes: dict[str, torch.Size], weights: dict[str, torch.Tensor]) -> None:
    """Copy this rank's part of whole tensors into a model.

    Raises:
        TrainingError: names or shapes are of another model.
    """
    differing = sorted(name for name in shapes.keys() | weights.keys() if name not in weights or weights[name].shape != shapes.get(name))
    if differing:
        raise TrainingError(f"the weights are of another model: {len(differing)} tensors differ, first {differing[0]!r}; train anew")
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            copy_whole(tensor, weights[name])


def restore_state(own: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    """Copy this rank's part of whole tensors into those of `state_tensors`.

    Raises:
        TrainingError: some are missing or of another shape.
    """
    differing = sorted(name for name, tensor in own.items() if name not in whole or whole[name].shape != tensor.shape)
    if differing:
        raise TrainingError(f"the state is of another training: {len(differing)} tensors differ, first {differing[0]!r}; train anew")
    with torch.no_grad():
        for name, tensor in own.items():
            copy_whole(tensor, whole[name])


def copy_whole(part: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor, the same in every rank, into this rank's part of it. Nothing is communicated."""
    if isinstance(part, DTensor):
        whole = whole.to(device=part.device, dtype=part.dtype)
        whole = distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None)
    part.copy_(whole)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


def _owning_stages(
    names: list[str], own: dict[str, torch.Tensor], stages: dist.ProcessGroup | None, device: torch.device
) -> dict[str, tuple[int, torch.dtype]]:
    """Name -> the stage that has it and its number format."""
    if stages is None:
        return {name: (0, own[name].dtype) for name in names}
    found = torch.full((len(names), 2), -1, dtype=torch.int64, device=device)
    for index, name in enumerate(names):
        if name in own:
            found[index] = torch.tensor([stages.rank(), _DTYPES.index(own[name].dtype)])
    dist.all_reduce(found, dist.ReduceOp.MAX, group=stages)
    return {name: (stage, _DTYPES[dtype]) for name, (stage, dtype) in zip(names, found.tolist(), strict=True)}


def _from_stage(
    tensor: torch.Tensor | None, owner: tuple[int, torch.dtype], shape: torch.Size, stages: dist.ProcessGroup, device: torch.device
) -> torch.Tensor | None:
    """A tensor of any stage in the first one."""
    stage, dtype = owner
    if stage == 0:
        return tensor
    if stages.rank() == 0:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(tensor, group=stages, group_src=stage)
    elif stages.rank() == stage and tensor is not None:
        dist.send(tensor.contiguous(), group=stages, group_dst=0)
    return tensor
