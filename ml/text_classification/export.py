"""Torch bundle -> ONNX Runtime bundle with the same answers, proven before it is written down."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ml.bundles import Bundle, read_bundle, write_bundle
from ml.errors import BundleError
from ml.text_classification.codec import TOKENIZER_FILE
from ml.text_classification.model import GRAPH_NAME, build_module, classifier_graph

if TYPE_CHECKING:
    import onnx

    from ml.text_classification.network import TextClassifier

ONNX_FILE = "model.onnx"
EXTERNAL_WEIGHTS_FILE = "model.onnx.data"
OPSET = 18
# Protocol buffers end at 2 GiB; beyond it the weights lie in a second file beside the graph.
SINGLE_FILE_LIMIT_BYTES = 1_900_000_000
MAX_LOGIT_DIFFERENCE = 1e-4
PARITY_SHAPES = ((1, 1), (1, 7), (2, 16), (5, 33), (3, 64))


def export_onnx(torch_bundle_folder: Path, output_folder: Path) -> Bundle:
    """Export the classifier to ONNX (opset 18, any batch and length) and check its logits against torch.

    Args:
        torch_bundle_folder: from `save_torch_bundle`, or changed by a compression method.
        output_folder: empty; gets a bundle of runtime "onnxruntime" with the same tokenizer, options and schemas.

    Raises:
        BundleError: the source is damaged, or the logits differ by more than 1e-4 for some batch and length.
    """
    source = read_bundle(torch_bundle_folder)
    model = build_module(source, torch_bundle_folder, GRAPH_NAME)
    output_folder.mkdir(parents=True, exist_ok=True)
    path = output_folder / ONNX_FILE
    _write_graph(model, path)
    difference = _largest_difference(model, path, min(source.options["max_length"], 512), source.options["pad_id"])
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise BundleError(
            f"{path}: its logits differ from those of the torch model by {difference:.2g}, allowed is {MAX_LOGIT_DIFFERENCE:g}; "
            f"the exporter does not keep the arithmetic of {source.options['architecture']}; choose another encoder"
        )
    shutil.copyfile(torch_bundle_folder / TOKENIZER_FILE, output_folder / TOKENIZER_FILE)
    weights = [file for file in (path, output_folder / EXTERNAL_WEIGHTS_FILE) if file.is_file()]
    return write_bundle(
        output_folder,
        Bundle(
            solution=source.solution,
            runtime="onnxruntime",
            graphs={GRAPH_NAME: classifier_graph(ONNX_FILE, len(source.options["labels"]))},
            side_files=(TOKENIZER_FILE, *(file.name for file in weights[1:])),
            options=source.options,
            input_schema=source.input_schema,
            output_schema=source.output_schema,
            provenance={
                **source.provenance,
                "opset": OPSET,
                "largest_logit_difference_to_torch": difference,
                "weights_bytes": sum(file.stat().st_size for file in weights),
            },
        ),
    )


def _write_graph(model: "TextClassifier", path: Path) -> None:
    import onnx
    import torch

    _choose_exportable_arithmetic(model)
    vocabulary = model.token_table.num_embeddings
    # A batch of one, or rows without padding, would be taken for constants.
    input_ids = torch.arange(2 * 12).reshape(2, 12) % vocabulary
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 8:] = 0
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    axes = {0: batch, 1: length}
    with _without_warnings():
        program = torch.onnx.export(
            model,
            (input_ids, attention_mask),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            verbose=False,
            optimize=True,
        )
    if program is None:
        raise BundleError(f"{path}: the exporter gave no graph for {type(model.encoder).__name__}; choose another encoder")
    graph = program.model_proto
    _strip_traces(graph)
    too_large = sum(parameter.nbytes for parameter in model.parameters()) >= SINGLE_FILE_LIMIT_BYTES
    onnx.save_model(graph, path, save_as_external_data=too_large, location=EXTERNAL_WEIGHTS_FILE)


def _choose_exportable_arithmetic(model: "TextClassifier") -> None:
    """Plain attention and dense experts: the same numbers by operations that a graph can hold.

    Fused attention decomposes into a graph with a NaN check per layer, about a tenth slower at batch 1. Mixtures of experts
    choose by data-dependent shapes; see `dense_experts`.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from ml.text_classification.network import dense_experts

    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.encoder.set_attn_implementation("eager")
    model.encoder.set_experts_implementation("dense")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep the exporter's notes (no torchvision here, deprecations of its own calls) off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip_traces(graph: "onnx.ModelProto") -> None:
    """Drop the exporter's notes: they hold file paths and stack traces of this machine, so no two files would be equal."""
    del graph.metadata_props[:]
    for part in (graph.graph, *graph.functions):
        for item in (part, *part.node, *part.value_info):
            del item.metadata_props[:]
            item.doc_string = ""
    for item in (*graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def _largest_difference(model: "TextClassifier", path: Path, max_length: int, pad_id: int) -> float:
    """Largest absolute difference of logits over several batches and lengths, padded rows among them."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    vocabulary = model.token_table.num_embeddings
    largest = 0.0
    for batch, length in {(batch, min(length, max_length)) for batch, length in PARITY_SHAPES}:
        input_ids = random.integers(0, vocabulary, size=(batch, length))
        attention_mask = (np.arange(length) < random.integers(1, length + 1, size=(batch, 1))).astype(np.int64)
        attention_mask[0] = 1
        input_ids[attention_mask == 0] = pad_id
        (found,) = session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})
        with torch.inference_mode():
            expected = model(torch.from_numpy(input_ids), torch.from_numpy(attention_mask)).numpy()
        largest = max(largest, float(np.abs(found - expected).max()))
    return largest
