"""Gradients that travel in different ways between two real ranks, against one process that has no one to talk to."""

from pathlib import Path

import pytest

from ml.errors import ConfigError
from ml.training.gradient_sync import GradientBytes, check_gradient_sync, ddp_options, gradient_bytes, resume_note
from ml.training.spec import GradientSync
from tests.ml.training.gradient_sync_ranks import ROWS, Found, build_network, train_alone, train_in_ranks

LOSSLESS = {
    "default": GradientSync(),
    "small buckets": GradientSync(bucket_mb=0.1),
    "middle buckets": GradientSync(bucket_mb=1.0),
    "large bucket": GradientSync(bucket_mb=100.0),
    "no overlap": GradientSync(overlap=False),
    "no views": GradientSync(bucket_mb=1.0, bucket_views=False),
    "static graph": GradientSync(bucket_mb=1.0, static_graph=True),
}
ACCUMULATED = {f"{steps} passes": GradientSync(bucket_mb=1.0, accumulation_steps=steps) for steps in (2, 4)}
HOOKS = {
    "fp16": GradientSync(bucket_mb=1.0, hook="fp16"),
    "fp16, no overlap": GradientSync(overlap=False, hook="fp16"),
    "fp16, 2 passes": GradientSync(bucket_mb=1.0, hook="fp16", accumulation_steps=2),
    # The gradient of a matrix is a sum over the rows of the batch: these factors lose nothing.
    "powersgd, all": GradientSync(bucket_mb=1.0, hook="powersgd", powersgd_rank=ROWS),
    "powersgd, 1": GradientSync(bucket_mb=1.0, hook="powersgd", powersgd_rank=1),
    "powersgd, poisoned": GradientSync(bucket_mb=1.0, hook="powersgd", powersgd_rank=ROWS),
}


@pytest.fixture(scope="module")
def alone() -> list[float]:
    return train_alone()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("gradient-sync")
    return train_in_ranks(folder, LOSSLESS | ACCUMULATED | HOOKS, poisoned=("powersgd, poisoned",))


def difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of any step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def bytes_of(sync: GradientSync, num_ranks: int = 2) -> GradientBytes:
    return gradient_bytes([tuple(parameter.shape) for parameter in build_network().parameters()], 4, sync, num_ranks)


@pytest.mark.parametrize("name", LOSSLESS)
def test_buckets_views_overlap_and_graph_change_nothing(name: str, found: dict[str, Found], alone: list[float]) -> None:
    # To the bit: with two ranks there is but one order of adding two numbers.
    assert found[name].losses == found["default"].losses
    assert difference(found[name].losses, alone) <= 1e-6


@pytest.mark.parametrize("name", ACCUMULATED)
def test_passes_without_communication_add_up_to_one(name: str, found: dict[str, Found]) -> None:
    assert difference(found[name].losses, found["default"].losses) <= 1e-6


@pytest.mark.parametrize("name", ["fp16", "fp16, no overlap", "fp16, 2 passes"])
def test_fp16_rounds_each_value_to_11_bits(name: str, found: dict[str, Found], alone: list[float]) -> None:
    # 2^-11 of each value of the gradient, so far less than 1e-3 of a loss that a few steps have changed.
    assert 0 < difference(found[name].losses, alone) <= 1e-3


def test_powersgd_with_as_many_factors_as_rows_loses_nothing_but_rounding(found: dict[str, Found], alone: list[float]) -> None:
    losses = found["powersgd, all"].losses
    assert losses != found["default"].losses
    # Rounding of what each rank is ahead of the others by, which is kept and adds up; the mean of it is nothing.
    assert difference(losses, alone) <= 1e-3


def test_powersgd_with_one_factor_is_exact_at_first_then_not_and_still_learns(found: dict[str, Found], alone: list[float]) -> None:
    losses = found["powersgd, 1"].losses
    # The loss of step 11 is before its own gradient.
    assert difference(losses[:11], alone[:11]) <= 1e-6
    assert difference(losses, alone) > 1e-4
    assert losses[-1] < 0.9 * losses[10]
    # What is left over is added to the next step, so it stays near the exact training.
    assert difference(losses, alone) < 0.1


def test_powersgd_forgets_a_poisoned_gradient(found: dict[str, Found], alone: list[float]) -> None:
    losses = found["powersgd, poisoned"].losses
    # Step 14 changed no weight, so its rows came again two steps late; nothing else is wrong.
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[14]
    assert difference(losses[:15], alone[:15]) <= 1e-3


