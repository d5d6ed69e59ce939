"""Tiny but real text-classifier bundles: a word-level tokenizer and an ONNX graph, made in milliseconds."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ml.bundles import Bundle, GraphSpec, TensorSpec, read_bundle, schema_digest, write_bundle
from ml.registry import ModelVersion, version_id
from ml.storage.artifacts import ArtifactStore
from ml.text_classification.codec import INPUT_SCHEMA, TOKENIZER_FILE, output_schema

GRAPH_FILE = "model.onnx"
PAD_ID = 0
WORDS = ("[PAD]", "[UNK]", "a", "and", "awful", "bad", "boring", "film", "fine", "good", "great", "is", "it", "the", "warm", "was")


def build_tiny_bundle(
    folder: Path,
    *,
    labels: Sequence[str] = ("negative", "positive"),
    words: Sequence[str] = WORDS,
    seed: int = 0,
    width: int = 8,
    max_length: int = 32,
    solution: str = "sentiment",
) -> Bundle:
    """Write a bundle whose answers depend on `seed`; the same arguments give the same bundle digest.

    The graph takes the mean of word vectors over the mask, then one MatMul and a bias.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder / TOKENIZER_FILE, words)
    _write_graph(folder / GRAPH_FILE, num_words=len(words), num_labels=len(labels), width=width, seed=seed)
    bundle = Bundle(
        solution=solution,
        runtime="onnxruntime",
        graphs={
            "classifier": GraphSpec(
                file=GRAPH_FILE,
                inputs=(
                    TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length")),
                    TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length")),
                ),
                outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", len(labels))),),
            )
        },
        side_files=(TOKENIZER_FILE,),
        options={"labels": list(labels), "positive_label": labels[-1], "max_length": max_length, "pad_id": PAD_ID},
        input_schema=INPUT_SCHEMA,
        output_schema=output_schema(labels),
        provenance={"method": "tiny", "weights_bytes": (folder / GRAPH_FILE).stat().st_size},
    )
    return write_bundle(folder, bundle)


def tiny_version(store: ArtifactStore, folder: Path, *, name: str = "sentiment", second: int = 0) -> ModelVersion:
    """Put a bundle folder into the store and describe it as a version, made `second` seconds after a fixed moment."""
    bundle = read_bundle(folder)
    reference = store.put_folder(folder)
    created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second)
    return ModelVersion(
        name=name,
        version=version_id(created, reference),
        solution=bundle.solution,
        bundle=reference,
        schema_digest=schema_digest(bundle),
        options=bundle.options,
        run_id="test-run",
        created=created,
    )


def _write_tokenizer(path: Path, words: Sequence[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(path))


def _write_graph(path: Path, *, num_words: int, num_labels: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    constants = {
        "vectors": random.normal(size=(num_words, width)).astype(np.float32),
        "head": random.normal(size=(width, num_labels)).astype(np.float32),
        "bias": random.normal(size=num_labels).astype(np.float32),
        "axis_1": np.array([1], dtype=np.int64),
        "axis_2": np.array([2], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["vectors", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis_2"], ["mask_column"]),
        helper.make_node("Mul", ["embedded", "mask_column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis_1"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "axis_1"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "head"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", num_labels])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
