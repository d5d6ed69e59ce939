import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from ml.bundles import Bundle, read_bundle
from ml.errors import BundleError, ConfigError
from ml.text_classification.encoders import fetch_encoder
from ml.text_classification.model import build_classifier, build_module, is_causal, save_torch_bundle
from ml.text_classification.network import TextClassifier, dense_experts
from ml.text_classification.settings import TextClassifierConfig
from ml.text_classification.tokenizer import prepare_tokenizer
from tests.tiny_encoders import VOCABULARY, write_tiny_bert, write_tiny_deepseek

SETTINGS = TextClassifierConfig(encoder="any", dropout=0.1)
TEXTS = ["the film was good", "a bad film!"] * 20
Kind = Literal["bert", "deepseek"]

torch.set_num_threads(1)  # two threads that wait for each other are slower on models this small


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {"bert": write_tiny_bert(root / "bert"), "deepseek": write_tiny_deepseek(root / "deepseek", TEXTS)}


def tokens(num_rows: int, length: int, vocabulary: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask under which the first row is whole and each later one a token shorter."""
    input_ids = torch.randint(5, vocabulary, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    attention_mask = (torch.arange(length) < (length - torch.arange(num_rows)).clamp(min=1)[:, None]).long()
    return input_ids * attention_mask, attention_mask


def save(model: TextClassifier, encoder_dir: Path, folder: Path, labels: tuple[str, ...] = ("negative", "positive")) -> Bundle:
    return save_torch_bundle(
        model,
        folder,
        tokenizer_path=encoder_dir / "tokenizer.json",
        labels=labels,
        positive_label=labels[-1],
        max_length=64,
        pad_id=0,
        provenance={"run": "test"},
        solution="sentiment",
    )


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_logits_have_one_column_per_class(kind: Kind, encoders: dict[Kind, Path]) -> None:
    model = build_classifier(encoders[kind], 7, SETTINGS, seed=0).eval()
    logits = model(*tokens(3, 9))
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_padding_and_other_rows_do_not_change_a_row(kind: Kind, pooling: Literal["mean", "last"], encoders: dict[Kind, Path]) -> None:
    settings = SETTINGS.model_copy(update={"pooling": pooling})
    model = build_classifier(encoders[kind], 2, settings, seed=0).eval()
    input_ids, attention_mask = tokens(6, 24)
    with torch.inference_mode():
        together = model(input_ids, attention_mask)
        for row in range(6):
            length = int(attention_mask[row].sum())
            alone = model(input_ids[row : row + 1, :length], attention_mask[row : row + 1, :length])
            assert (alone - together[row]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_each_token_matters(kind: Kind, encoders: dict[Kind, Path]) -> None:
    model = build_classifier(encoders[kind], 2, SETTINGS, seed=0).eval()
    input_ids, attention_mask = tokens(1, 8)
    with torch.inference_mode():
        before = model(input_ids, attention_mask)
        for position in range(8):
            changed = input_ids.clone()
            changed[0, position] = (changed[0, position] + 1) % 60
            assert (model(changed, attention_mask) - before).abs().max() > 1e-7, position


def test_pooling_is_the_last_token_for_causal_encoders_and_the_mean_for_others(encoders: dict[Kind, Path]) -> None:
    bert = build_classifier(encoders["bert"], 2, SETTINGS, seed=0)
    deepseek = build_classifier(encoders["deepseek"], 2, SETTINGS, seed=0)
    assert (bert.pooling, deepseek.pooling) == ("mean", "last")
    assert not is_causal(bert.encoder.config)
    assert is_causal(deepseek.encoder.config)


def test_pooled_vector_is_the_mean_over_the_mask_or_the_last_token() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]]])
    mask = torch.tensor([[1, 1, 0]])
    encoder: Any = torch.nn.Identity()
    mean = TextClassifier(encoder, hidden_size=2, num_labels=2, pooling="mean", dropout=0)
    last = TextClassifier(encoder, hidden_size=2, num_labels=2, pooling="last", dropout=0)
    assert mean._pool(hidden, mask).tolist() == [[2.0, 3.0]]
    assert last._pool(hidden, mask).tolist() == [[3.0, 4.0]]
    nothing = torch.zeros_like(mask)
    assert torch.isfinite(mean._pool(hidden, nothing)).all()
    assert last._pool(hidden, nothing).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_every_parameter_gets_a_gradient_in_one_short_step(kind: Kind, encoders: dict[Kind, Path]) -> None:
    """DDP stops at the first parameter that a step does not use; here two tokens choose few of the eight experts."""
    model = build_classifier(encoders[kind], 2, SETTINGS, seed=0).train()
    torch.nn.functional.cross_entropy(model(*tokens(1, 2)), torch.tensor([1])).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_a_few_steps_fit_a_few_rows(kind: Kind, encoders: dict[Kind, Path]) -> None:
    model = build_classifier(encoders[kind], 2, SETTINGS, seed=0).train()
    input_ids, attention_mask = tokens(8, 12)
    labels = torch.tensor([0, 1] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(input_ids, attention_mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_seed_decides_head_and_random_weights(encoders: dict[Kind, Path]) -> None:
    for encoder_dir, part in ((encoders["bert"], "head.weight"), (encoders["deepseek"], "encoder.embed_tokens.weight")):
        states = [build_classifier(encoder_dir, 2, SETTINGS, seed=seed).state_dict()[part] for seed in (1, 1, 2)]
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])


def test_building_leaves_the_random_state_of_the_caller_alone(encoders: dict[Kind, Path]) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build_classifier(encoders["bert"], 2, SETTINGS, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_trained_weights_are_the_encoders_own(encoders: dict[Kind, Path]) -> None:
    stored = load_file(encoders["bert"] / "model.safetensors")
    model = build_classifier(encoders["bert"], 2, SETTINGS, seed=5)
    loaded = model.encoder.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_trained_table_grows_by_rows_like_its_own(encoders: dict[Kind, Path]) -> None:
    plain = build_classifier(encoders["bert"], 2, SETTINGS, seed=0).token_table.weight
    size = len(VOCABULARY)
    grown = build_classifier(encoders["bert"], 2, SETTINGS, vocab_size=size + 500, seed=0)
    table = grown.token_table.weight
    assert torch.equal(table[:size], plain)
    assert grown.encoder.config.get_text_config().vocab_size == len(table) == size + 500
    plain, new = plain.detach(), table[size:].detach()
    assert (new.mean(dim=0) - plain.mean(dim=0)).abs().max() < 4 * plain.std() / 500**0.5
    assert 0.8 < float(new.std() / plain.std()) < 1.2
    again = build_classifier(encoders["bert"], 2, SETTINGS, vocab_size=size + 500, seed=0).token_table.weight
    assert torch.equal(again, table)


def test_trained_table_never_shrinks_and_a_random_one_fits_exactly(encoders: dict[Kind, Path]) -> None:
    assert build_classifier(encoders["bert"], 2, SETTINGS, vocab_size=10, seed=0).token_table.num_embeddings == len(VOCABULARY)
    assert build_classifier(encoders["deepseek"], 2, SETTINGS, vocab_size=300, seed=0).token_table.num_embeddings == 300


def test_weights_of_another_model_are_refused(encoders: dict[Kind, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(encoders["bert"], tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(ConfigError, match="lack 16 weights"):
        build_classifier(folder, 2, SETTINGS, seed=0)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}), encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_classifier(folder, 2, SETTINGS, seed=0)


def test_half_precision_checkpoints_are_loaded_in_full(encoders: dict[Kind, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(encoders["bert"], tmp_path / "encoder")
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}), encoding="utf-8")
    model = build_classifier(folder, 2, SETTINGS, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    bundle = save(model, folder, tmp_path / "bundle")
    assert {p.dtype for p in build_module(bundle, tmp_path / "bundle", "classifier").parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_bundle_gives_the_same_logits_without_the_encoder(kind: Kind, encoders: dict[Kind, Path], tmp_path: Path) -> None:
    encoder_dir = shutil.copytree(encoders[kind], tmp_path / "encoder")
    info = prepare_tokenizer(encoder_dir, TEXTS, tmp_path / "tokenizer.json")
    model = build_classifier(encoder_dir, 2, SETTINGS, vocab_size=info.vocab_size + 3, seed=3).eval()
    written = save(model, encoder_dir, tmp_path / "bundle")
    shutil.rmtree(encoder_dir)
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle == written
    loaded = build_module(bundle, tmp_path / "bundle", "classifier")
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(*tokens(4, 10)), model(*tokens(4, 10)))


def test_bundle_says_what_a_server_needs(encoders: dict[Kind, Path], tmp_path: Path) -> None:
    labels = ("schlecht", "mittel", "gut")
    bundle = save(build_classifier(encoders["bert"], 3, SETTINGS, seed=0), encoders["bert"], tmp_path / "bundle", labels)
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == [
        "bundle.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert bundle.options == {
        "labels": list(labels),
        "positive_label": "gut",
        "max_length": 64,
        "pad_id": 0,
        "pooling": "mean",
        "dropout": 0.1,
        "architecture": "bert",
    }
    assert bundle.output_schema["properties"]["label"]["enum"] == list(labels)
    assert bundle.weights_bytes == (tmp_path / "bundle" / "model.safetensors").stat().st_size
    assert bundle.provenance["run"] == "test"
    assert str(encoders["bert"]) not in (tmp_path / "bundle" / "config.json").read_text(encoding="utf-8")


def test_same_model_gives_the_same_bundle_wherever_it_lies(encoders: dict[Kind, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(encoders["bert"], tmp_path / "elsewhere")
    first = save(build_classifier(encoders["bert"], 2, SETTINGS, seed=0), encoders["bert"], tmp_path / "first")
    second = save(build_classifier(moved, 2, SETTINGS, seed=0), moved, tmp_path / "second")
    assert first.digests == second.digests


def test_bundle_of_another_kind_or_with_other_weights_is_refused(encoders: dict[Kind, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    bundle = save(build_classifier(encoders["bert"], 2, SETTINGS, seed=0), encoders["bert"], folder)
    with pytest.raises(BundleError, match="no torch graph 'retriever'"):
        build_module(bundle, folder, "retriever")
    with pytest.raises(BundleError, match="onnxruntime bundle"):
        build_module(bundle.model_copy(update={"runtime": "onnxruntime"}), folder, "classifier")
    weights = load_file(folder / "model.safetensors")
    weights.pop("head.bias")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BundleError, match=r"head\.bias"):
        build_module(bundle, folder, "classifier")


def test_shared_tensors_are_stored_once_and_shared_again(encoders: dict[Kind, Path], tmp_path: Path) -> None:
    model = build_classifier(encoders["bert"], 2, SETTINGS, seed=0)
    bert: Any = model.encoder
    layers = bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    save(model, encoders["bert"], tmp_path / "bundle")
    stored = load_file(tmp_path / "bundle" / "model.safetensors")
    assert len(stored) == len(model.state_dict()) - 1


def test_dense_experts_equal_the_chosen_ones(encoders: dict[Kind, Path]) -> None:
    model = build_classifier(encoders["deepseek"], 2, SETTINGS, seed=0)
    deepseek: Any = model.encoder
    experts = deepseek.layers[1].mlp.experts
    torch.manual_seed(0)
    hidden = torch.randn(13, 32, dtype=torch.float64)
    experts.double()
    weights, index = torch.rand(13, 8, dtype=torch.float64).topk(2, dim=-1)
    model.encoder.set_experts_implementation("eager")
    expected = experts(hidden, index, weights)
    assert (dense_experts(experts, hidden, index, weights) - expected).abs().max() < 1e-12


def test_committed_deepseek_encoder_is_small_and_causal(tmp_path: Path) -> None:
    encoder_dir = fetch_encoder("config:solutions/sentiment/encoders/deepseek_v3_tiny", tmp_path)
    model = build_classifier(encoder_dir, 2, SETTINGS, vocab_size=10_000, seed=0)
    assert type(model.encoder).__name__ == "DeepseekV3Model"
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    deepseek: Any = model.encoder
    kinds = [type(layer.mlp).__name__ for layer in deepseek.layers]
    assert kinds == ["DeepseekV3MLP", "DeepseekV3MoE", "DeepseekV3MoE"]


def test_importing_the_model_and_export_modules_loads_no_heavy_library() -> None:
    code = """if True:
        import sys
        import ml.text_classification.export, ml.text_classification.model, ml.text_classification.tokenizer
        print(sorted({"torch", "transformers", "onnx", "onnxruntime"} & set(sys.modules)))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
