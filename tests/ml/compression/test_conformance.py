"""What every compression method promises. A new file in `ml/compression/methods/` is held to it without being named here."""

from pathlib import Path

import numpy as np
import pytest

from ml.bundles import read_bundle, schema_digest
from ml.compression.registry import methods, validate_methods
from ml.compression.weights import weights_bytes
from ml.errors import ConfigError, DigestMismatchError
from ml.storage.artifacts import digest_file
from tests.ml.compression.conftest import TinyModel, logits, open_predictor

pytestmark = pytest.mark.parametrize("method_name", sorted(methods()))


@pytest.fixture
def compressed_dir(tiny_model: TinyModel, method_name: str, compressed_dirs: dict[str, Path], tmp_path_factory) -> Path:
    """The tiny model compressed with the method's defaults, once for all tests."""
    if method_name not in compressed_dirs:
        folder = tmp_path_factory.mktemp(method_name)
        variant = tiny_model.compress({"method": method_name}, folder)
        compressed_dirs[method_name] = tiny_model.fetch(variant, folder / "fetched")
    return compressed_dirs[method_name]


@pytest.fixture(scope="module")
def compressed_dirs() -> dict[str, Path]:
    return {}


def test_callers_see_the_same_model(tiny_model: TinyModel, compressed_dir: Path):
    source, made = read_bundle(tiny_model.torch_dir), read_bundle(compressed_dir)
    assert schema_digest(made) == schema_digest(source)
    assert made.options == source.options
    assert made.solution == source.solution
    assert made.runtime == "onnxruntime"


def test_the_bundle_says_how_it_was_made(tiny_model: TinyModel, compressed_dir: Path, method_name: str):
    provenance = read_bundle(compressed_dir).provenance
    starts_from_torch = methods()[method_name].starts_from == "torch"
    assert provenance["method"] == method_name
    assert provenance["source_bundle"] == (tiny_model.torch_ref if starts_from_torch else tiny_model.onnx_ref).digest
    assert provenance["source"]["encoder"] == "tiny"
    assert set(provenance["libraries"]) == set(methods()[method_name].libraries)
    (graph,) = read_bundle(compressed_dir).graphs.values()
    assert provenance["weights_bytes"] == weights_bytes(read_bundle(compressed_dir), compressed_dir)
    assert provenance["weights_bytes"] >= (compressed_dir / graph.file).stat().st_size


def test_answers_are_finite_and_close_to_the_source(tiny_model: TinyModel, compressed_dir: Path):
    expected = logits(tiny_model.onnx_dir, tiny_model.spec, tiny_model.test_requests)
    found = logits(compressed_dir, tiny_model.spec, tiny_model.test_requests)
    assert np.isfinite(found).all()
    margin, expected_margin = found[:, 0] - found[:, 1], expected[:, 0] - expected[:, 1]
    assert expected_margin.std() > 0.5, "the source must tell texts apart, or closeness says nothing"
    assert np.corrcoef(margin, expected_margin)[0, 1] > 0.95
    assert np.abs(margin - expected_margin).mean() < 0.25 * expected_margin.std()


def test_weights_are_really_changed(tiny_model: TinyModel, compressed_dir: Path):
    expected = logits(tiny_model.onnx_dir, tiny_model.spec, tiny_model.test_requests)
    found = logits(compressed_dir, tiny_model.spec, tiny_model.test_requests)
    assert np.abs(found - expected).max() > 1e-4


def test_a_row_has_one_answer_in_every_batch(tiny_model: TinyModel, compressed_dir: Path):
    predictor = open_predictor(compressed_dir, tiny_model.spec)
    alone = np.concatenate([predictor.outputs([request])["logits"] for request in tiny_model.test_requests])
    together = predictor.outputs(tiny_model.test_requests)["logits"]
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())


def test_batch_invariance_is_not_claimed_falsely(tiny_model: TinyModel, compressed_dir: Path):
    if not read_bundle(compressed_dir).batch_invariant:
        pytest.skip("it claims none")
    alone = logits(compressed_dir, tiny_model.spec, tiny_model.test_requests)
    together = logits(compressed_dir, tiny_model.spec, tiny_model.test_requests, batch_size=64)
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())


def test_a_second_run_gives_the_same_bytes_and_changes_no_source(
    tiny_model: TinyModel, method_name: str, compressed_dir: Path, tmp_path: Path
):
    again = tiny_model.compress({"method": method_name}, tmp_path)
    assert again.bundle is not None, again.failure
    assert again.bundle.digest == digest_file(compressed_dir / "bundle.json")
    source_ref = tiny_model.torch_ref if methods()[method_name].starts_from == "torch" else tiny_model.onnx_ref
    (source_dir,) = tmp_path.glob("bundle-*")
    assert {path.name: digest_file(path) for path in source_dir.iterdir()} == {name: ref.sha256 for name, ref in source_ref.files.items()}
    assert [path for path in tmp_path.iterdir() if path != source_dir] == [], "scratch files were left behind"


def test_an_unknown_setting_is_refused(tiny_model: TinyModel, method_name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown setting 'compression\.0\.no_such_setting'"):
        tiny_model.compress({"method": method_name, "no_such_setting": 1}, tmp_path)


def test_settings_survive_being_saved_with_the_run(method_name: str):
    (resolved,) = validate_methods([method_name])
    assert validate_methods([resolved]) == [resolved]


def test_a_damaged_source_is_an_error_of_the_run(tiny_model: TinyModel, method_name: str, tmp_path: Path):
    """Not of the method: no other method would fare better."""
    method = methods()[method_name]
    ref = tiny_model.torch_ref if method.starts_from == "torch" else tiny_model.onnx_ref
    store, file_ref = tiny_model.store, ref.files["tokenizer.json"]
    key = file_ref.uri.split("/", 3)[3]
    whole = store.get_bytes(file_ref)
    store.objects.put(store.runs_bucket, key, whole[:-1] + b" ")
    try:
        with pytest.raises(DigestMismatchError):
            tiny_model.compress({"method": method_name}, tmp_path)
    finally:
        store.objects.put(store.runs_bucket, key, whole)
