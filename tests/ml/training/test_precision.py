import math

import pytest
import torch
from torch import nn

from ml.errors import ConfigError
from ml.training.precision import LossScaler, Precision, check_precision, computing_in, fastest_precision, precision_candidates

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"fp32": 1.0}, "fp32"),
        ({"fp32": 1.0, "bf16": 0.96}, "fp32"),
        ({"fp32": 1.0, "tf32": 0.5, "bf16": 0.48}, "tf32"),
        ({"fp32": 1.0, "tf32": 0.5, "bf16": 0.3}, "bf16"),
        ({"fp32": 1.0, "tf32": 1.0, "fp16": 0.4}, "fp16"),
        ({"bf16": 1.0}, "bf16"),
    ],
)
def test_a_coarser_format_must_gain(measured: dict[Precision, float], chosen: str) -> None:
    assert fastest_precision(measured) == chosen


@pytest.mark.parametrize(("precision", "advice"), [("fp16", "set precision to bf16"), ("tf32", "set precision to fp32")])
def test_what_only_gpus_have_is_refused_on_the_cpu(precision: Precision, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        check_precision(precision, "cpu")
    with pytest.raises(ConfigError):
        computing_in(precision, CPU)
    check_precision(precision, "cuda")


def test_candidates_on_the_cpu_are_those_that_work_there() -> None:
    candidates = precision_candidates(CPU)
    assert candidates[0] == "fp32"
    for precision in candidates:
        with computing_in(precision, CPU):
            result = nn.Linear(4, 4)(torch.ones(2, 4))
        assert result.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_scaled_and_unscaled_gradients_are_those_of_the_loss() -> None:
    model, optimizer = model_and_optimizer()
    scaler = LossScaler("fp16", CPU)
    model(torch.ones(2, 3)).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3)).sum()
    scaled = scaler.scale(loss)
    assert float(scaled.detach()) == float(loss.detach()) * scaler.factor
    assert scaler.factor == 2**16
    scaled.backward()
    assert scaler.unscale_(optimizer)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), expected, strict=True))  # type: ignore[arg-type]
    scaler.update(True)
    assert scaler.factor == 2**16


def step(scaler: LossScaler, *, poison: float = 1.0, agreed: bool | None = None) -> bool:
    model, optimizer = model_and_optimizer()
    scaler.scale(model(torch.ones(2, 3)).sum() * poison).backward()
    finite = scaler.unscale_(optimizer)
    scaler.update(finite if agreed is None else agreed)
    return finite


def test_the_factor_is_halved_when_a_gradient_is_not_finite_and_grows_when_all_goes_well() -> None:
    scaler = LossScaler("fp16", CPU)
    assert not step(scaler, poison=math.inf)
    assert scaler.factor == 2**15
    scaler.load(scaler.state() | {"_growth_tracker": 1998})
    assert step(scaler)
    assert scaler.factor == 2**15
    assert step(scaler)
    assert scaler.factor == 2**16


def test_ranks_agree_on_the_factor_also_when_only_one_found_something() -> None:
    one, other = LossScaler("fp16", CPU), LossScaler("fp16", CPU)
    assert not step(one, poison=math.nan, agreed=False)
    assert step(other, agreed=False)
    assert one.state() == other.state()
    assert one.factor == 2**15


def test_the_scaler_goes_on_where_it_was() -> None:
    scaler, resumed = LossScaler("fp16", CPU), LossScaler("fp16", CPU)
    step(scaler, poison=math.inf)
    step(scaler)
    resumed.load(scaler.state())
    step(scaler)
    step(resumed)
    assert resumed.state() == scaler.state() != LossScaler("fp16", CPU).state()
    assert (resumed.factor, resumed.state()["_growth_tracker"]) == (2**15, 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_nothing_is_scaled_in_other_precisions(precision: Precision) -> None:
    scaler = LossScaler(precision, CPU)
    loss = torch.ones((), requires_grad=True)
    assert scaler.scale(loss) is loss
    assert step(scaler, poison=math.inf)  # what is not finite is found by the norm of the gradient
    assert (scaler.factor, scaler.state()) == (1.0, {})
    scaler.load(LossScaler("fp16", CPU).state())
    assert scaler.factor == 1.0
