"""Averaging, norm and clipping of gradients of which each rank has a part: plain tensors and DTensors side by side."""

import math
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# Of a gradient's copies, so many buckets are under way at once.
BUCKETS_UNDER_WAY = 2


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies in this rank; shares its memory."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill_missing_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Zeros for a parameter that no row used: some strategies give zeros there, others nothing. Zeros for all."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class GradientAverager:
    """Averages gradients over ranks after the backward pass, in flat buckets. The same order of parameters in all ranks.

    Args:
        bucket_bytes: size of a bucket; a larger parameter has one of its own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: dist.ProcessGroup, bucket_bytes: int):
        self._ranks = ranks
        self._buckets = _buckets(parameters, bucket_bytes)

    def average(self) -> None:
        """All parameters have a gradient. Gradients are replaced in place."""
        under_way: deque[tuple[dist.Work | None, torch.Tensor, list[torch.Tensor]]] = deque()
        for bucket in self._buckets:
            parts = [local_part(parameter.grad) for parameter in bucket if parameter.grad is not None]
            flat = torch.cat([part.reshape(-1) for part in parts])
            under_way.append((dist.all_reduce(flat, group=self._ranks, async_op=True), flat, parts))
            if len(under_way) > BUCKETS_UNDER_WAY:
                self._take(*under_way.popleft())
        while under_way:
            self._take(*under_way.popleft())

    def _take(self, work: dist.Work | None, flat: torch.Tensor, parts: list[torch.Tensor]) -> None:
        if work is not None:
            work.wait()
        flat /= self._ranks.size()
        for part, averaged in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(averaged.view_as(part))


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """From the last parameter to the first, as their gradients come; one number format in a bucket."""
    buckets: list[list[nn.Parameter]] = []
    room: dict[torch.dtype, tuple[list[nn.Parameter], int]] = {}
    for parameter in reversed(parameters):
        size = local_part(parameter).numel() * parameter.element_size()
        bucket, left = room.get(parameter.dtype, ([], 0))
        if not bucket or size > left:
            bucket, left = [], bucket_bytes
            buckets.append(bucket)
        bucket.append(parameter)
        room[parameter.dtype] = (bucket, left - size)
    return buckets


def gradient_norm(parameters: Sequence[nn.Parameter], mesh: DeviceMesh | None) -> float:
    """Euclidean norm of the whole model's gradient.

    Squares of parts are added up over the dimensions in which the parameter is split, and over all stages of a pipeline;
    a parameter that several ranks hold whole counts once.
    """
    parts: dict[tuple[str, ...], list[torch.Tensor]] = {(): []}
    split_dimensions = [name for name in (mesh.mesh_dim_names or ()) if name in ("shard", "tensor")] if mesh is not None else []
    for parameter in parameters:
        if parameter.grad is not None:
            parts.setdefault(_split_over(parameter), []).append(local_part(parameter.grad))
    groups = {name: mesh.get_group(name) for name in split_dimensions} if mesh is not None else {}
    ways = sorted({(), *((name,) for name in split_dimensions), tuple(split_dimensions)} | parts.keys())
    device = local_part(parameters[0]).device if parameters else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for way in ways:
        norm = nn.utils.get_total_norm(parts.get(way, []))
        squares = norm.to(device=device, dtype=torch.float64) ** 2
        for name in way:
            dist.all_reduce(squares, group=groups[name])
        total += squares
    if mesh is not None and "pipeline" in (mesh.mesh_dim_names or ()):
        dist.all_reduce(total, group=mesh.get_group("pipeline"))
    return math.sqrt(float(total))


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float, largest: float) -> None:
    """Scale gradients so that their norm is at most `largest` (Pascanu, Mikolov and Bengio 2013, algorithm 1)."""
    if norm <= largest:
        return
    parts = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(parts, largest / norm)  # pyright: ignore[reportPrivateImportUsage] - one kernel for all of them


def _split_over(parameter: nn.Parameter) -> tuple[str, ...]:
    """Names of the dimensions in which a parameter's gradient is split."""
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        return ()
    if any(placement.is_partial() for placement in gradient.placements) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
        parameter.grad = gradient
    names = gradient.device_mesh.mesh_dim_names or ()
    return tuple(name for name, placement in zip(names, gradient.placements, strict=True) if not placement.is_replicate())
