"""Compression methods, found by scanning `ml/compression/methods/`: one file each, which defines `METHOD`."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ml.bundles import Bundle
from ml.errors import ConfigError
from ml.solution import SolutionSpec


class MethodConfig(BaseModel):
    """Base of every method's config, which adds `method: Literal["<name>"] = "<name>"` and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(default=None, description="name of the variant; by default that of the method")


@dataclass(frozen=True)
class CompressionContext:
    """What a method may work with.

    Args:
        torch_bundle: folder of the uncompressed torch bundle.
        onnx_bundle: folder of its ONNX Runtime fp32 export. Both are read only.
        calibration_requests: training rows as requests; empty unless the method requires calibration.
        output_dir: empty folder for the files of the new bundle.
        scratch_dir: empty folder for whatever else; it goes when the method returns.
        seed: of every random choice, so that the same inputs give the same bytes.
    """

    spec: SolutionSpec
    torch_bundle: Path
    onnx_bundle: Path
    calibration_requests: Sequence[dict]
    output_dir: Path
    scratch_dir: Path
    seed: int = 0


@dataclass(frozen=True)
class CompressionMethod:
    """One method.

    Args:
        starts_from: which uncompressed bundle it changes; only that one is fetched.
        compress: writes the files of an ONNX Runtime bundle into `context.output_dir` and returns what `bundle.json` is to
            say. Its `provenance` holds what the method has to tell of this result; the caller adds the rest and writes it.
        version: raise it when the code changes what comes out.
        libraries: distributions whose version changes what comes out.
        depends_on_cpu: its result depends on whether 8-bit products saturate here, see `ml.compression.cpu`.
    """

    name: str
    title: str
    config: type[MethodConfig]
    starts_from: Literal["torch", "onnx"]
    requires_calibration: bool
    compress: Callable[[Any, CompressionContext], Bundle]
    version: int = 1
    libraries: tuple[str, ...] = ()
    depends_on_cpu: bool = False


@lru_cache(maxsize=1)
def methods() -> dict[str, CompressionMethod]:
    """All methods by name.

    Raises:
        ConfigError: a file of the folder defines no method, or two define one name.
    """
    import ml.compression.methods as folder

    found: dict[str, CompressionMethod] = {}
    for file in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{file.name}")
        method = getattr(module, "METHOD", None)
        if not isinstance(method, CompressionMethod):
            raise ConfigError(f"{module.__file__}: a compression method must define METHOD = CompressionMethod(...)")
        if method.name in found:
            raise ConfigError(f"{module.__file__}: there is another compression method named {method.name!r}; rename one")
        found[method.name] = method
    return found


def validate_methods(settings: Sequence[str | dict]) -> list[dict]:
    """Check the `compression` list of a config and fill in defaults. A plain string is a method with its defaults.

    Raises:
        ConfigError: an unknown method or setting, or two variants of one name.
    """
    from ml.config import nearest, validate

    resolved = []
    for index, item in enumerate(settings):
        values = {"method": item} if isinstance(item, str) else dict(item)
        name = values.get("method")
        if name not in methods():
            raise ConfigError(f"compression.{index}: there is no method {name!r}{nearest(str(name), methods())}")
        config = validate(methods()[name].config, values, f"compression.{index}").model_dump(mode="json")
        config["name"] = config["name"] or name
        resolved.append(config)
    names = [config["name"] for config in resolved]
    if len(set(names)) != len(names):
        raise ConfigError(f"compression: two variants have one name, found {names}; give each its own `name`")
    return resolved
