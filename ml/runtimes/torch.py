"""Runs a graph of a torch bundle in eager PyTorch: the uncompressed model that everything else is compared with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ml.bundles import Bundle
from ml.errors import BundleError
from ml.predictor import RunGraph

BuildModule = Callable[[Bundle, Path, str], torch.nn.Module]


def load_graph(bundle: Bundle, folder: Path, graph_name: str, num_threads: int, build_module: BuildModule) -> RunGraph:
    """Load one graph. The returned function may be called from several threads at once.

    The module is called with the graph's inputs by name and returns a tensor, or a tuple in the order of the graph's outputs.

    Args:
        num_threads: math threads; PyTorch knows one number for the whole process, so this changes it for everybody in it.
        build_module: the solution's, see `SolutionSpec.build_module`.

    Raises:
        BundleError: there is no such graph.
    """
    if graph_name not in bundle.graphs:
        raise BundleError(f"{folder}: there is no graph {graph_name!r} in this bundle; it holds {sorted(bundle.graphs)}")
    graph = bundle.graphs[graph_name]
    torch.set_num_threads(num_threads)
    module = build_module(bundle, folder, graph_name).eval()
    output_names = [tensor.name for tensor in graph.outputs]

    def run_graph(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            outputs = module(**{tensor.name: torch.from_numpy(inputs[tensor.name]) for tensor in graph.inputs})
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        return dict(zip(output_names, (output.numpy() for output in outputs), strict=True))

    return run_graph
