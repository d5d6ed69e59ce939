"""The benchmark of orchestration: its plain side is plain, what it compares is what was produced, and it runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_orchestration import Pair, Repetition, differences, report, tiny_request, what_was_produced
from benchmarks.pipeline_process import read_request
from ml.artifacts import ArtifactRef, BundleRef, Decision, Interval, Quality, Variant
from ml.artifacts import Evaluation as Evaluated
from ml.outcome import RunRecords
from services.object_store import ObjectStoreEndpoint

SHA = "a" * 64


def repetition(side: str, body: float, **produced: object) -> Repetition:
    return Repetition(side, 1.0, 2.0, 0.5, body, 0.5, 40, 21, 0.1, produced)  # type: ignore[arg-type]


def records(accuracy: float, bundle: str, chosen: str = "dynamic_int8") -> RunRecords:
    ref = ArtifactRef(uri=f"s3://runs/{SHA}", sha256=SHA, size_bytes=1)
    made = BundleRef(files={"bundle.json": ref.model_copy(update={"sha256": bundle * 64})})
    value = Interval(value=accuracy, low=accuracy, high=accuracy)
    quality = Quality(split="test", num_rows=57, metrics={"accuracy": value}, scores=ref)
    return RunRecords(
        variants=(Variant(name="dynamic_int8", method="dynamic_int8", bundle=made, seconds=accuracy),),
        test=(Evaluated(variant="dynamic_int8", quality=quality),),
        decision=Decision(status="selected", variant=chosen, reasons=()),
    )


def test_differences_name_bundle_metric_and_choice_and_nothing_else() -> None:
    one = what_was_produced(records(0.9, "a"))
    assert differences(one, what_was_produced(records(0.9, "a"))) == []
    found = differences(one, what_was_produced(records(0.8, "b", chosen="static_int8")))
    assert [text.split(":")[0] for text in found] == ["bundle of dynamic_int8", "chosen variant", "metrics of dynamic_int8 on test"]


def test_report_gives_the_median_ratio_and_says_which_pair_was_not_alike() -> None:
    pairs = [
        Pair(repetition("prefect", body, digest=1), repetition("plain", 10.0, digest=2 if body == 12 else 1)) for body in (11, 12, 10.2)
    ]
    text = report(pairs, {}, first_start=20.0, load_before=3.0)
    assert "Body of the pipeline: 1.100 times" in text
    assert "MISSED" in text
    assert "in 2 of 3 pairs" in text
    assert "- pair 2: digest: 1 and 2" in text
    assert "The machine was busy" in text


def test_plain_pipeline_runs_without_prefect(tmp_path: Path, object_store_endpoint: ObjectStoreEndpoint, bucket_prefix: str) -> None:
    """In a process of its own. That of the test has Prefect; the script itself ends with an error should it find it."""
    request = tiny_request(tmp_path / "tiny")
    # Below the baseline there is nothing to deploy, so no predictor is needed here.
    request["overrides"] |= {"select.min_gain_over_baseline_points": 100, "train.epochs": 1, "compression": []}
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    assert read_request(tmp_path / "request.json").data == request["data"]
    environment = {
        **os.environ,
        "MILLSTREAM_STATE_DIR": str(tmp_path / "state"),
        "MILLSTREAM_BUCKET_PREFIX": bucket_prefix,
        "MILLSTREAM_S3_ENDPOINT": object_store_endpoint.endpoint,
        "MILLSTREAM_S3_ACCESS_KEY": object_store_endpoint.access_key,
        "MILLSTREAM_S3_SECRET_KEY": object_store_endpoint.secret_key,
    }
    code = "import sys; from benchmarks import plain_pipeline; plain_pipeline.main(); assert 'prefect' not in sys.modules"
    command = [sys.executable, "-c", code, str(tmp_path / "request.json"), str(tmp_path / "result.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "result.json").read_bytes())["manifest"]
    assert manifest["status"] == "rejected"
    assert [evaluation["variant"] for evaluation in manifest["records"]["test"]] == ["baseline", "pytorch_fp32", "onnx_fp32"]


@pytest.mark.slow
def test_both_sides_of_a_pair_produce_the_same() -> None:
    command = [sys.executable, "-m", "benchmarks.bench_orchestration", "--tiny", "--pairs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 1 of 1 pairs" in done.stdout
    calls = re.search(r"makes (\d+) HTTP calls to the Prefect server and (\d+) task runs", done.stdout)
    assert calls is not None
    assert int(calls[1]) > 10
    assert int(calls[2]) > 10
