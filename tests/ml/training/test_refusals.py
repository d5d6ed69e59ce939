"""Refused on the caller's side: no work folder is touched and no rank started."""

from pathlib import Path

import pytest

from ml.errors import ConfigError
from ml.training.launcher import run_training
from ml.training.spec import GradientSync, Parallelism
from tests.ml.training.test_loop import toy_spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_sync": GradientSync(hook="bf16")}, "bf16 needs the backend nccl, this training has gloo; fp16 works on it"),
        ({"gradient_sync": GradientSync(static_graph=True, accumulation_steps=2)}, "static_graph does not go with accumulation_steps 2"),
        ({"parallelism": Parallelism(strategy="tensor")}, "tensor: this model declares no tensor plan.*ddp"),
        ({"parallelism": Parallelism(strategy="ddp+pipeline", pipeline_ranks=2)}, r"ddp\+pipeline: .*ddp"),
        ({"parallelism": Parallelism(strategy="fsdp"), "gradient_sync": GradientSync(hook="fp16")}, "compresses the buckets of DDP"),
        ({"precision": "fp16"}, "fp16"),
    ],
)
def test_what_cannot_work_is_refused_before_a_rank_starts(tmp_path: Path, changes: dict, message: str) -> None:
    spec = toy_spec(tmp_path / "work", num_ranks=2, **changes)
    with pytest.raises(ConfigError, match=message):
        run_training(spec)
    assert not spec.work_dir.exists()
