"""The benchmarks of training: what they say of given times, that they run, and that all sides do the same work."""

import re

import pytest

from benchmarks import bench_gpu_transformer, bench_gradient_sync, bench_training_overhead, bench_training_scaling
from benchmarks.bench_training_overhead import Pair, loss_difference
from benchmarks.encoder import random_texts
from benchmarks.training_sides import Work
from ml.training.spec import GradientSync


def test_overhead_is_the_median_of_the_pairs() -> None:
    work = Work(3, 10, 32, "fp32", {})
    pairs = [Pair(1.01, 1.0), Pair(2.04, 2.0), Pair(1.5, 1.0)]
    text = bench_training_overhead.report(pairs, work, 2, 1e-5, 50, load_before=0.1)
    assert "1.020 times the script's" in text
    assert "MISSED" in text  # the upper end of the interval
    assert "All blocks together, so with every checkpoint in it: 1.137 times" in text
    assert "met" in bench_training_overhead.report([Pair(1.01, 1.0)] * 15, work, 2, 1e-5, 50, load_before=0.1)


def test_losses_are_compared_where_both_sides_have_one() -> None:
    assert loss_difference({1: 1.0, 2: 2.0, 11: 1.1}, {1: 1.0, 11: 1.0}) == pytest.approx(0.1)


def test_scaling_says_when_a_step_was_too_short() -> None:
    one, two, threads = bench_training_scaling.LAYOUTS
    work = Work(2, 4, 64)
    long = bench_training_scaling.report([{one: 4.0, two: 2.0, threads: 2.5}] * 2, work, 1e-7, load_before=0.1)
    assert "2.00 times" in long
    assert "communication weighs too much" not in long
    short = bench_training_scaling.report([{one: 0.4, two: 0.3, threads: 0.3}] * 2, work, 1e-7, load_before=0.1)
    assert "communication weighs too much" in short
    assert "MISSED" in short


def test_batches_hold_every_row_once(tmp_path) -> None:
    import json

    work = Work(2, 3, 8)
    batches = json.loads(work.write_batches(tmp_path / "batches.json").read_bytes())
    assert [len(batch) for batch in batches] == [8] * work.num_steps
    assert sorted(row for batch in batches for row in batch) == list(range(work.num_rows))


def test_texts_are_the_same_on_both_sides() -> None:
    one, other = random_texts(20, 3), random_texts(20, 3)
    assert (one.ids == other.ids).all()
    batch = one.batch(one.lengths.argsort()[-3:])
    assert batch["input_ids"].shape == batch["is_padding"].shape == (3, one.lengths.max())
    assert batch["is_padding"].sum() == 3 * one.lengths.max() - sum(sorted(one.lengths)[-3:])


def test_gpu_benchmark_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench_gpu_transformer.main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
    assert bench_gpu_transformer.main(["--device", "cpu"]) == 2
    assert "add --tiny" in capsys.readouterr().err


def test_gpu_benchmark_runs_on_the_cpu_with_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu_transformer.main(["--tiny", "--device", "cpu", "--no-compile", "--steps", "5"]) == 0
    text = capsys.readouterr().out
    first, last = re.search(r"([\d.]+) to ([\d.]+) \|$", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert float(last) < float(first)  # it trains
    assert "| tiny, as written | 0.0 | 4 x 32 |" in text


def test_sizes_of_the_gpu_benchmark_are_what_their_names_say() -> None:
    from ml.language_model.transformer import num_parameters

    counts = {name: num_parameters(size.config) for name, size in bench_gpu_transformer.SIZES.items()}
    assert 90e6 < counts["100M"] < 130e6
    assert 0.95e9 < counts["1B"] < 1.1e9


@pytest.mark.slow
def test_gpu_benchmark_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu_transformer.main(["--tiny", "--device", "cpu", "--quick"]) == 0
    assert "| tiny, compiled |" in capsys.readouterr().out


@pytest.mark.slow
def test_overhead_benchmark_trains_alike_on_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_training_overhead.main(["--quick", "--pairs", "3", "--precision", "fp32"]) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"differ by at most (\S+) of", text).group(1)) < 1e-3  # type: ignore[union-attr]
    assert len(re.findall(r"^\| \d", text, re.MULTILINE)) == 3


@pytest.mark.slow
def test_scaling_benchmark_trains_alike_in_all_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_training_scaling.main(["--quick"]) == 0
    text = capsys.readouterr().out
    assert float(re.search(r"differ by at most (\S+) of", text).group(1)) < 1e-4  # type: ignore[union-attr]


@pytest.mark.slow
def test_gradient_sync_benchmark_counts_what_travels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {name: bench_gradient_sync.SETTINGS[name] for name in ("25 MiB", "25 MiB, fp16", "25 MiB, PowerSGD 4")}
    monkeypatch.setattr(bench_gradient_sync, "SETTINGS", settings | {"1 MiB": GradientSync(bucket_mb=1)})
    assert bench_gradient_sync.main(["--quick", "--rounds", "1", "--backend", "gloo"]) == 0
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    by_formula = {name: float(value) for name, value, _ in rows}
    assert by_formula["25 MiB, fp16"] == pytest.approx(by_formula["25 MiB"] / 2, abs=0.01)
    for _, formula, counted in rows:
        # Whatever else travels is added; less than the formula would be wrong.
        assert float(counted) >= 0.99 * float(formula)
