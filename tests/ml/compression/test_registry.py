"""Methods are found by their presence in the folder, and their settings are checked before a run starts."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ml.compression.methods as methods_folder
from ml.bundles import read_bundle
from ml.compression.registry import methods, validate_methods
from ml.errors import ConfigError
from ml.settings import REPOSITORY_ROOT
from tests.ml.compression.conftest import TinyModel, logits

GUIDE = REPOSITORY_ROOT / "docs/adding-a-compression-method.md"


@pytest.fixture
def drop_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Puts a file into a folder that stands beside the real one for one test."""
    folder = tmp_path / "dropped_methods"
    folder.mkdir()
    monkeypatch.setattr(methods_folder, "__path__", [*methods_folder.__path__, str(folder)])
    before = set(sys.modules)

    def drop(module_name: str, code: str) -> None:
        (folder / f"{module_name}.py").write_text(code, encoding="utf-8")
        methods.cache_clear()

    yield drop
    for name in set(sys.modules) - before:
        if name.startswith(f"{methods_folder.__name__}."):
            del sys.modules[name]
    methods.cache_clear()


def guide_code() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


def test_the_mission_methods_are_there():
    assert {"dynamic_int8", "static_int8", "magnitude_pruning"} <= set(methods())


def test_a_dropped_file_works_without_any_other_edit(drop_method, tiny_model: TinyModel, tmp_path: Path):
    """Follows docs/adding-a-compression-method.md to the letter."""
    drop_method("round_weights", guide_code())
    (config,) = validate_methods([{"method": "round_weights", "decimals": 3}])
    folder = tiny_model.fetch(tiny_model.compress(config, tmp_path), tmp_path / "fetched")
    assert read_bundle(folder).provenance["parameters"] == {"decimals": 3}
    expected = logits(tiny_model.onnx_dir, tiny_model.spec, tiny_model.test_requests)
    found = logits(folder, tiny_model.spec, tiny_model.test_requests)
    assert 0 < np.abs(found - expected).max() < 0.2


def test_settings_of_a_dropped_file_are_checked(drop_method):
    drop_method("round_weights", guide_code())
    with pytest.raises(ConfigError, match=r"compression\.0\.decimals: .*found 8"):
        validate_methods([{"method": "round_weights", "decimals": 8}])


def test_a_file_without_a_method_is_named(drop_method):
    drop_method("forgotten", "x = 1\n")
    with pytest.raises(ConfigError, match=r"forgotten\.py: a compression method must define METHOD"):
        methods()


def test_two_methods_of_one_name_are_refused(drop_method):
    drop_method("zz_again", guide_code().replace("round_weights", "dynamic_int8"))
    with pytest.raises(ConfigError, match=r"zz_again\.py: there is another compression method named 'dynamic_int8'"):
        methods()


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"compression\.1: there is no method 'static_int9'; did you mean 'static_int8'\?"):
        validate_methods(["dynamic_int8", "static_int9"])


def test_a_variant_takes_the_name_of_its_method_unless_named():
    configs = validate_methods(["dynamic_int8", {"method": "dynamic_int8", "name": "coarse", "per_channel": False}])
    assert [config["name"] for config in configs] == ["dynamic_int8", "coarse"]
    with pytest.raises(ConfigError, match="two variants have one name"):
        validate_methods(["dynamic_int8", "dynamic_int8"])
