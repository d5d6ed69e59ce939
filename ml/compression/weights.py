"""How many bytes the weights of a bundle take: what a comparison of sizes counts, without tokenizer and other side files."""

from pathlib import Path

from ml.bundles import Bundle


def weight_files(bundle: Bundle, folder: Path) -> set[str]:
    """The files that hold the graphs' weights, relative to the folder."""
    files = {graph.file for graph in bundle.graphs.values()}
    if bundle.runtime == "onnxruntime":
        files |= {name for file in tuple(files) for name in external_weight_files(folder / file)}
    return files


def weights_bytes(bundle: Bundle, folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in weight_files(bundle, folder))


def external_weight_files(graph_path: Path) -> set[str]:
    """Files beside an ONNX graph that hold weights too large for it; named as in the graph, relative to its folder."""
    import onnx

    model = onnx.load(graph_path, load_external_data=False)
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
