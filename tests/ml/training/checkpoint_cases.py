"""What the tests of checkpoints write and read: a small network whole or split by FSDP2, in real ranks that talk over gloo."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ml.errors import TrainingError
from ml.training import checkpoint_storage
from ml.training.checkpoint import Checkpointer, Progress, load_checkpoint
from ml.training.folders import WorkFolder
from ml.training.plan import Plan
from ml.training.ranks import RankGroup
from ml.training.strategies.states import state_tensors
from tests.ml.training.gloo_ranks import run_ranks

SEED = 5


def work_folder(root: Path) -> WorkFolder:
    """A work folder with a history."""
    root.mkdir(parents=True, exist_ok=True)
    work = WorkFolder(root)
    work.history.touch()
    return work


def some_plan() -> Plan:
    return Plan(
        fingerprint="f",
        precision="fp32",
        epochs=1,
        num_train_rows=1,
        num_available_rows=1,
        num_validation_rows=1,
        global_batch_size=1,
        steps_per_epoch=1,
        num_steps=100,
        num_warmup_steps=0,
        validate_every_steps=1,
        step_seconds=0.1,
        step_seconds_measured={},
        estimated_seconds=1.0,
    )


def save_step(work: WorkFolder, step: int, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    """One checkpoint from start to end."""
    settings: dict[str, Any] = {"keep_last": 2, "asynchronous": True} | options
    with Checkpointer(work, RankGroup(), **settings) as checkpointer:
        checkpointer.save(Progress(step=step), some_plan(), tensors)


class Trained:
    """A network with AdamW on one fixed batch. Its last layer has 3 rows: of 4 ranks, one holds nothing of it."""

    def __init__(self, group: RankGroup, *, split: bool, seed: int = SEED):
        self.group = group
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.BatchNorm1d(10, momentum=0.5), nn.Linear(10, 3))
        if split:
            mesh = init_device_mesh("cpu", (group.num_ranks,))
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(16, 6, generator=generator)
        self.targets = torch.randn(16, 3, generator=generator)

    def step(self, num_steps: int) -> list[float]:
        """The loss of each step, before the step. All ranks have the same rows, so averaging their gradients changes nothing."""
        losses = []
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            loss = ((self.model(self.inputs) - self.targets) ** 2).mean()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        return state_tensors(self.model, self.optimizer)

    def save(self, work: WorkFolder, step: int) -> None:
        with Checkpointer(work, self.group, keep_last=2, asynchronous=True) as checkpointer:
            checkpointer.save(Progress(step=step), some_plan(), self.tensors())

    def load(self, work: WorkFolder, step: int) -> None:
        load_checkpoint(work.checkpoint(step), self.tensors(), self.group, work=work, seed=SEED)


def run_scenario(scenario: Callable[[RankGroup, Path], Any], num_ranks: int, folder: Path) -> Any:
    """Run a function of this module in so many processes; returns what the first rank's call returned (JSON)."""
    answer = folder / f"{scenario.__name__}.json"
    run_ranks(_answer, num_ranks, scenario, folder, answer)
    return json.loads(answer.read_text())


def _answer(group: RankGroup, scenario: Callable[[RankGroup, Path], Any], folder: Path, answer: Path) -> None:
    value = scenario(group, folder)
    if group.is_first:
        answer.write_text(json.dumps(value))


def split_in_four(group: RankGroup, folder: Path) -> dict[str, list[float]]:
    """Saves after 3 steps, split by FSDP2, and goes on."""
    trained = Trained(group, split=True)
    trained.step(3)
    trained.save(work_folder(folder / "split"), 3)
    return {"next": trained.step(3)}


def in_two(group: RankGroup, folder: Path) -> dict[str, Any]:
    """Goes on from four ranks' and from one rank's checkpoint, writes two more, and fails to write one."""
    from_four = Trained(group, split=True, seed=77)
    from_four.load(work_folder(folder / "split"), 3)
    losses_from_four = from_four.step(3)

    from_one = Trained(group, split=False, seed=77)
    from_one.load(work_folder(folder / "single"), 3)
    from_one.save(work_folder(folder / "pair"), 3)
    losses_from_one = from_one.step(3)

    # The second save is written in the background, and the training goes on meanwhile.
    moving = work_folder(folder / "moving")
    with Checkpointer(moving, group, keep_last=2, asynchronous=True) as checkpointer:
        background = []
        for step in (7, 8):
            checkpointer.save(Progress(step=step), some_plan(), from_one.tensors())
            background.append(checkpointer._thread is not None)
            losses_from_moving = from_one.step(3)
        copied = sum(copy.numel() for name, copy in checkpointer._copies.items() if not name.startswith("random/"))
    copied_shares = copied / sum(tensor.numel() for tensor in from_one.tensors().values())

    # As the stages of a pipeline: each rank has some tensors of its own.
    stages = work_folder(folder / "stages")
    tensors = {f"model/stage-{group.rank}": torch.full((3,), float(group.rank)), "model/shared": torch.arange(4)}
    checkpointer = Checkpointer(stages, group, keep_last=2, asynchronous=True)
    checkpointer.save(Progress(step=1), some_plan(), tensors)
    checkpointer.wait()

    write = checkpoint_storage.write_safetensors
    if group.rank == 1:

        def fail(*arguments: Any) -> Any:
            raise OSError(28, "No space left on device")

        checkpoint_storage.write_safetensors = fail
    checkpointer.save(Progress(step=2), some_plan(), tensors)
    try:
        checkpointer.wait()
        message = "no error"
    except TrainingError as error:
        message = str(error)
    checkpoint_storage.write_safetensors = write
    messages = group.sum([float("rank 1: OSError" in message)])
    left = sorted(path.name for path in stages.checkpoints.iterdir())
    dist.barrier()
    checkpointer.save(Progress(step=3), some_plan(), tensors)
    checkpointer.close()
    return {
        "from four": losses_from_four,
        "from one": losses_from_one,
        "from moving": losses_from_moving,
        "background": background,
        "copied share": copied_shares,
        "message": message,
        "ranks that know": messages[0],
        "left": left,
        "in the end": sorted(path.name for path in stages.checkpoints.iterdir()),
    }


def write_without_end(root: Path, num_mebibytes: int) -> None:
    """Checkpoints one after the other, each filled with its own step, until killed."""
    torch.set_num_threads(1)
    work = work_folder(root)
    tensors = {f"model/{i}": torch.zeros(2**18) for i in range(num_mebibytes)} | {"model/count": torch.tensor(0)}
    checkpointer = Checkpointer(work, RankGroup(), keep_last=2, asynchronous=True)
    for step in range(1, 10_000):
        for tensor in tensors.values():
            tensor.fill_(step)
        checkpointer.save(Progress(step=step), some_plan(), tensors)
