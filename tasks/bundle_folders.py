"""Bundles on local disk for as long as a task needs them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml.artifacts import BundleRef
from ml.settings import load_settings
from ml.storage.artifacts import ArtifactStore


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder under the state folder, removed afterwards."""
    root = load_settings().state_dir / "scratch"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f"{purpose}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def bundle_folders(store: ArtifactStore, bundles: dict[str, BundleRef]) -> Iterator[dict[str, Path]]:
    """Fetch bundles, verified, into a scratch folder: name -> folder."""
    with scratch_folder("bundles") as root:
        yield {name: store.get_folder(ref, root / name) for name, ref in bundles.items()}
