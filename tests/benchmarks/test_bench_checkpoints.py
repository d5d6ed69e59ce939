from pathlib import Path

import pytest
import torch

from benchmarks import bench_checkpoints, machine


def test_it_measures_every_way_and_writes_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_here(name: str, text: str) -> Path:
        return machine.write_result(name, text, tmp_path / "results")

    monkeypatch.setattr(bench_checkpoints, "write_result", write_here)
    tiny = ["--mebibytes", "1", "2", "--rounds", "3", "--steps", "1", "--folder", str(tmp_path)]
    num_threads = torch.get_num_threads()
    assert bench_checkpoints.main([*tiny, "--write"]) == 0
    torch.set_num_threads(num_threads)
    (result,) = (tmp_path / "results").iterdir()
    text = result.read_text()
    assert text.count("95 % interval") == 2
    assert text.count("| synchronous |") == text.count("| DCP's writer |") == 2
    assert "## 1 MiB of model and optimizer" in text
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
