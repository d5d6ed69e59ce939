"""Diagnoses of made-up figures with noise. Those of real trainings: test_diagnosis_of_trainings.py."""

import re

import numpy as np
import pytest

from ml.training.diagnosis import diagnose, recent_lines
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
)
from tests.ml.training.metric_lines import healthy_ranks, learning_curve, loss_lines, meter_lines, validation_lines

SEEDS = range(20)


def names(history: list, metrics: dict) -> list[str]:
    return [finding.name for finding in diagnose(history, metrics)]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_wrong_with_a_healthy_training(seed: int):
    random = np.random.default_rng(seed)
    num_steps = int(random.integers(30, 2000))
    losses = learning_curve(random, num_steps, end=random.uniform(0.01, 1.5), pace=random.uniform(3, 30), noise=random.uniform(0.02, 0.5))
    history = loss_lines(losses)
    every = max(num_steps // 6, 1)
    history += validation_lines([float(0.5 + np.exp(-i) + 0.01 * random.standard_normal()) for i in range(6)], every=every)
    assert diagnose(history, healthy_ranks(random, int(random.integers(1, 9)))) == []
    # And at no moment on the way there.
    for end in range(1, len(losses), max(len(losses) // 25, 1)):
        assert diagnose(loss_lines(losses[:end], num_steps=num_steps), {}) == []


def test_nothing_is_known_at_the_start():
    assert diagnose([], {}) == []
    assert diagnose([{"kind": "event", "message": "plan"}], {0: []}) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_straggler_is_not_taken_for_a_slow_network(seed: int):
    random = np.random.default_rng(seed)
    metrics = healthy_ranks(random, 3)
    slow = {"forward_seconds": 0.060, "backward_seconds": 0.125, "communication_share": 0.01}
    metrics[1] = meter_lines(random, 1, num_ranks=3, **slow)
    for rank in (0, 2):
        metrics[rank] = meter_lines(random, rank, num_ranks=3, communication_share=0.5)
    (found,) = diagnose([], metrics)
    assert found.name == STRAGGLER
    assert re.search(r"rank 1 needs (1\.9|2\.0|2\.1) times as long per token", found.sentence)
    assert "wait 50 % of each step" in found.sentence


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_network_is_not_taken_for_a_straggler(seed: int):
    random = np.random.default_rng(seed)
    metrics = {rank: meter_lines(random, rank, communication_share=lambda i: random.uniform(0.4, 0.6)) for rank in range(2)}
    assert names([], metrics) == [COMMUNICATION_BOUND]


def test_a_slow_rank_with_fewer_rows_holds_up_nobody():
    random = np.random.default_rng(0)
    metrics = {0: meter_lines(random, 0, tokens_per_step=1330.0), 1: meter_lines(random, 1, tokens_per_step=665.0)}
    assert STRAGGLER not in names([], metrics)


def test_where_communication_is_unknown_nothing_is_said_of_it():
    random = np.random.default_rng(0)
    metrics = {rank: meter_lines(random, rank, communication_share=None) for rank in range(2)}
    assert diagnose([], metrics) == []


def test_one_rank_that_waits_for_data_is_named():
    random = np.random.default_rng(0)
    metrics = healthy_ranks(random)
    metrics[1] = meter_lines(random, 1, data_wait_share=0.4, data_seconds=0.07)
    (found,) = diagnose([], metrics)
    assert found.name == INPUT_BOUND
    assert found.sentence == "rank 1 waits for data 40 % of each step (70 ms)"


def test_one_slow_interval_is_no_finding():
    random = np.random.default_rng(0)
    metrics = healthy_ranks(random)
    metrics[1] = meter_lines(random, 1, data_wait_share=lambda i: 0.9 if i == 23 else 0.02)
    assert diagnose([], metrics) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda", "gpu_percent": 22.0}, "the GPU of rank 0 works only 22 % of the time"),
        ({"cpu_percent": 150.0, "num_threads": 8}, "rank 0 uses 150 % of a core with 8 threads"),
        ({"node_cpu_percent": 13.0, "num_cores": 16}, "the 16 cores of the machine of rank 0 are used only to 13 %"),
    ],
)
def test_an_under_used_device(changes: dict, words: str):
    random = np.random.default_rng(0)
    (found,) = diagnose([], {0: meter_lines(random, 0, num_ranks=1, communication_share=0.0, **changes)})
    assert (found.name, found.sentence) == (UNDER_USED, words)
    assert "train.num_ranks" in found.advice if "cores" in words else "batch" in found.advice


def test_a_device_that_waits_for_data_is_not_blamed_on_the_batch():
    random = np.random.default_rng(0)
    metrics = {0: meter_lines(random, 0, num_ranks=1, device="cuda", gpu_percent=20.0, data_wait_share=0.7)}
    assert names([], metrics) == [INPUT_BOUND]


def test_uneven_shares_are_named_as_the_cause_of_an_idle_gpu():
    random = np.random.default_rng(0)
    metrics = {
        rank: meter_lines(random, rank, device="cuda", gpu_percent=40.0 + 50.0 * rank, tokens_per_step=500.0 * (rank + 1))
        for rank in range(2)
    }
    (found,) = diagnose([], metrics)
    assert found.name == UNDER_USED
    assert "uneven" in found.advice


@pytest.mark.parametrize(
    "changes",
    [
        {"node_memory_share": 0.95},
        {"device": "cuda", "gpu_percent": 99.0, "gpu_memory_peak_bytes": 76e9, "gpu_memory_total_bytes": 80e9},
        {"node_memory_share": lambda i: 0.5 + 0.01 * i},
    ],
    ids=["machine", "GPU", "growing"],
)
def test_memory_near_the_limit(changes: dict):
    assert names([], {0: meter_lines(np.random.default_rng(0), 0, num_ranks=1, communication_share=0.0, **changes)}) == [MEMORY]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_that_rises_after_it_fell(seed: int):
    random = np.random.default_rng(seed)
    falling = learning_curve(random, 200)
    rising = np.concatenate([falling, np.linspace(0.5, 1.5, 200) * np.exp(0.2 * random.standard_normal(200))])
    (found,) = diagnose(loss_lines(rising), {})
    assert found.name == LOSS_RISING
    assert found.severity == "error"


def test_a_spike_that_is_over_is_no_finding():
    random = np.random.default_rng(0)
    losses = learning_curve(random, 400)
    losses[200:215] *= 8
    assert diagnose(loss_lines(losses), {}) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_that_never_falls(seed: int):
    random = np.random.default_rng(seed)
    assert names(loss_lines(0.693 + 0.02 * random.standard_normal(300)), {}) == [PLATEAU]


def test_a_training_that_has_converged_or_is_warming_up_is_not_stuck():
    random = np.random.default_rng(0)
    converged = learning_curve(random, 3000, pace=300.0, noise=0.05)
    assert diagnose(loss_lines(converged), {}) == []
    assert diagnose(loss_lines(10.8 + 0.05 * random.standard_normal(150), num_steps=10_000), {}) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_overfitting(seed: int):
    random = np.random.default_rng(seed)
    losses = learning_curve(random, 600, end=0.02, pace=5.0)
    history = loss_lines(losses) + validation_lines([0.7, 0.5, 0.45, 0.5, 0.56, 0.63], every=100)
    (found,) = diagnose(history, {})
    assert found.name == OVERFITTING
    assert "lowest at step 300 (0.45)" in found.sentence


def test_a_validation_that_wavers_is_no_overfitting():
    random = np.random.default_rng(0)
    history = loss_lines(learning_curve(random, 600)) + validation_lines([0.7, 0.5, 0.45, 0.48, 0.46, 0.455], every=100)
    assert diagnose(history, {}) == []


def test_losses_that_are_not_finite_are_counted_in_history_and_meters():
    random = np.random.default_rng(0)
    losses = learning_curve(random, 300)
    losses[[10, 20, 30, 40]] = np.nan
    (found,) = diagnose(loss_lines(losses), {})
    assert (found.name, found.severity) == (NOT_FINITE, "error")
    assert "in 4 of 300 steps" in found.sentence
    assert "11, 21, 31, 41" in found.sentence
    metrics = {0: meter_lines(random, 0, num_ranks=1, communication_share=0.0, num_not_finite=lambda i: int(i == 5))}
    (found,) = diagnose([], metrics)
    assert (found.name, found.severity) == (NOT_FINITE, "warning")


def test_only_the_ranks_there_are_now_count():
    random = np.random.default_rng(0)
    before = healthy_ranks(random, 2)
    for lines in before.values():
        for line in lines:
            line["time"] -= 60.0
    metrics = {0: before[0] + meter_lines(random, 0, num_ranks=1, communication_share=0.0), 1: before[1]}
    recent = recent_lines(metrics)
    assert list(recent) == [0]
    assert {line["num_ranks"] for line in recent[0]} == {1}
