import pytest
import torch
from torch import nn

from ml.training.optimizers import build_optimizer
from ml.training.ranks import RankGroup
from ml.training.spec import Optimizer
from tests.ml.training.gloo_ranks import run_ranks

CPU = torch.device("cpu")
SETTINGS = [Optimizer(weight_decay=0.1, learning_rate=0.01), Optimizer(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.1)]
BY_NAME = pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.name)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_vectors_do_not_decay_and_what_is_frozen_is_left_out() -> None:
    model = network()
    model[1].weight.requires_grad = False
    optimizer = build_optimizer(model.named_parameters(), Optimizer(weight_decay=0.3), CPU)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: decay.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert found == {
        "0.weight": 0.3,
        "1.weight": None,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
        "3.weight": 0.3,
        "3.bias": 0.0,
    }


def test_settings_reach_the_optimizer() -> None:
    adamw = build_optimizer(network().named_parameters(), Optimizer(learning_rate=0.2, beta1=0.5, beta2=0.6, epsilon=1e-5), CPU)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(group["lr"], group["betas"], group["eps"], group["fused"]) for group in adamw.param_groups] == [
        (0.2, (0.5, 0.6), 1e-5, True)
    ] * 2
    sgd = build_optimizer(network().named_parameters(), Optimizer(name="sgd", momentum=0.7), CPU)
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.7}


@BY_NAME
def test_fused_kernels_do_what_the_plain_ones_do(settings: Optimizer) -> None:
    models = [network().double(), network().double()]
    optimizers = [
        build_optimizer(model.named_parameters(), settings, device)
        for model, device in zip(models, (CPU, torch.device("meta")), strict=True)
    ]
    assert [bool(optimizer.param_groups[0]["fused"]) for optimizer in optimizers] == [True, False]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(6)).square().sum().backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_parameters_that_are_split_over_ranks_are_stepped_beside_whole_ones() -> None:
    run_ranks(_step_all_split, 2, timeout_seconds=60)


def _step_all_split(group: RankGroup) -> None:
    for settings in SETTINGS:
        _step_split(settings)


def _step_split(settings: Optimizer) -> None:
    """The second layer is split, the others are not; three steps must give the weights of a single process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    whole, split = network().double(), network().double()
    mesh = init_device_mesh("cpu", (2,))
    for name in ("weight", "bias"):
        tensor = getattr(split[1], name)
        setattr(split[1], name, nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)])))
    optimizers = [build_optimizer(model.named_parameters(), settings, CPU) for model in (whole, split)]
    for step in range(3):
        torch.manual_seed(step)
        for one, other in zip(whole.parameters(), split.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = distribute_tensor(one.grad, mesh, [Shard(0)]) if isinstance(other, DTensor) else one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        full = other.full_tensor() if isinstance(other, DTensor) else other
        torch.testing.assert_close(one.detach(), full.detach(), rtol=1e-12, atol=1e-12)
