"""Where an encoder comes from: a folder, a Python package, an object-store prefix, the Hugging Face hub, or a config alone.

Whatever the source, what comes out is a local folder in the Hugging Face layout: `config.json`, tokenizer files and
`*.safetensors`; without the last, the weights are to be drawn at random (`config:` sources only).
Weights are read from safetensors only, and no code that lies beside a model is ever run.
"""

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ml.errors import ConfigError
from ml.storage.artifacts import digest_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ml.storage.base import ObjectInfo

RECIPE_FILE = "millstream.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
OTHER_SOURCES = "a folder, package:<import name>/<folder>, s3://bucket/prefix, config:<folder>"

_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")


class EncoderRecipe(BaseModel):
    """`millstream.json` beside a `config.json`, both optional: what a `config:` source needs that its config does not say.

    Args:
        tokenizer: path or `package:<import name>/<file>` of a tokenizer.json, where none lies in the folder.
        vocabulary: "seen" keeps only the tokens that occur in the training texts: a random table row that is never
            trained is noise, and the table is most of a small model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: str | None = None
    vocabulary: Literal["full", "seen"] = "full"


def fetch_encoder(source: str, work_dir: Path) -> Path:
    """A local folder with the encoder; folders and packages are used in place, the rest is fetched into `work_dir`.

    Args:
        source: a folder, `package:<import name>/<folder>`, `s3://bucket/prefix`, `config:<folder or package:...>`
            (the architecture with random weights), or a hub name, optionally with `@<revision>`.

    Raises:
        ConfigError: there is no such encoder, its weights are pickles, or the hub does not answer.
        StorageError: the object store refused.
    """
    if source.startswith("config:"):
        return _fetch_config(source, work_dir / "encoder")
    if source.startswith("s3://"):
        folder = _fetch_prefix(source, work_dir / "encoder")
    elif (local := _local_folder(source)) is not None:
        folder = local
    else:
        folder = _fetch_from_hub(source)
    _check_config(folder, source)
    _check_weights(folder, source)
    return folder


def encoder_digest(source: str) -> str:
    """Identifies the encoder's bytes for stage keys: config, weights and tokenizer; for a hub name its commit.

    Raises:
        ConfigError: as `fetch_encoder`.
    """
    if source.startswith("config:"):
        folder, recipe = _read_recipe(source)
        tokenizer = {"tokenizer": digest_file(_locate(recipe.tokenizer))} if recipe.tokenizer else {}
        return _combine({name: digest for name, digest in _file_digests(folder).items() if not _is_weights(name)} | tokenizer)
    if source.startswith("s3://"):
        return _combine({info.key: f"{info.etag} {info.size_bytes}" for info in _list_prefix(source)[1]})
    if (folder := _local_folder(source)) is not None:
        _check_config(folder, source)
        return _combine(_file_digests(folder))
    return _combine({"hub": _hub_commit(source)})


def read_recipe(folder: Path) -> EncoderRecipe:
    """The recipe that lies in a folder, or its defaults.

    Raises:
        ConfigError: `millstream.json` cannot be read.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        return EncoderRecipe()
    try:
        return EncoderRecipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def has_trained_weights(folder: Path) -> bool:
    """Whether a fetched folder brings weights; if not, they are to be drawn at random."""
    return any(folder.glob("*.safetensors"))


