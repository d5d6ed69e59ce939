"""From the trained model to its variants: the ONNX export, and one variant for each compression method.

A method that fails gives a variant without a bundle that says why; the run goes on with the others. A store that fails is
another matter: its errors pass, so that the task is tried again.
"""

import importlib.metadata
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ml.artifacts import EXPORT_METHOD, BundleRef, Variant
from ml.bundles import Bundle, read_bundle, write_bundle
from ml.compression.cpu import int8_products_saturate
from ml.compression.registry import CompressionContext, CompressionMethod, MethodConfig, methods, validate_methods
from ml.compression.weights import weights_bytes
from ml.config import validate
from ml.errors import CompressionError, StorageError
from ml.runtimes.onnx import load_graph
from ml.solution import SolutionSpec
from ml.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

EXPORT_NAME = "onnx_fp32"
EXPORT_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript")


def export_uncompressed(spec: SolutionSpec, torch_ref: BundleRef, store: ArtifactStore, work_dir: Path) -> Variant:
    """Export the trained model to ONNX Runtime in fp32: the variant that every compressed one is compared with, or made from.

    Raises:
        StorageError: the bundle could not be read or written; any other failure is told by `Variant.failure`.
    """
    torch_bundle = store.get_folder(torch_ref, _bundle_dir(work_dir, torch_ref))
    source = read_bundle(torch_bundle)

    def export(output_dir: Path) -> None:
        exported = spec.export_onnx(torch_bundle, output_dir)
        _check_answers(source, exported, spec, output_dir)
        provenance = {
            **exported.provenance,
            **_provenance(EXPORT_METHOD, {}, EXPORT_LIBRARIES, torch_ref, weights_bytes(exported, output_dir)),
        }
        write_bundle(output_dir, exported.model_copy(update={"provenance": provenance}))

    return _make_variant(EXPORT_NAME, EXPORT_METHOD, {}, export, store, work_dir)


def compress(
    config: dict,
    spec: SolutionSpec,
    torch_ref: BundleRef,
    onnx_ref: BundleRef,
    calibration_requests: Sequence[dict],
    store: ArtifactStore,
    work_dir: Path,
    seed: int,
) -> Variant:
    """Make one variant with one method, and check that it loads and gives finite answers.

    Args:
        config: one item of `RunConfig.compression`.
        torch_ref, onnx_ref: the trained model, and its export; only the one that the method starts from is fetched.
        calibration_requests: training rows as requests; only read by a method that requires calibration.
        work_dir: for bundles and scratch files; fetched bundles stay in it.

    Raises:
        ConfigError: there is no such method, or a setting is wrong.
        StorageError: a bundle could not be read or written; any other failure is told by `Variant.failure`.
    """
    method, settings = _read_config(config)
    source_ref = torch_ref if method.starts_from == "torch" else onnx_ref
    source = read_bundle(store.get_folder(source_ref, _bundle_dir(work_dir, source_ref)))
    parameters = settings.model_dump(mode="json", exclude={"method", "name"})

    def run_method(output_dir: Path) -> None:
        with tempfile.TemporaryDirectory(dir=work_dir, prefix="scratch-") as scratch_dir:
            context = CompressionContext(
                spec=spec,
                torch_bundle=_bundle_dir(work_dir, torch_ref),
                onnx_bundle=_bundle_dir(work_dir, onnx_ref),
                calibration_requests=calibration_requests if method.requires_calibration else (),
                output_dir=output_dir,
                scratch_dir=Path(scratch_dir),
                seed=seed,
            )
            made = method.compress(settings, context)
        _check_answers(source, made, spec, output_dir)
        provenance = {
            **_provenance(method.name, parameters, method.libraries, source_ref, weights_bytes(made, output_dir)),
            "method_version": method.version,
            "seed": seed,
            "result": made.provenance,
            "source": source.provenance,
        }
        write_bundle(output_dir, made.model_copy(update={"provenance": provenance}))

    return _make_variant(settings.name or method.name, method.name, parameters, run_method, store, work_dir)


def compression_key_parts(config: dict) -> dict:
    """What of a method decides its result, for a stage key; its `libraries` belong to the stage.

    Raises:
        ConfigError: there is no such method, or a setting is wrong.
    """
    method, settings = _read_config(config)
    parts = {"config": settings.model_dump(mode="json"), "method_version": method.version}
    if method.depends_on_cpu:
        parts["int8_products_saturate"] = int8_products_saturate()
    return parts


def _read_config(config: dict) -> tuple[CompressionMethod, MethodConfig]:
    (resolved,) = validate_methods([config])
    method = methods()[resolved["method"]]
    return method, validate(method.config, resolved, "compression")


def _bundle_dir(work_dir: Path, ref: BundleRef) -> Path:
    return work_dir / f"bundle-{ref.digest[:16]}"


def _make_variant(name: str, method: str, parameters: dict, write: Callable[[Path], None], store: ArtifactStore, work_dir: Path) -> Variant:
    """Write a bundle into a folder of its own and store it, or tell why that did not work."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=work_dir, prefix=f"{name}-") as folder:
        try:
            write(Path(folder))
        except StorageError:
            raise
        except Exception as error:
            logger.exception("variant %s: %s failed; the run goes on without it", name, method)
            return Variant(name=name, method=method, parameters=parameters, seconds=time.monotonic() - started, failure=_in_words(error))
        seconds = time.monotonic() - started
        logger.info("variant %s: made by %s in %.1f s", name, method, seconds)
        return Variant(name=name, method=method, parameters=parameters, bundle=store.put_folder(Path(folder)), seconds=seconds)


def _check_answers(source: Bundle, made: Bundle, spec: SolutionSpec, folder: Path) -> None:
    """Refuse a variant that speaks another language than its source, does not load, or answers with NaN or infinity.

    How close its answers are is for the evaluation to judge.
    """
    for field in ("solution", "options", "input_schema", "output_schema"):
        if getattr(made, field) != getattr(source, field):
            raise CompressionError(f"the result differs from its source in {field!r}; a method may change weights, not what callers see")
    if made.graphs.keys() != source.graphs.keys():
        raise CompressionError(f"the result has the graphs {sorted(made.graphs)}, its source {sorted(source.graphs)}")
    inputs = spec.load_codec(made, folder).encode(spec.sample_requests)
    for graph_name in made.graphs:
        for output, values in load_graph(made, folder, graph_name, 1)(inputs).items():
            if not np.isfinite(values).all():
                num_bad = int((~np.isfinite(values)).sum())
                raise CompressionError(
                    f"graph {graph_name!r}: {num_bad} of {values.size} values of {output!r} are not finite for the sample requests; "
                    "try other settings of the method, or leave it out"
                )


def _provenance(method: str, parameters: dict, libraries: Sequence[str], source_ref: BundleRef, num_bytes: int) -> dict:
    return {
        "method": method,
        "parameters": parameters,
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
        "source_bundle": source_ref.digest,
        "weights_bytes": num_bytes,
    }


def _in_words(error: Exception) -> str:
    """An error as one line: our own errors speak for themselves, others get the name of their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CompressionError) else f"{type(error).__name__}: {text}"
