"""Clean-up and rollback as real flows: real Prefect server, real object store, a real predictor."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ml.registry import Registry
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from services.object_store import ObjectStoreEndpoint
from services.prefect_server import prefect_home, start_prefect_server, stop_prefect_server
from tests.ml.stored_runs import all_keys, run_id_of, simulate_run
from tests.services.predictor.serving import Served, wait_until
from tests.store_checker import find_problems

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prefect_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("prefect")
    yield folder
    stop_prefect_server(folder)


@dataclass
class Flows:
    """Runs flows in processes of their own, as a worker does."""

    environment: dict[str, str]
    api: httpx.Client

    def run(self, module: str, flow: str, request: dict, **environment: str) -> subprocess.CompletedProcess[str]:
        code = f"import json, sys; from {module} import {flow}; {flow}(request=json.loads(sys.argv[1]))"
        command = [sys.executable, "-c", code, json.dumps(request)]
        return subprocess.run(command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=200, check=False)

    def artifact(self, key: str) -> str:
        return self.api.get(f"/artifacts/{key}/latest").json()["data"]

    def last_state(self) -> tuple[str, str]:
        [run] = self.api.post("/flow_runs/filter", json={"sort": "START_TIME_DESC", "limit": 1}).json()
        return run["state"]["type"], run["state"]["message"] or ""


@pytest.fixture
def flows(
    prefect_folder: Path, s3_artifact_store: ArtifactStore, object_store_endpoint: ObjectStoreEndpoint, tmp_path: Path
) -> Iterator[Flows]:
    api_url = start_prefect_server(prefect_folder)
    environment = {
        **os.environ,
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": str(prefect_home(prefect_folder)),
        "MILLSTREAM_STATE_DIR": str(tmp_path / "state"),
        "MILLSTREAM_S3_ENDPOINT": object_store_endpoint.endpoint,
        "MILLSTREAM_S3_ACCESS_KEY": object_store_endpoint.access_key,
        "MILLSTREAM_S3_SECRET_KEY": object_store_endpoint.secret_key,
        "MILLSTREAM_BUCKET_PREFIX": s3_artifact_store.runs_bucket.removesuffix("runs"),
    }
    with httpx.Client(base_url=api_url, trust_env=False, timeout=30) as api:
        yield Flows(environment, api)


def test_a_clean_up_tells_and_then_deletes(flows: Flows, s3_artifact_store: ArtifactStore):
    store = s3_artifact_store
    for number in range(3):
        simulate_run(store, number, "reviews", [number])
    store.objects.put(store.monitoring_bucket, keys.prediction_log("reviews", "2026-01-01", "00", "a"), b"{}")
    log = Path(flows.environment["MILLSTREAM_STATE_DIR"]) / "logs" / "worker.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"a line\n" * 1000)
    before = all_keys(store)

    told = flows.run("flows.clean_up", "clean_up", {})
    assert told.returncode == 0, told.stderr
    assert all_keys(store) == before
    assert "Would be deleted (dry run)" in flows.artifact("clean-up")

    request = {"dry_run": False, "keep_runs": 1, "keep_run_days": 0, "grace_hours": 0, "monitoring_days": 0, "log_megabytes": 0.001}
    done = flows.run("flows.clean_up", "clean_up", request)
    assert done.returncode == 0, done.stderr
    assert flows.last_state()[0] == "COMPLETED"
    page = flows.artifact("clean-up")
    assert page.startswith("## Deleted: ")
    assert all(f"| {kind} | " in page for kind in ("run", "stage record", "artifact", "prediction log", "log"))
    assert {key.split("/")[1] for key in all_keys(store) if key.startswith("runs/")} == {run_id_of(2)}
    assert log.stat().st_size <= 1000
    assert find_problems(store.objects, store.runs_bucket.removesuffix("runs")) == []
    names = {task["name"].rpartition("-")[0] for task in flows.api.post("/task_runs/filter", json={}).json()}
    assert names == {"clean_store", "clean_monitoring", "clean_local_state", "publish_clean_up"}


def test_a_rollback_serves_the_previous_champion(flows: Flows, s3_artifact_store: ArtifactStore, tmp_path: Path):
    with Served(s3_artifact_store, tmp_path / "predictor") as served:
        registry = Registry(s3_artifact_store)
        versions = [served.add_version(name="reviews", seed=seed) for seed in (1, 2)]
        registry.promote("reviews", versions[0], "test", "first")

        refused = flows.run("flows.rollback", "rollback", {"name": "reviews"}, MILLSTREAM_PREDICTOR_URL=served.url)
        assert refused.returncode != 0
        state, message = flows.last_state()
        assert state == "FAILED" and "reviews has no previous version to go back to" in message
        assert registry.read_aliases("reviews").generation == 1

        registry.promote("reviews", versions[1], "test", "second")
        wait_until(lambda: served.client.get("/v1/reviews").json().get("version") == versions[1])
        done = flows.run("flows.rollback", "rollback", {"name": "reviews", "why": "it answers worse"}, MILLSTREAM_PREDICTOR_URL=served.url)
        assert done.returncode == 0, done.stderr
        assert served.client.get("/v1/reviews").json()["version"] == versions[0]
        aliases = registry.read_aliases("reviews")
        assert (aliases.champion, aliases.previous, aliases.why) == (versions[0], versions[1], "it answers worse")
        page = flows.artifact("reviews-rollback")
        assert f"reviews serves {versions[0]}" in page and "it answers worse" in page and "/v1/reviews/predict serves it" in page

    unserved = flows.run("flows.rollback", "rollback", {"name": "reviews"})
    assert unserved.returncode == 0, unserved.stderr
    assert "no predictor is known here" in flows.artifact("reviews-rollback")
    wrong = flows.run("flows.rollback", "rollback", {"name": "No Such Name"})
    assert wrong.returncode != 0 and registry.read_aliases("reviews").generation == 4