def read_config(folder: Path) -> "PretrainedConfig":
    """The architecture of a fetched encoder, of those that can classify texts.

    Raises:
        ConfigError: transformers does not know it, or it is an encoder-decoder.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture checks its values in its own way
        raise ConfigError(f"{folder}: transformers cannot read its config.json ({error}); choose an encoder that it knows") from error
    if config.is_encoder_decoder:
        raise ConfigError(f"{folder}: {config.model_type} is an encoder-decoder; choose an encoder (BERT, ...) or a causal model")
    if not hasattr(config.get_text_config(), "vocab_size"):
        raise ConfigError(f"{folder}: {config.model_type} reads no texts; choose a text encoder")
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def _local_folder(source: str) -> Path | None:
    """The folder that a path or a package source names; None when it reads as a hub name."""
    if source.startswith("package:"):
        return _locate(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(source):
        raise ConfigError(f"encoder {source!r}: there is no such folder, and it is no hub name; give {OTHER_SOURCES}, or a hub name")
    return None


def _locate(source: str) -> Path:
    """A file or folder by path or `package:<import name>/<path>`; the package is found, not imported."""
    if not source.startswith("package:"):
        path = Path(source).expanduser()
        if not path.exists():
            raise ConfigError(f"{source!r} does not exist; give a path that does")
        return path
    package, _, inner = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{source!r}: there is no installed package {package!r}; install it with pip, or give another source")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise ConfigError(f"{source!r}: package {package!r} holds no {inner!r}; it holds {sorted(p.name for p in root.iterdir())}")
    return path


def _read_recipe(source: str) -> tuple[Path, EncoderRecipe]:
    folder = _locate(source.removeprefix("config:"))
    _check_config(folder, source)
    return folder, read_recipe(folder)


def _fetch_config(source: str, destination: Path) -> Path:
    """Config and tokenizer without the weights."""
    folder, recipe = _read_recipe(source)
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    for path in _model_files(folder):
        if not _is_weights(path.name):
            shutil.copyfile(path, destination / path.name)
    if recipe.tokenizer:
        shutil.copyfile(_locate(recipe.tokenizer), destination / "tokenizer.json")
    return destination


def _list_prefix(source: str) -> "tuple[str, list[ObjectInfo]]":
    from ml.storage.connect import open_artifact_store

    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    found = [
        info
        for info in open_artifact_store().objects.list(bucket, prefix)
        if "/" not in info.key.removeprefix(prefix) and any(Path(info.key).match(pattern) for pattern in MODEL_FILES)
    ]
    if not any(info.key == f"{prefix}config.json" for info in found):
        raise ConfigError(f"encoder {source!r}: there is no config.json under this prefix; upload the folder of the model there")
    return prefix, found


def _fetch_prefix(source: str, destination: Path) -> Path:
    from ml.storage.connect import open_artifact_store

    prefix, found = _list_prefix(source)
    objects = open_artifact_store().objects
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    for info in found:
        objects.download(info.bucket, info.key, destination / info.key.removeprefix(prefix))
    return destination


def _fetch_from_hub(source: str) -> Path:
    """The hub's files in its own cache, shared with other programs of this user; offline, what was fetched before."""
    from huggingface_hub import snapshot_download

    name, revision = _hub_parts(source)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES)))
    except Exception as error:  # the hub client raises errors of its own and of its HTTP library
        raise _unreachable(source, error) from error


def _hub_commit(source: str) -> str:
    """The commit a hub name stands for now; when the hub does not answer, the one that was fetched before."""
    from huggingface_hub import HfApi, snapshot_download

    name, revision = _hub_parts(source)
    try:
        commit = HfApi().model_info(name, revision=revision, timeout=20).sha
        if commit is not None:
            return commit
    except Exception as error:  # as above
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES), local_files_only=True)).name
        except Exception:
            raise _unreachable(source, error) from error
    raise ConfigError(f"encoder {source!r}: the hub names no commit for it; give a revision, {name}@<commit>")


def _hub_parts(source: str) -> tuple[str, str | None]:
    match = _HUB_NAME.fullmatch(source)
    if match is None:
        raise ConfigError(f"encoder {source!r} is no hub name; write it as <owner>/<model>, or <owner>/<model>@<revision>")
    return match["name"], match["revision"]


def _unreachable(source: str, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return ConfigError(
        f"encoder {source!r}: it is no folder here, and as a hub name it could not be fetched ({type(error).__name__}: {reason}). "
        f"Check the name and the connection, or use {OTHER_SOURCES}."
    )


def _check_config(folder: Path, source: str) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"encoder {source!r}: {folder} holds no config.json; give the folder that transformers' save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"encoder {source!r}: {path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"encoder {source!r}: {path} names no model_type; give a model in the transformers format")


def _check_weights(folder: Path, source: str) -> None:
    if has_trained_weights(folder):
        return
    pickled = sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern))
    if pickled:
        raise ConfigError(
            f"encoder {source!r}: its weights are {', '.join(pickled)}, which can run code when they are read; only safetensors are "
            "accepted. Convert them on a machine where you trust them: "
            "AutoModel.from_pretrained(folder).save_pretrained(new_folder), and give the new folder."
        )
    raise ConfigError(
        f"encoder {source!r}: {folder} holds no *.safetensors; for the architecture with random weights write config:{source}"
    )


def _model_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _file_digests(folder: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in _model_files(folder)}


def _combine(parts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
