"""Magnitude pruning: the weights nearest to zero become zero (Han et al. 2015, "Learning both Weights and Connections", section 3.1).

The pruned model is exported to ONNX in fp32. Zeros alone change neither latency nor memory nor file size: the matrices keep their
shape, and dense kernels multiply zeros as fast as any number. It stands in the table to show this, and what it costs in accuracy.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ml.bundles import Bundle, read_bundle, write_bundle
from ml.compression.registry import CompressionContext, CompressionMethod, MethodConfig
from ml.errors import CompressionError

if TYPE_CHECKING:
    from torch import Tensor, nn


class MagnitudePruning(MethodConfig):
    """Which weights become zero: either the smallest `amount` of them, or all smaller than `threshold`."""

    method: Literal["magnitude_pruning"] = "magnitude_pruning"
    amount: float | None = Field(default=None, gt=0, lt=1, description="share of the weights; 0.2 when no threshold is given")
    threshold: float | None = Field(default=None, gt=0, description="largest absolute value that becomes zero")
    scope: Literal["global", "layer"] = Field(
        default="global", description="global: the smallest of all layers together; layer: the same share of each. For amount"
    )

    @model_validator(mode="before")
    @classmethod
    def _prune_a_fifth_by_default(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("amount") is None and values.get("threshold") is None:
            return {**values, "amount": 0.2}
        return values

    @model_validator(mode="after")
    def _one_rule(self) -> "MagnitudePruning":
        if self.amount is not None and self.threshold is not None:
            raise ValueError("give amount or threshold, not both")
        return self


def compress(config: MagnitudePruning, context: CompressionContext) -> Bundle:
    source = read_bundle(context.torch_bundle, verify=False)
    pruned_bundle = context.scratch_dir / "pruned"
    shutil.copytree(context.torch_bundle, pruned_bundle)
    counts = [_prune_graph(config, context, source, name, pruned_bundle) for name in source.graphs]
    write_bundle(pruned_bundle, source)
    exported = context.spec.export_onnx(pruned_bundle, context.output_dir)
    num_weights, num_pruned = (sum(count) for count in zip(*counts, strict=True))
    return exported.model_copy(
        update={
            "provenance": {"num_prunable_weights": num_weights, "num_pruned_weights": num_pruned, "pruned_share": num_pruned / num_weights}
        }
    )


def _prune_graph(config: MagnitudePruning, context: CompressionContext, source: Bundle, graph_name: str, folder: Path) -> tuple[int, int]:
    """Prune one safetensors file in place; the number of prunable weights, and how many of them are zero afterwards."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / source.graphs[graph_name].file
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    module = context.spec.build_module(source, context.torch_bundle, graph_name)
    names = linear_weight_names(module) & set(tensors)
    if not names:
        raise CompressionError(f"{path.name}: graph {graph_name!r} has no Linear layer whose weights could be pruned")
    weights = {name: tensors[name] for name in sorted(names)}
    tensors |= _pruned(config, weights)
    save_file(tensors, path, metadata=metadata)
    return sum(weight.numel() for weight in weights.values()), sum(int((tensors[name] == 0).sum()) for name in weights)


def linear_weight_names(module: "nn.Module") -> set[str]:
    """Names of the weights of Linear layers, without those that are also an embedding table (tied weights)."""
    from torch import nn

    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    return {
        f"{name}.weight"
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear) and id(layer.weight) not in embeddings
    }


def _pruned(config: MagnitudePruning, weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """w -> w where |w| is among the largest (or above the threshold), else 0."""
    from torch import nn
    from torch.nn.utils import prune

    if config.threshold is not None:
        return {name: weight * (weight.abs() > config.threshold) for name, weight in weights.items()}
    # torch prunes parameters of modules in place, so each weight gets a module of its own.
    holders = {name: nn.Module() for name in weights}
    for name, weight in weights.items():
        holders[name].register_parameter("weight", nn.Parameter(weight.clone(), requires_grad=False))
    if config.scope == "global":
        prune.global_unstructured([(holder, "weight") for holder in holders.values()], prune.L1Unstructured, amount=config.amount)
    else:
        for holder in holders.values():
            prune.l1_unstructured(holder, "weight", amount=config.amount)
    for holder in holders.values():
        prune.remove(holder, "weight")
    return {name: holder.get_parameter("weight").detach() for name, holder in holders.items()}


METHOD = CompressionMethod(
    name="magnitude_pruning",
    title="Magnitude pruning",
    config=MagnitudePruning,
    starts_from="torch",
    requires_calibration=False,
    compress=compress,
    libraries=("torch", "transformers", "onnx", "onnxscript"),
)
