from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ml.bundles import Bundle, GraphSpec, TensorSpec
from ml.errors import BundleError
from ml.runtimes.torch import load_graph


class TwoHeads(nn.Module):
    """Its arguments stand in another order than the graph's inputs, and dropout would show a module left in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.grad_modes: list[bool] = []

    def forward(self, weight: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.grad_modes.append(torch.is_grad_enabled())
        product = self.dropout(values) * weight
        return product, product.sum(dim=1)


@pytest.fixture
def bundle() -> Bundle:
    def tensor(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    graph = GraphSpec(
        file="model.safetensors",
        inputs=(tensor("values", "batch", 3), tensor("weight", "batch", 3)),
        outputs=(tensor("product", "batch", 3), tensor("total", "batch")),
    )
    return Bundle(solution="toy", runtime="torch", graphs={"toy": graph}, input_schema={}, output_schema={})


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_tensors_go_by_name_and_outputs_in_the_graph_s_order(bundle: Bundle):
    run_graph = load_graph(bundle, Path(), "toy", 1, lambda *_: TwoHeads().train())
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = np.array([[1, 0, 0], [0, 2, 0]], dtype=np.float32)
    outputs = run_graph({"values": values, "weight": weight})
    np.testing.assert_array_equal(outputs["product"], values * weight)
    np.testing.assert_array_equal(outputs["total"], [0, 8])


def test_no_thread_tracks_gradients(bundle: Bundle):
    module = TwoHeads()
    run_graph = load_graph(bundle, Path(), "toy", 1, lambda *_: module)
    ones = np.ones((1, 3), dtype=np.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_graph({"values": ones, "weight": ones}), range(20)))
    assert module.grad_modes == [False] * 20


def test_the_number_of_threads_is_set(bundle: Bundle):
    load_graph(bundle, Path(), "toy", 3, lambda *_: TwoHeads())
    assert torch.get_num_threads() == 3


def test_an_unknown_graph_is_refused_with_those_there(bundle: Bundle):
    with pytest.raises(BundleError, match=r"no graph 'other' in this bundle; it holds \['toy'\]"):
        load_graph(bundle, Path(), "other", 1, lambda *_: TwoHeads())
