"""Compression methods, found by scanning `ml/compression/methods/`: one file each, which defines `METHOD`."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ml.bundles import Bundle
from ml.errors import ConfigError
from ml.solution import SolutionSpec


class MethodConfig(BaseModel):
    """Base of every method's config. `method` is a Literal in the subclass; `name` names the variant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    name: str | None = None


@dataclass(frozen=True)
class CompressionContext:
    """What a method may work with.

    Args:
        torch_bundle: folder of the uncompressed torch bundle.
        onnx_bundle: folder of its ONNX Runtime fp32 export.
        calibration_requests: training rows as requests; empty unless the method requires calibration.
        output_dir: empty folder for the new bundle.
    """

    spec: SolutionSpec
    torch_bundle: Path
    onnx_bundle: Path
    calibration_requests: Sequence[dict]
    output_dir: Path
    seed: int = 0


@dataclass(frozen=True)
class CompressionMethod:
    """One method.

    Args:
        starts_from: which uncompressed bundle it changes; decides what must be fetched.
        version: raise it when the code changes what comes out.
        libraries: distributions whose version changes what comes out.
    """

    name: str
    title: str
    config: type[MethodConfig]
    starts_from: Literal["torch", "onnx"]
    requires_calibration: bool
    compress: Callable[[Any, CompressionContext], Bundle]
    version: int = 1
    libraries: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def methods() -> dict[str, CompressionMethod]:
    """All methods by name."""
    import ml.compression.methods as folder

    found = [importlib.import_module(f"{folder.__name__}.{module.name}").METHOD for module in pkgutil.iter_modules(folder.__path__)]
    return {method.name: method for method in found}


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
