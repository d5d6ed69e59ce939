"""What both sides of `bench_orchestration` share: a process that makes one run, and the file that says how it went."""

import json
import time
from pathlib import Path

from ml.config import RunRequest
from ml.storage import keys
from ml.storage.connect import open_artifact_store


def read_request(path: Path) -> RunRequest:
    return RunRequest.model_validate_json(path.read_bytes())


def write_result(path: Path, run_id: str, moments: dict[str, float], **figures: float) -> None:
    """Write when what happened, and what the run says that it produced (its manifest).

    Args:
        moments: readings of time.monotonic(), a clock that all processes of a machine share.
    """
    store = open_artifact_store()
    manifest = json.loads(store.objects.get(store.runs_bucket, keys.run_file(run_id, "manifest.json")))
    path.write_text(json.dumps({"moments": moments, "figures": figures, "manifest": manifest}), encoding="utf-8")


def now() -> float:
    return time.monotonic()
