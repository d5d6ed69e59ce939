"""A loaded bundle that answers requests: codec, graph, codec."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ml.bundles import Bundle, read_bundle
from ml.solution import Codec, load_solution

RunGraph = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Predictor:
    """Answers requests with one bundle. Safe to call from several threads.

    Args:
        bundle: what the bundle says of itself.
        codec: the solution's, for this bundle.
        run_graph: graph inputs -> graph outputs.
    """

    def __init__(self, bundle: Bundle, codec: Codec, run_graph: RunGraph):
        self.bundle = bundle
        self.codec = codec
        self.run_graph = run_graph

    def outputs(self, requests: Sequence[dict]) -> dict[str, np.ndarray]:
        """Raw graph outputs, one row per request."""
        if self.bundle.batch_invariant or len(requests) == 1:
            return self.run_graph(self.codec.encode(requests))
        # Dynamic INT8 takes its activation scale from the whole batch, and padding can flip a rounding of static INT8:
        # run alone, a row has one answer.
        rows = [self.run_graph(self.codec.encode([request])) for request in requests]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def predict(self, requests: Sequence[dict]) -> list[dict]:
        """One reply per request, in order."""
        return self.codec.decode(requests, self.outputs(requests))


def load_predictor(folder: Path, *, num_threads: int = 1, verify: bool = True) -> Predictor:
    """Load a bundle folder with the runtime it names.

    Raises:
        BundleError: the folder is damaged (see `read_bundle`).
    """
    bundle = read_bundle(folder, verify=verify)
    spec = load_solution(bundle.solution)
    graph_name = next(iter(bundle.graphs))
    if bundle.runtime == "onnxruntime":
        from ml.runtimes.onnx import load_graph

        run_graph = load_graph(bundle, folder, graph_name, num_threads)
    else:
        from ml.runtimes.torch import load_graph

        run_graph = load_graph(bundle, folder, graph_name, num_threads, spec.build_module)
    return Predictor(bundle, spec.load_codec(bundle, folder), run_graph)
