import json
from pathlib import Path

import psutil
import pytest
import torch

from ml.training.flops import Calibration
from ml.training.meters import RankMeters, metrics_file, read_metrics
from ml.training.stepping import StepResult

CPU = torch.device("cpu")


def step_result(
    *, data: float = 0.01, forward: float = 0.02, backward: float = 0.06, update: float = 0.01, finite: bool = True
) -> StepResult:
    return StepResult(
        loss=1.0,
        gradient_norm=1.0,
        finite=finite,
        asked_to_stop=False,
        num_rows=8,
        num_tokens=100,
        data_seconds=data,
        forward_seconds=forward,
        backward_seconds=backward,
        update_seconds=update,
    )


def metered(folder: Path, results: list[StepResult], *, rank: int = 0, **settings) -> list[dict]:
    meters = RankMeters(metrics_file(folder, rank), rank, CPU, **({"num_uncounted_steps": 0} | settings))
    for step, result in enumerate(results, start=1):
        meters.step(step, result)
    meters.close()
    return read_metrics(folder).get(rank, [])


def test_a_line_adds_up_its_steps(tmp_path: Path):
    calibration = Calibration(flops_per_token=1e6, backward_per_forward=2.0)
    (line,) = metered(tmp_path, [step_result()] * 10, num_ranks=2, calibration=calibration, peak_flops=1e10, num_threads=3)
    expected = {
        "rank": 0, "num_ranks": 2, "step": 10, "num_steps": 10, "step_seconds": 0.1, "data_wait_share": 0.1,
        "communication_share": 0.2, "rows_per_second": 80.0, "tokens_per_second": 1000.0, "tokens_per_step": 100.0,
        "mfu": 0.1, "num_not_finite": 0, "num_threads": 3, "device": "cpu",
    }  # fmt: skip
    assert {name: line[name] for name in expected} == pytest.approx(expected)


def test_the_machine_is_seen_as_psutil_sees_it(tmp_path: Path):
    (line,) = metered(tmp_path, [step_result()])
    assert line["rss_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert 0 < line["pss_bytes"] <= line["rss_bytes"] * 1.05
    assert 0 < line["node_memory_share"] < 1
    assert line["gpu_percent"] is None
    assert line["gpu_memory_bytes"] is None


def test_what_is_not_known_is_null(tmp_path: Path):
    (line,) = metered(tmp_path, [step_result()], num_ranks=2)
    assert line["mfu"] is None
    assert line["communication_share"] is None
    (line,) = metered(tmp_path, [step_result()], rank=1, num_ranks=2, calibration=Calibration(1e6), peak_flops=1e10)
    assert line["mfu"] is not None
    assert line["communication_share"] is None


def test_a_single_rank_communicates_with_nobody(tmp_path: Path):
    (line,) = metered(tmp_path, [step_result(backward=1.0)], calibration=Calibration(1e6, 2.0))
    assert line["communication_share"] == 0


def test_the_first_steps_of_a_process_do_not_count(tmp_path: Path):
    (line,) = metered(tmp_path, [step_result(forward=9.0), step_result(forward=9.0), step_result()], num_uncounted_steps=2)
    assert line["num_steps"] == 1
    assert line["forward_seconds"] == 0.02


def test_steps_that_are_not_finite_are_counted(tmp_path: Path):
    (line,) = metered(tmp_path, [step_result(finite=i != 3) for i in range(6)])
    assert line["num_not_finite"] == 1


def test_lines_are_appended_and_a_cut_off_one_is_left_out(tmp_path: Path):
    metered(tmp_path, [step_result()] * 2)
    lines = metered(tmp_path, [step_result()] * 3)
    assert [line["num_steps"] for line in lines] == [2, 3]
    with metrics_file(tmp_path, 0).open("a") as file:
        file.write('{"time": 1, "ra')
    assert read_metrics(tmp_path)[0] == lines


def test_of_a_long_file_the_end_is_read(tmp_path: Path):
    with metrics_file(tmp_path, 3).open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"rank": 3, "number": number}) + "\n")
    lines = read_metrics(tmp_path)[3]
    assert lines[-1]["number"] == 19_999
    assert 1000 < len(lines) < 20_000
    assert [line["number"] for line in lines] == list(range(20_000 - len(lines), 20_000))


def test_no_folder_no_metrics(tmp_path: Path):
    assert read_metrics(tmp_path / "none") == {}
