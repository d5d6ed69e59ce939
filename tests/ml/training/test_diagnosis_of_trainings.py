"""Every diagnosis, provoked in a real training; and none in a healthy one."""

from pathlib import Path
from typing import Any

import psutil

from ml.training.diagnosis import diagnose
from ml.training.findings import (
    COMMUNICATION_BOUND,
    INPUT_BOUND,
    LOSS_RISING,
    MEMORY,
    NOT_FINITE,
    OVERFITTING,
    PLATEAU,
    STRAGGLER,
    UNDER_USED,
    Finding,
)
from ml.training.spec import GradientSync, Optimizer, Parallelism, TrainSpec
from tests.ml.training.metered_training import train_metered


def troubled_spec(
    folder: Path,
    *,
    num_ranks: int = 1,
    learning_rate: float = 3e-3,
    trouble: dict[str, Any] | None = None,
    job: dict[str, Any] | None = None,
    epochs: int = 20,
) -> TrainSpec:
    """203 rows in steps of 32, so 7 steps an epoch."""
    return TrainSpec(
        job="tests.ml.training.metered_training:TroubledJob",
        job_arguments={"trouble": trouble or {}, **(job or {})},
        work_dir=folder,
        num_ranks=num_ranks,
        batch_size_per_rank=32 // num_ranks,
        precision="fp32",
        compile="off",
        parallelism=Parallelism(strategy="ddp"),
        gradient_sync=GradientSync(bucket_mb=25.0),
        optimizer=Optimizer(learning_rate=learning_rate),
        epochs=epochs,
        patience=100,
        checkpoint_every_steps=1000,
        load_aware=False,
        prefetch_batches=0,
    )


def diagnosed(*specs: TrainSpec, num_ranks: int = 1) -> list[dict[str, Finding]]:
    found = []
    for history, metrics in train_metered(*specs, num_ranks=num_ranks):
        assert len(metrics) == num_ranks
        found.append({finding.name: finding for finding in diagnose(history, metrics)})
    return found


def diagnosed_here(folder: Path, **settings: Any) -> dict[str, Finding]:
    return diagnosed(troubled_spec(folder, **settings))[0]


def test_nothing_is_wrong(tmp_path: Path):
    # Whether the processor is busy depends on what else this machine does now.
    assert diagnosed_here(tmp_path, job={"forward_seconds": 0.06}, epochs=5).keys() <= {UNDER_USED}


def test_slow_batches(tmp_path: Path):
    found = diagnosed_here(tmp_path, trouble={"batch_seconds": 0.02}, epochs=10)
    assert "for data" in found[INPUT_BOUND].sentence


def test_a_slow_rank_and_a_slow_network_are_told_apart(tmp_path: Path):
    slow_rank = {"slow_rank": 1, "forward_seconds": 0.03}
    straggling, slow_network = diagnosed(
        troubled_spec(tmp_path / "rank", num_ranks=2, trouble=slow_rank, job={"forward_seconds": 0.01}, epochs=5),
        troubled_spec(tmp_path / "network", num_ranks=2, trouble={"network_seconds": 0.05}, epochs=5),
        num_ranks=2,
    )
    assert straggling[STRAGGLER].sentence.startswith("rank 1 needs")
    assert COMMUNICATION_BOUND not in straggling
    assert COMMUNICATION_BOUND in slow_network
    assert STRAGGLER not in slow_network


def test_a_processor_that_mostly_sleeps(tmp_path: Path):
    assert UNDER_USED in diagnosed_here(tmp_path, trouble={"idle_seconds": 0.08}, job={"forward_seconds": 0.0}, epochs=4)


def test_memory_that_runs_out(tmp_path: Path):
    megabyte = 1_000_000
    limit = psutil.Process().memory_info().rss + 400 * megabyte
    found = diagnosed_here(tmp_path, trouble={"hoard_bytes": 4 * megabyte, "memory_limit_bytes": limit}, epochs=15)
    assert "rank 0" in found[MEMORY].sentence


def test_a_learning_rate_that_is_far_too_high(tmp_path: Path):
    ((history, _),) = train_metered(troubled_spec(tmp_path, learning_rate=3.0, job={"forward_seconds": 0.0}))
    # On the way, as the card would have said it; at the end the rate has fallen to nothing and the loss comes down again.
    moments = [diagnose([line for line in history if line.get("step", 0) <= step], {}) for step in range(10, 80, 5)]
    rising = [finding for found in moments for finding in found if finding.name == LOSS_RISING]
    assert rising and {finding.severity for finding in rising} == {"error"}
    assert "at a learning rate of" in rising[0].sentence


def test_labels_that_are_noise(tmp_path: Path):
    found = diagnosed_here(tmp_path, job={"noise": 0.5, "num_rows": 1600, "forward_seconds": 0.0}, learning_rate=1e-4, epochs=4)
    assert "labels may not follow" in found[PLATEAU].advice


def test_a_learning_rate_that_is_far_too_low(tmp_path: Path):
    found = diagnosed_here(tmp_path, learning_rate=1e-8, job={"forward_seconds": 0.0})
    assert "nothing is learned at a learning rate of up to 1e-08" in found[PLATEAU].sentence


def test_noise_that_is_learned_by_heart(tmp_path: Path):
    job = {"noise": 0.4, "num_rows": 100, "width": 64, "forward_seconds": 0.0}
    assert OVERFITTING in diagnosed_here(tmp_path, job=job, learning_rate=1e-2, epochs=40)


def test_a_batch_that_is_not_a_number(tmp_path: Path):
    assert NOT_FINITE in diagnosed_here(tmp_path, trouble={"nan_steps": [40]}, job={"forward_seconds": 0.0})