@pytest.mark.parametrize("name", HOOKS)
def test_bytes_are_those_that_the_hook_hands_over(name: str, found: dict[str, Found]) -> None:
    assert found[name].handed_over == bytes_of(HOOKS[name]).handed_over


def test_accumulated_passes_hand_over_no_more(found: dict[str, Found]) -> None:
    assert found["fp16, 2 passes"].handed_over == found["fp16"].handed_over
    assert found["fp16, 2 passes"].num_calls == found["fp16"].num_calls > found["fp16, no overlap"].num_calls == 1


def test_bytes_of_a_ring() -> None:
    whole = sum(parameter.numel() for parameter in build_network().parameters()) * 4
    assert bytes_of(GradientSync()) == GradientBytes(whole, whole, whole)
    assert bytes_of(GradientSync(), num_ranks=1).sent == 0
    assert bytes_of(GradientSync(hook="fp16"), num_ranks=4).sent == 1.5 * whole / 2
    # Three matrices of 384 x 384 as two thin ones of 384 x 4, four vectors and a matrix of 5 x 384, which saves less than half.
    assert bytes_of(GradientSync(hook="powersgd", powersgd_rank=4)).handed_over == 4 * (3 * 2 * 384 * 4 + 3 * 384 + 5 + 5 * 384)


def test_options_of_ddp() -> None:
    assert ddp_options(GradientSync()) == {"bucket_cap_mb": None, "gradient_as_bucket_view": True, "static_graph": False}
    assert ddp_options(GradientSync(bucket_mb=5, bucket_views=False, static_graph=True)) == {
        "bucket_cap_mb": 5,
        "gradient_as_bucket_view": False,
        "static_graph": True,
    }


@pytest.mark.parametrize(
    ("sync", "backend", "strategy", "message"),
    [
        (GradientSync(hook="bf16"), "gloo", "ddp", "needs the backend nccl.*fp16 works"),
        (GradientSync(hook="fp16"), "nccl", "fsdp", "strategy fsdp does not have; set hook none, or the strategy ddp"),
        (GradientSync(hook="powersgd"), "gloo", "tensor", "set hook none"),
        (GradientSync(static_graph=True), "gloo", "fsdp", "set it to false"),
        (GradientSync(static_graph=True, accumulation_steps=2), "gloo", "ddp", "that one must communicate; set static_graph to false"),
        (GradientSync(bucket_mb=0), "gloo", "ddp", "bucket_mb is 0"),
        (GradientSync(accumulation_steps=0), "gloo", "ddp", "accumulation_steps is 0"),
        (GradientSync(hook="powersgd", powersgd_rank=0), "gloo", "ddp", "powersgd_rank is 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_that_does(sync: GradientSync, backend: str, strategy, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_gradient_sync(sync, backend, strategy)


def test_a_static_graph_is_refused_where_the_model_says_it_changes() -> None:
    check_gradient_sync(GradientSync(static_graph=True), "gloo", "ddp")
    with pytest.raises(ConfigError, match="find_unused_parameters"):
        check_gradient_sync(GradientSync(static_graph=True), "gloo", "ddp", find_unused_parameters=True)


def test_what_works_is_let_through() -> None:
    check_gradient_sync(GradientSync(hook="bf16"), "nccl", "ddp")
    check_gradient_sync(GradientSync(hook="fp16", accumulation_steps=4), "gloo", "ddp")
    check_gradient_sync(GradientSync(), "gloo", "pipeline")


def test_only_powersgd_has_something_to_lose_in_a_restart() -> None:
    assert resume_note(GradientSync(hook="fp16")) is None
    assert "starts anew" in (resume_note(GradientSync(hook="powersgd")) or "")


@pytest.mark.soak
def test_powersgd_never_mixes_up_its_buckets(tmp_path: Path) -> None:
    """On gloo its later calls of all-reduce come from threads; unless they wait for each other, two ranks can differ in their order."""
    many = {str(number): GradientSync(bucket_mb=0.1, hook="powersgd", powersgd_rank=1 + number % 8) for number in range(100)}
    found = train_in_ranks(tmp_path, many)
    assert all(loss == loss for training in found.values() for loss in training.losses)
    assert found["0"].losses == found["8"].losses == found["96"].losses
