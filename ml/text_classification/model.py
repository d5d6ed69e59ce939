"""Builds, saves and loads a text classifier. torch and transformers are imported only when one of these is called,
so that a serving process that runs ONNX never loads them."""

import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ml.bundles import Bundle, GraphSpec, TensorSpec, write_bundle
from ml.errors import BundleError, ConfigError
from ml.text_classification.codec import INPUT_SCHEMA, TOKENIZER_FILE, output_schema
from ml.text_classification.encoders import has_trained_weights, read_config
from ml.text_classification.settings import TextClassifierConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ml.text_classification.network import TextClassifier

GRAPH_NAME = "classifier"
WEIGHTS_FILE = "model.safetensors"
ENCODER_CONFIG_FILE = "config.json"


def build_classifier(
    encoder_dir: Path, num_labels: int, model_settings: TextClassifierConfig, *, vocab_size: int | None = None, seed: int
) -> "TextClassifier":
    """A classifier to be trained: the encoder's weights, and a head drawn from the seed.

    Args:
        encoder_dir: from `fetch_encoder`.
        vocab_size: rows of the embedding table that the tokenizer needs (`TokenizerInfo.vocab_size`). A trained table
            grows to it but never shrinks; a random one gets exactly as many.

    Raises:
        ConfigError: the encoder is of a kind that cannot classify, or its weights do not fit its config.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if has_trained_weights(encoder_dir):
            encoder = _trained_encoder(encoder_dir)
            if vocab_size is not None:
                _grow_embedding(encoder, vocab_size)
        else:
            config = read_config(encoder_dir)
            if vocab_size is not None:
                config.get_text_config().vocab_size = vocab_size
            encoder = _encoder_from_config(config)
        return _with_head(encoder, num_labels, _pooling(encoder.config, model_settings), model_settings.dropout)


def save_torch_bundle(
    model: "TextClassifier",
    folder: Path,
    *,
    tokenizer_path: Path,
    labels: Sequence[str],
    positive_label: str | None,
    max_length: int,
    pad_id: int,
    provenance: dict,
    solution: str,
) -> Bundle:
    """Write the trained model and all that is needed to serve it into an empty folder."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS_FILE))  # stores tensors that are shared between layers once
    config = model.encoder.config
    (folder / ENCODER_CONFIG_FILE).write_text(_config_text(config), encoding="utf-8")
    shutil.copyfile(tokenizer_path, folder / TOKENIZER_FILE)
    return write_bundle(
        folder,
        Bundle(
            solution=solution,
            runtime="torch",
            graphs={GRAPH_NAME: classifier_graph(WEIGHTS_FILE, len(labels))},
            side_files=(ENCODER_CONFIG_FILE, TOKENIZER_FILE),
            options={
                "labels": list(labels),
                "positive_label": positive_label,
                "max_length": max_length,
                "pad_id": pad_id,
                "pooling": model.pooling,
                "dropout": model.dropout.p,
                "architecture": config.model_type,
            },
            input_schema=INPUT_SCHEMA,
            output_schema=output_schema(labels),
            provenance={**provenance, "weights_bytes": (folder / WEIGHTS_FILE).stat().st_size},
        ),
    )


def build_module(bundle: Bundle, folder: Path, graph_name: str) -> "TextClassifier":
    """The module of a torch bundle in eval mode; the encoder it was trained from is not needed.

    Raises:
        BundleError: it is no torch bundle, has no such graph, or its weights do not fit its config.
    """
    from safetensors.torch import load_model

    if bundle.runtime != "torch" or graph_name not in bundle.graphs:
        raise BundleError(
            f"{folder}: no torch graph {graph_name!r}; it is a {bundle.runtime} bundle with the graphs {', '.join(bundle.graphs)}"
        )
    options = bundle.options
    encoder = _encoder_from_config(read_config(folder))
    model = _with_head(encoder, len(options["labels"]), options["pooling"], options["dropout"])
    try:
        load_model(model, folder / bundle.graphs[graph_name].file, strict=True)
    except RuntimeError as error:
        raise BundleError(f"{folder}: the weights do not fit config.json ({error}); export the model again") from error
    return model.eval()


def classifier_graph(file: str, num_labels: int) -> GraphSpec:
    """Two (batch, length) int64 inputs, one (batch, classes) float32 output."""
    tokens = ("batch", "length")
    return GraphSpec(
        file=file,
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=tokens),
            TensorSpec(name="attention_mask", dtype="int64", shape=tokens),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", num_labels)),),
    )


def _with_head(encoder: "PreTrainedModel", num_labels: int, pooling: Any, dropout: float) -> "TextClassifier":
    from ml.text_classification.network import TextClassifier

    hidden_size = encoder.config.get_text_config().hidden_size
    return TextClassifier(encoder, hidden_size=hidden_size, num_labels=num_labels, pooling=pooling, dropout=dropout)


def _encoder_class_options(config: "PretrainedConfig") -> dict[str, Any]:
    """Keyword arguments of the model class that leave out its pooler, which nothing here would train."""
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise ConfigError(f"transformers has no plain encoder for model_type {config.model_type!r}; choose another encoder")
    model_class = MODEL_MAPPING[type(config)]
    options: dict[str, Any] = {"dtype": "float32"}
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    return options


def _encoder_from_config(config: "PretrainedConfig") -> "PreTrainedModel":
    from transformers import AutoModel

    return AutoModel.from_config(config, **_encoder_class_options(config))


def _trained_encoder(folder: Path) -> "PreTrainedModel":
    from transformers import AutoModel

    config = read_config(folder)
    try:
        with _without_progress():
            encoder, loaded = AutoModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **_encoder_class_options(config),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder}: the encoder cannot be loaded ({error}); give a folder written by save_pretrained") from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers would fill them with random numbers and go on.
        raise ConfigError(
            f"{folder}: its safetensors lack {len(missing)} weights that config.json asks for, such as {missing[0]}; "
            "the weights are of another model"
        )
    return encoder


def _grow_embedding(encoder: "PreTrainedModel", num_rows: int) -> None:
    """Grow the token table to at least `num_rows`, with the mean and spread that the trained rows have in each dimension.

    Rows that all start at the mean would be told apart only after hundreds of steps at a fine-tuning learning rate.
    """
    import torch

    old_rows = cast("torch.nn.Embedding", encoder.get_input_embeddings()).weight.detach().clone()
    if num_rows <= len(old_rows):
        return
    encoder.resize_token_embeddings(num_rows, mean_resizing=False)
    table = cast("torch.nn.Embedding", encoder.get_input_embeddings()).weight
    noise = torch.randn(num_rows - len(old_rows), old_rows.shape[1])
    with torch.no_grad():
        table[len(old_rows) :] = old_rows.mean(dim=0) + old_rows.std(dim=0) * noise


def _pooling(config: "PretrainedConfig", model_settings: TextClassifierConfig) -> str:
    if model_settings.pooling != "auto":
        return model_settings.pooling
    return "last" if is_causal(config) else "mean"


def is_causal(config: "PretrainedConfig") -> bool:
    """Whether tokens see only those before them: transformers knows it as a language model, but not as a masked one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _config_text(config: "PretrainedConfig") -> str:
    """`config.json` without what only says where the encoder once lay."""
    values = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        values.pop(name, None)
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


@contextmanager
def _without_progress() -> Iterator[None]:
    """Keep transformers' progress bars and its report on the unused pooler off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
