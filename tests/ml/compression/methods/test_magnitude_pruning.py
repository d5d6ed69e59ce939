import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from ml.bundles import read_bundle
from ml.compression.methods.magnitude_pruning import METHOD, MagnitudePruning, compress, linear_weight_names
from ml.compression.registry import CompressionContext, validate_methods
from ml.errors import ConfigError
from ml.text_classification.model import build_module
from tests.ml.compression.conftest import TinyModel


@pytest.fixture
def prune(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prunes the tiny model up to the export; the tensors before and after, and what the method counted."""

    def run(**settings: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
        pruned: dict[str, torch.Tensor] = {}

        def keep_tensors(torch_folder: Path, output_folder: Path):
            bundle = read_bundle(torch_folder)
            (graph,) = bundle.graphs.values()
            pruned.update(load_file(torch_folder / graph.file))
            build_module(bundle, torch_folder, "classifier")
            return bundle

        (config,) = validate_methods([{"method": "magnitude_pruning", **settings}])
        (tmp_path / "scratch").mkdir()
        context = CompressionContext(
            spec=dataclasses.replace(tiny_model.spec, export_onnx=keep_tensors),
            torch_bundle=tiny_model.torch_dir,
            onnx_bundle=tiny_model.onnx_dir,
            calibration_requests=(),
            output_dir=tmp_path / "out",
            scratch_dir=tmp_path / "scratch",
        )
        result = compress(MagnitudePruning.model_validate(config), context).provenance
        return load_file(tiny_model.torch_dir / "model.safetensors"), pruned, result

    return run


def linear_names(tiny_model: TinyModel) -> set[str]:
    bundle = read_bundle(tiny_model.torch_dir)
    return linear_weight_names(build_module(bundle, tiny_model.torch_dir, "classifier"))


def test_a_fifth_of_all_linear_weights_by_default(prune, tiny_model: TinyModel):
    before, after, result = prune()
    names = linear_names(tiny_model)
    values = torch.cat([before[name].flatten() for name in names])
    zeros = sum(int((after[name] == 0).sum()) for name in names)
    assert zeros == round(0.2 * values.numel()) == result["num_pruned_weights"]
    assert result["num_prunable_weights"] == values.numel()
    kept = torch.cat([after[name].flatten() for name in names])
    assert values[kept == 0].abs().max() <= values[kept != 0].abs().min(), "the smallest must go"
    assert torch.equal(values[kept != 0], kept[kept != 0]), "the others must stay as they are"


def test_nothing_but_linear_weights_is_touched(prune, tiny_model: TinyModel):
    before, after, _ = prune(amount=0.5)
    names = linear_names(tiny_model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The head of the tiny model is scaled up, so none of its weights is among the smallest half.
    assert changed == names - {"head.weight"}
    assert "encoder.embeddings.word_embeddings.weight" not in names
    assert before.keys() == after.keys()


def test_the_same_share_of_each_layer(prune, tiny_model: TinyModel):
    _, after, _ = prune(amount=0.3, scope="layer")
    for name in linear_names(tiny_model):
        assert int((after[name] == 0).sum()) == round(0.3 * after[name].numel()), name


def test_a_global_share_falls_unevenly_on_layers(prune, tiny_model: TinyModel):
    _, after, _ = prune(amount=0.3)
    shares = [float((after[name] == 0).float().mean()) for name in linear_names(tiny_model)]
    assert max(shares) - min(shares) > 0.05


def test_everything_below_a_threshold(prune, tiny_model: TinyModel):
    before, after, result = prune(threshold=0.01)
    for name in linear_names(tiny_model):
        small = before[name].abs() <= 0.01
        assert torch.equal(after[name] == 0, small | (before[name] == 0))
        assert torch.equal(after[name][~small], before[name][~small])
    assert 0 < result["pruned_share"] < 1


def test_zeros_reach_the_exported_graph_and_make_it_no_smaller(tiny_model: TinyModel, tmp_path: Path):
    folder = tiny_model.fetch(tiny_model.compress({"method": "magnitude_pruning"}, tmp_path), tmp_path / "fetched")
    result = read_bundle(folder).provenance["result"]
    matrices = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(folder / "model.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    ]
    assert sum(int(np.count_nonzero(matrix == 0)) for matrix in matrices) >= result["num_pruned_weights"] > 0
    pruned_size, plain_size = (path.stat().st_size for path in (folder / "model.onnx", tiny_model.onnx_dir / "model.onnx"))
    assert pruned_size == pytest.approx(plain_size, rel=0.02)


def test_a_linear_layer_that_shares_an_embedding_is_left_alone():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "inner": nn.Linear(4, 4), "output": nn.Linear(4, 10, bias=False)})
    model["output"].weight = model["table"].weight  # type: ignore[assignment]
    assert linear_weight_names(model) == {"inner.weight"}


@pytest.mark.parametrize("settings", [{"amount": 0.2, "threshold": 0.1}, {"amount": 0}, {"amount": 1}, {"threshold": -1}, {"scope": "row"}])
def test_settings_that_make_no_sense_are_refused(settings: dict):
    with pytest.raises(ConfigError, match=r"compression\.0"):
        validate_methods([{"method": METHOD.name, **settings}])
