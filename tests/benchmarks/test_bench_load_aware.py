"""The benchmark of load-aware shares: the slow rank is slow and nothing else, the verdict follows the pairs, and it runs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bench_load_aware import SlowedJob, main, report

OPTIONS = {"slowdown": 2, "batch": 48, "steps": 8}


def test_the_slow_rank_finds_the_same_gradient(tmp_path: Path) -> None:
    gradients = []
    for times in (1, 2):
        job = SlowedJob(tmp_path, times=times, width=16, num_rows=20)
        model = job.build_model(0)
        job.row_losses(model, job.batch("train", np.arange(4))).loss.mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-7) for name in gradients[0])


@pytest.mark.parametrize(("seconds", "words"), [(0.7, "1.429 times as fast"), (0.9, "MISSED")])
def test_report_gives_the_median_gain_and_the_verdict(seconds: float, words: str) -> None:
    pairs = [{"equal": 1.0, "load_aware": value} for value in (seconds, seconds, 5.0)]
    measured = {"pairs": pairs, "settling": [[0.5, 0.5], [0.5, 0.5], [0.65, 0.35]], "fractions": [0.66, 0.34], "parameters": 1000}
    text = report(measured, OPTIONS, 0.1)
    assert words in text
    assert "changed at steps [3] of the first 3" in text
    assert "it would be 1.50" in text


@pytest.mark.slow
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pairs", "2", "--steps", "3", "--settling", "8", "--width", "32"]) == 0
    assert "| 2 |" in capsys.readouterr().out
