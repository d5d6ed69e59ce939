import subprocess
import sys

import pytest

from ml.errors import ConfigError
from ml.training.job import ParallelPlan, Stage
from ml.training.layout import Layout, ModelSizes, check_layout, choose_strategy
from ml.training.spec import GradientSync, Parallelism
from ml.training.strategies.pipeline import stage_of

WHOLE = ParallelPlan(
    blocks=("blocks.0", "blocks.1", "blocks.2"),
    splits={"blocks.*.query": "columns"},
    tensor_sizes={"heads": 12, "inner units": 48},
    make_stage=lambda model, stage: model,
)
NO_TENSOR = ParallelPlan(blocks=("blocks.0", "blocks.1"), no_tensor="its heads share one key", no_pipeline="experts are routed")
MIB = 2**20


def check(strategy, num_ranks: int, plan: ParallelPlan = WHOLE, sync: GradientSync | None = None, **parallelism) -> Layout:
    return check_layout(Parallelism(strategy=strategy, **parallelism), num_ranks, plan, sync)


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "expected"),
    [
        ("ddp", 4, Layout("ddp", replicate=4)),
        ("fsdp", 4, Layout("fsdp", shard=4)),
        ("tensor", 4, Layout("tensor", tensor=4)),
        ("pipeline", 3, Layout("pipeline", pipeline=3)),
        ("ddp+tensor", 6, Layout("ddp+tensor", replicate=3, tensor=2)),
        ("fsdp+tensor", 4, Layout("fsdp+tensor", shard=2, tensor=2)),
        ("ddp+pipeline", 4, Layout("ddp+pipeline", replicate=2, pipeline=2)),
        ("fsdp+tensor", 1, Layout()),
    ],
)
def test_a_supported_strategy_has_a_layout(strategy, num_ranks: int, expected: Layout) -> None:
    layout = check(strategy, num_ranks)
    assert layout == expected
    assert layout.num_ranks == num_ranks


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "plan", "message"),
    [
        ("tensor", 5, WHOLE, r"tensor: 5 ranks do not divide 12 heads \(4 or 6 do\); fsdp works with 5 ranks"),
        ("tensor", 8, WHOLE, r"8 ranks do not divide 12 heads \(6 or 12 do\); fsdp\+tensor works with 8 ranks and tensor_ranks = 2"),
        ("tensor", 2, NO_TENSOR, r"declares no tensor plan \(its heads share one key\); fsdp works with 2 ranks"),
        ("ddp+tensor", 5, WHOLE, r"5 ranks are no multiple of tensor_ranks = 2; fsdp works"),
        ("fsdp+tensor", 2, WHOLE, r"leave only one dimension to split; fsdp works with 2 ranks"),
        ("pipeline", 4, WHOLE, r"4 stages, but the model has 3 blocks; ddp\+pipeline works with 4 ranks and pipeline_ranks = 2"),
        ("pipeline", 2, NO_TENSOR, r"declares no pipeline plan \(experts are routed\); fsdp works"),
        ("fsdp", 2, ParallelPlan(), r"declares no parallel plan, .*; ddp works with 2 ranks"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(strategy, num_ranks: int, plan: ParallelPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(strategy, num_ranks, plan)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 hook works with ddp alone"):
        check("fsdp", 2, sync=GradientSync(hook="fp16"))
    with pytest.raises(ConfigError, match="1f1b schedule needs a microbatch for each of the 3 stages, found 2"):
        check("pipeline", 3, microbatches=2)
    assert check("pipeline", 3, microbatches=2, pipeline_schedule="gpipe").pipeline == 3


def test_every_rank_has_a_place_of_its_own() -> None:
    layout = Layout("ddp", replicate=2, shard=3, tensor=2, pipeline=2)
    places = {tuple(layout.coordinate(rank, name) for name in ("pipeline", "replicate", "shard", "tensor")) for rank in range(24)}
    assert len(places) == 24
    assert [layout.coordinate(rank, "tensor") for rank in (0, 1, 2, 3)] == [0, 1, 0, 1]
    assert [layout.coordinate(rank, "shard") for rank in (1, 3, 5, 7)] == [0, 1, 2, 0]
    assert [layout.coordinate(rank, "pipeline") for rank in (3, 15)] == [0, 1]
    assert [layout.data_rank(rank) for rank in (0, 1, 2, 6, 12)] == [0, 0, 1, 3, 0]
    # Each part of a batch is spoken for once.
    assert sorted(layout.data_rank(rank) for rank in range(24) if layout.counts(rank)) == list(range(6))


def test_stages_hold_every_block_once() -> None:
    stages = [stage_of(index, 3, 8) for index in range(3)]
    assert [list(stage.blocks) for stage in stages] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, False), (False, True)]
    assert Stage(0, 1, range(3)).is_first
    assert Stage(0, 1, range(3)).is_last


def choose(room_mib: float, plan: ParallelPlan = WHOLE, *, num_ranks: int = 4, ranks_per_node: int = 4, **more) -> tuple[str, str]:
    """For 100 MiB of weights, as many of gradients, 200 of optimizer state, 40 of activations and blocks of 30."""
    sizes = ModelSizes(100 * MIB, 100 * MIB, 200 * MIB, 40 * MIB, 30 * MIB)
    chosen, reason = choose_strategy(
        sizes,
        plan,
        Parallelism(),
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        device_bytes=int(room_mib * MIB / 0.85) + 1,
        **more,
    )
    check_layout(chosen, num_ranks, plan)
    return chosen.strategy, reason


def test_auto_splits_no_more_than_it_must() -> None:
    # Copies need 440 MiB; shards 400 / 4 + 90 + 40; slices of shards 400 / 4 + 45 + 20; slices 400 / 4 + 10.
    assert choose(440) == ("ddp", "ddp (4 copies): a rank needs about 440.00 MiB of 440.00 MiB")
    strategy, reason = choose(439)
    assert strategy == "fsdp"
    assert reason.endswith("; ddp (4 copies) would need 440.00 MiB")
    assert choose(200)[0] == "fsdp+tensor"
    assert choose(120)[0] == "tensor"


def test_auto_keeps_slices_within_a_machine() -> None:
    # Three machines of one rank: no slices; stages need 400 / 3 + 40 / 3.
    assert choose(150, num_ranks=3, ranks_per_node=1)[0] == "pipeline"


def test_auto_uses_what_the_model_supports() -> None:
    assert choose(235, NO_TENSOR)[0] == "fsdp"
    with pytest.raises(ConfigError, match=r"does not fit: a rank needs 230\.00 MiB at the least \(fsdp \(4 shards\)\)"):
        choose(200, NO_TENSOR)
    with pytest.raises(ConfigError, match=r"440\.00 MiB at the least \(ddp \(4 copies\)\), a device has room for 300\.00 MiB"):
        choose(300, gradient_sync=GradientSync(hook="fp16"))


def test_the_launcher_can_check_without_torch() -> None:
    code = "import sys, ml.training.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
