from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ml.training.flops import _num_positions, calibrate, calibrate_step, gpu_peak_flops, peak_flops, transformer_flops_per_token
from ml.training.job import load_job
from ml.training.ranks import RankGroup
from ml.training.stepping import Stepper
from tests.ml.training.test_loop import toy_spec


class Attention(nn.Module):
    """One layer of width 64 with 4 heads, and a feed-forward part of 256."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_counted_flops_are_those_of_the_formula():
    model = Attention()
    x = torch.randn(2, 32, 64)
    found = calibrate(lambda: model(x).square().mean((1, 2)), list(model.parameters()), num_positions=64)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found.flops_per_token == pytest.approx(transformer_flops_per_token(num_parameters, num_layers=1, width=64, length=32))


def test_calibrating_leaves_gradients_random_state_and_weights_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    found = calibrate(lambda: model(torch.ones(4, 8)).squeeze(1), list(model.parameters()), num_positions=4)
    assert found.backward_per_forward is not None
    assert found.backward_per_forward > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_a_stepper_is_calibrated_and_steps_on_as_if_nothing_had_happened(tmp_path: Path):
    spec = toy_spec(tmp_path, job={"dropout": 0.2})
    rows = np.arange(32)
    losses = []
    for calibrated in (False, True):
        stepper = Stepper(spec, load_job(spec), RankGroup())
        found = calibrate_step(stepper, rows, "fp32") if calibrated else None
        assert found is None or found.flops_per_token > 1000
        optimizer = stepper.new_optimizer(1e-3)
        losses.append([stepper.train_step(rows, optimizer, "fp32", 1e-3).loss for _ in range(3)])
    assert losses[0] == losses[1]


def test_positions_count_padding_only_where_there_is_some():
    lengths = np.array([3, 5, 4])
    assert _num_positions({"ids": torch.zeros(3, 5), "targets": torch.zeros(3)}, lengths) == 15
    assert _num_positions({"ids": torch.zeros(3, 8)}, lengths) == 24
    assert _num_positions({"ids": torch.zeros(12), "ends": torch.zeros(4)}, lengths) == 12
    assert _num_positions({"pixels": torch.zeros(3, 1, 28, 28)}, np.array([1, 1, 1])) == 3


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla T4", "fp16", 65),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA B200", "bf16", 2250),
    ],
)
def test_peaks_of_gpus(name: str, precision: str, tera: float):
    assert gpu_peak_flops(name, precision) == tera * 1e12


@pytest.mark.parametrize(("name", "precision"), [("NVIDIA A10G", "bf16"), ("Tesla T4", "bf16"), ("NVIDIA GeForce RTX 9999", "fp32")])
def test_no_guess_about_what_is_not_known(name: str, precision: str):
    assert gpu_peak_flops(name, precision) is None


def test_the_peak_of_a_cpu_is_measured_once():
    first = peak_flops(torch.device("cpu"), "fp32")
    assert first is not None
    assert first > 1e8
    assert peak_flops(torch.device("cpu"), "fp32") == first
    assert peak_flops(torch.device("meta"), "fp32") is None
