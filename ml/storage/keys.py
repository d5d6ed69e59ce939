"""The layout of the object store. Every key that Millstream reads or writes is built here.

datasets/  <anything users put here>                       read as training data, never written by a run
runs/      artifacts/sha256/<2>/<62>                       every derived byte, once, by digest
           stages/<stage>/<stage_key>.json                 a finished stage, written last
           checkpoints/<stage_key>/step-<n>/<file>         training state; manifest.json written last
           runs/<run_id>/{config,manifest,outcome}.json    what one run asked for and what came of it
           leases/<run_id>.json                            mutable; who uses the bucket right now
registry/  registry/<name>/versions/<utc>-<sha8>.json      immutable
           registry/<name>/aliases.json                    mutable; moved by If-Match
monitoring/  predictions/<name>/<day>/<hour>/<id>.jsonl    what the predictor was asked and answered, sampled
           feedback/<name>/<day>/<id>.jsonl                labels that came later
           checks/<name>/<utc>/<file>                      one drift check: report and figures
           checks/<name>/state.json                        mutable; what the last checks found
"""

import re
from typing import Literal

BucketRole = Literal["datasets", "runs", "registry", "monitoring"]

_SEGMENT = re.compile(r"[A-Za-z0-9._=@+-]+")
_MODEL_VERSION = re.compile(r"registry/(?P<name>[a-z0-9][a-z0-9_-]{0,62})/versions/(?P<version>\d{8}T\d{6}Z-[0-9a-f]{8})\.json")


def check_key(key: str) -> str:
    """Return a key to be written, or raise ValueError when it is not a relative path of plain segments."""
    parts = key.split("/")
    if any(part in (".", "..") or not _SEGMENT.fullmatch(part) for part in parts):
        raise ValueError(f"object key {key!r} is not a relative path of [A-Za-z0-9._=@+-] segments")
    return key


def check_path(key: str) -> str:
    """Return a key to be read, or raise ValueError when it could point outside its bucket.

    People may have put objects there under any name, so this refuses less than `check_key`.
    """
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"object key {key!r} is not a relative path: a segment of it is empty, '.' or '..'")
    return key


def bucket_name(prefix: str, role: BucketRole) -> str:
    return f"{prefix}{role}"


def artifact(sha256: str) -> str:
    return f"artifacts/sha256/{sha256[:2]}/{sha256[2:]}"


def stage_record(stage: str, stage_key: str) -> str:
    return f"stages/{stage}/{stage_key}.json"


def checkpoint_prefix(stage_key: str) -> str:
    return f"checkpoints/{stage_key}/"


def checkpoint_file(stage_key: str, step: int, file_name: str) -> str:
    return f"checkpoints/{stage_key}/step-{step:08d}/{file_name}"


def run_file(run_id: str, file_name: Literal["config.json", "manifest.json", "outcome.json", "report.html"]) -> str:
    return f"runs/{run_id}/{file_name}"


def model_version(name: str, version: str) -> str:
    return f"registry/{name}/versions/{version}.json"


def model_versions_prefix(name: str) -> str:
    return f"registry/{name}/versions/"


def parse_model_version(key: str) -> tuple[str, str] | None:
    """(name, version) of a key built by `model_version`; None for any other key."""
    found = _MODEL_VERSION.fullmatch(key)
    return (found["name"], found["version"]) if found else None


def model_aliases(name: str) -> str:
    return f"registry/{name}/aliases.json"


def models_prefix() -> str:
    return "registry/"


def dataset_prefix(name: str) -> str:
    """Where new data of a model lands, in the datasets bucket."""
    return f"{name}/"


def predictions_prefix(name: str, *day_and_hour: str) -> str:
    """Of all predictions of a model, of a day, or of an hour of a day."""
    return "/".join(("predictions", name, *day_and_hour, ""))


def prediction_log(name: str, day: str, hour: str, part: str) -> str:
    return f"{predictions_prefix(name, day, hour)}{part}.jsonl"


def feedback_prefix(name: str, *day: str) -> str:
    """Of all feedback on a model, or of a day's."""
    return "/".join(("feedback", name, *day, ""))


def feedback_log(name: str, day: str, part: str) -> str:
    return f"{feedback_prefix(name, day)}{part}.jsonl"


def check_file(name: str, utc: str, file_name: str) -> str:
    return f"checks/{name}/{utc}/{file_name}"


def check_state(name: str) -> str:
    return f"checks/{name}/state.json"


CLEAN_UP = "clean-up"
"""The holder of the one lease that is not a run's."""


def lease(holder: str) -> str:
    """Who uses the runs bucket right now: the id of a run, or `CLEAN_UP`."""
    return f"leases/{holder}.json"


def leases_prefix() -> str:
    return "leases/"


_RUNS_KEY = re.compile(
    r"artifacts/sha256/(?P<artifact>[0-9a-f]{2}/[0-9a-f]{62})"
    r"|stages/[^/]+/(?P<stage_record>[^/]+)\.json"
    r"|checkpoints/(?P<checkpoint>[^/]+)/.+"
    r"|runs/(?P<run>[^/]+)/[^/]+"
    r"|leases/(?P<lease>[^/]+)\.json"
)

RunsKind = Literal["artifact", "stage record", "checkpoint", "run", "lease"]


def parse_runs_key(key: str) -> tuple[RunsKind, str] | None:
    """What a key of the runs bucket is, and whose: a digest, stage key, run id or holder; None for a key not built here."""
    found = _RUNS_KEY.fullmatch(key)
    if found is None or found.lastgroup is None:
        return None
    owner = found[found.lastgroup]
    return found.lastgroup.replace("_", " "), owner.replace("/", "")  # type: ignore[return-value]


MonitoringKind = Literal["prediction log", "feedback", "drift check"]
_MONITORING_KINDS: dict[str, MonitoringKind] = {"predictions": "prediction log", "feedback": "feedback", "checks": "drift check"}


def parse_monitoring_key(key: str) -> MonitoringKind | None:
    """What a key of the monitoring bucket is; None for the state of drift checks and for a key not built here."""
    first, _, rest = key.partition("/")
    return None if rest.endswith("/state.json") else _MONITORING_KINDS.get(first)
