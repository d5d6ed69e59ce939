"""A bundle: one folder that holds all a server needs to answer, and says so in `bundle.json`.

Compression, gates, registry and predictor know only bundles; what a request means is the solution's affair
(see `ml.solution.Codec`). Weights are safetensors or ONNX, never pickles.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from ml.artifacts import Record
from ml.errors import BundleError
from ml.storage.artifacts import digest_file

BUNDLE_FILE = "bundle.json"
FORMAT_VERSION = 1


class TensorSpec(Record):
    """One input or output of a graph. `shape` names dynamic axes by a string, e.g. ("batch", "length")."""

    name: str
    dtype: Literal["int64", "int32", "float32", "float16", "bool"]
    shape: tuple[int | str, ...]


class GraphSpec(Record):
    """One executable graph: its file in the bundle, and its tensors."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Bundle(Record):
    """`bundle.json`.

    `runtime` "torch" holds safetensors that `SolutionSpec.build_module` fills; "onnxruntime" holds ONNX files.
    `options` are the solution's own (labels, max_length, pooling ...), plain JSON.
    """

    format_version: int = FORMAT_VERSION
    solution: str
    runtime: Literal["torch", "onnxruntime"]
    graphs: dict[str, GraphSpec]
    side_files: tuple[str, ...] = ()
    options: dict = Field(default_factory=dict)
    batch_invariant: bool = Field(
        default=True, description="false: a reply would depend on the other rows of its batch, so rows are run one at a time"
    )
    input_schema: dict = Field(description="JSON Schema of one request item")
    output_schema: dict = Field(description="JSON Schema of one reply item")
    provenance: dict = Field(default_factory=dict, description="method and parameters that made it, library versions")
    digests: dict[str, str] = Field(default_factory=dict, description="file -> sha256, filled by write_bundle")

    @property
    def weights_bytes(self) -> int | None:
        return self.provenance.get("weights_bytes")


def write_bundle(folder: Path, bundle: Bundle) -> Bundle:
    """Digest every file in the folder and write `bundle.json` last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != BUNDLE_FILE)
    bundle = bundle.model_copy(update={"digests": {path.relative_to(folder).as_posix(): digest_file(path) for path in files}})
    needed = {graph.file for graph in bundle.graphs.values()} | set(bundle.side_files)
    if missing := needed - set(bundle.digests):
        raise BundleError(f"{folder}: bundle names files that are not there: {sorted(missing)}")
    text = json.dumps(bundle.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
    (folder / BUNDLE_FILE).write_text(text + "\n", encoding="utf-8")
    return bundle


def read_bundle(folder: Path, *, verify: bool = True) -> Bundle:
    """Read `bundle.json` and check every file against its digest.

    Raises:
        BundleError: no or unreadable `bundle.json`, a later format, a missing or changed file.
    """
    path = folder / BUNDLE_FILE
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it holds no {BUNDLE_FILE}")
    try:
        bundle = Bundle.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    if bundle.format_version != FORMAT_VERSION:
        raise BundleError(f"{path}: bundle format {bundle.format_version}, this version reads {FORMAT_VERSION}; export the model again")
    if verify:
        for name, digest in bundle.digests.items():
            file = folder / name
            if not file.is_file():
                raise BundleError(f"{folder}: {name} is missing; fetch the bundle again")
            if digest_file(file) != digest:
                raise BundleError(f"{folder}: {name} is not the file that was bundled (sha256 differs); fetch the bundle again")
    return bundle


def schema_digest(bundle: Bundle) -> str:
    """Identifies what callers see: two bundles with different digests answer different questions."""
    text = json.dumps([bundle.input_schema, bundle.output_schema], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
