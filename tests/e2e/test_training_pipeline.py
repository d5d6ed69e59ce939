"""The main job end to end: real object store, real Prefect server, real torchrun ranks, real predictor."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import httpx
import jsonschema
import psutil
import pytest

from ml.storage.s3 import S3Store
from services.object_store import start_object_store
from tests.e2e.conftest import Workspace, write_reviews
from tests.store_checker import find_problems

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "outcome.schema.json").read_text())


@pytest.fixture(scope="module")
def first_run(workspace: Workspace) -> subprocess.CompletedProcess[str]:
    write_reviews(workspace.folder / "reviews.csv", 300)
    return workspace.call(*workspace.run_arguments(workspace.folder / "reviews.csv"))


def problems(workspace: Workspace) -> list[str]:
    endpoint = start_object_store(workspace.state_dir)
    return find_problems(S3Store(endpoint.endpoint, endpoint.access_key, endpoint.secret_key), "millstream-")


def parts(workspace: Workspace) -> dict[str, str]:
    """Address of each part, from what the stack itself wrote down."""
    ports = json.loads((workspace.state_dir / "ports.json").read_text())
    return {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}


def test_run_ends_deployed_with_a_table_a_report_and_an_outcome(workspace: Workspace, first_run: subprocess.CompletedProcess[str]) -> None:
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    outcome = workspace.outcome()
    jsonschema.validate(outcome, SCHEMA)
    assert outcome["status"] in ("deployed", "deployed_uncompressed")
    assert outcome["name"] == "reviews"
    assert {row["name"] for row in outcome["models"]} >= {"baseline", "pytorch_fp32", "onnx_fp32", "dynamic_int8", "static_int8"}
    assert all(row["test"]["metrics"] and row["status"] == "ok" for row in outcome["models"])
    assert all(row["timing"] for row in outcome["models"] if row["role"] != "baseline")
    assert "dynamic_int8" in first_run.stdout
    assert "<html" in Path(outcome["addresses"]["report_path"]).read_text(encoding="utf-8")


def test_prefect_saw_the_run_complete(workspace: Workspace, first_run: subprocess.CompletedProcess[str]) -> None:
    api = workspace.outcome()["addresses"]["prefect_ui_url"] + "/api"
    runs = httpx.post(f"{api}/flow_runs/filter", json={}, trust_env=False).json()
    assert [run["state"]["type"] for run in runs if not run["auto_scheduled"]] == ["COMPLETED"]
    tasks = httpx.post(f"{api}/task_runs/filter", json={}, trust_env=False).json()
    assert {task["state"]["type"] for task in tasks} == {"COMPLETED"}
    assert any(task["name"].startswith("train_model") for task in tasks)


def test_served_model_answers_and_refuses_rubbish(workspace: Workspace, first_run: subprocess.CompletedProcess[str]) -> None:
    url = workspace.outcome()["addresses"]["predict_url"]
    reply = httpx.post(url, json={"items": [{"text": "a warm good film"}, {"text": "dull noise"}]}, trust_env=False)
    assert reply.status_code == 200
    assert [set(item["probabilities"]) for item in reply.json()["replies"]] == [{"1", "5"}, {"1", "5"}]
    refused = httpx.post(url, json={"items": [{"txt": "a"}]}, trust_env=False)
    assert refused.status_code == 422
    assert "text" in refused.text


def test_second_run_reuses_everything_and_makes_no_version(workspace: Workspace, first_run: subprocess.CompletedProcess[str]) -> None:
    before = workspace.outcome()
    started = time.monotonic()
    again = workspace.call(*workspace.run_arguments(workspace.folder / "reviews.csv"))
    print(f"second run: {time.monotonic() - started:.1f} s")
    assert again.returncode == 0, again.stdout + again.stderr
    after = workspace.outcome()
    assert after["run_id"] != before["run_id"]
    assert after["status"] == "unchanged"
    assert after["version"] == before["version"]
    assert all(stage["reused"] for stage in after["stages"])
    assert set(after) == set(before)


def test_another_list_of_compression_methods_trains_nothing_anew(workspace: Workspace, first_run: subprocess.CompletedProcess[str]) -> None:
    shorter = workspace.call(*workspace.run_arguments(workspace.folder / "reviews.csv", "compression=[{method: dynamic_int8}]"))
    assert shorter.returncode == 0, shorter.stdout + shorter.stderr
    stages = {stage["stage"]: stage["reused"] for stage in workspace.outcome()["stages"]}
    assert all(reused for stage, reused in stages.items() if not stage.startswith(("measure", "evaluate"))), stages
    assert {"train_model", "train_baseline"} <= set(stages)


def test_nothing_in_the_store_is_half_written(workspace: Workspace, first_run: subprocess.CompletedProcess[str]) -> None:
    assert problems(workspace) == []


def test_lineage_and_predict_speak_of_the_champion(workspace: Workspace, first_run: subprocess.CompletedProcess[str]) -> None:
    outcome = workspace.outcome()
    lineage = workspace.call("lineage", "reviews")
    assert lineage.returncode == 0, lineage.stderr
    assert outcome["version"] in lineage.stdout
    scored = workspace.folder / "scored.csv"
    predicted = workspace.call(
        "predict", "--data", str(workspace.folder / "reviews.csv"), "--out", str(scored), "--name", "reviews", "--text", "review"
    )
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    lines = scored.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 301
    assert "predicted_label" in lines[0]


@pytest.mark.parametrize(
    ("content", "arguments", "told"),
    [
        (b"review,stars\n", [], "no rows"),
        (b"review,stars\nfine film,5\n", [], "1 row"),
        (b"review,stars\n" + b"fine film,5\n" * 40, [], "one class"),
        (b"review,stars\n" + b"caf\xe9 \xff\xfe\xfa,5\n", [], "ENCODING="),
        (b"text,rating\nfine,5\nbad,1\n", [], "TEXT="),
        (b"", [], "empty"),
    ],
    ids=["no rows", "one row", "one class", "not UTF-8", "wrong column", "empty file"],
)
def test_bad_input_is_told_with_its_fix(workspace: Workspace, content: bytes, arguments: list[str], told: str) -> None:
    path = workspace.folder / "bad.csv"
    path.write_bytes(content)
    result = workspace.call(*workspace.run_arguments(path), *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.strip().split("millstream: ")[-1]
    assert told in last
    assert "Traceback" not in last


def test_killed_run_resumes_from_its_checkpoint(workspace: Workspace) -> None:
    """kill -9 of the flow process while ranks train; the same command then goes on where they were."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    data = write_reviews(workspace.folder / "killed.csv", 300, seed=seed)
    arguments = workspace.run_arguments(data, "train.epochs=20", "train.patience=1000")
    process = subprocess.Popen(
        workspace.command(*arguments), env=workspace.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        training = workspace.state_dir / "training"
        deadline = time.monotonic() + 200
        while not list(training.glob("*/checkpoints/step-*")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(random.Random(seed).uniform(0, 3))
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "ml.training" in " ".join(child.cmdline())]
        assert ranks
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=15)
    assert alive == []

    result = workspace.call(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    training_summary = workspace.outcome()["training"]
    assert training_summary["resumed_from_step"] > 0
    assert training_summary["num_recomputed_steps"] <= 5
    assert problems(workspace) == []


def test_down_leaves_no_process(workspace: Workspace) -> None:
    assert workspace.call("down").returncode == 0
    ours = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if str(workspace.state_dir) in " ".join(process.info["cmdline"] or [])
    ]
    assert ours == []
