"""What is tried in several ranks, beside the cases; results go into files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from ml.errors import TrainingError
from ml.training import stepping
from ml.training.job import load_job, plan_of
from ml.training.layout import USABLE_SHARE, Layout
from ml.training.ranks import RankGroup
from ml.training.stepping import Stepper
from ml.training.strategies.sizes import model_sizes
from tests.ml.training.strategies.cases import ADAMW, STEPS, Case

CASE = Case("states", "TinyLanguageModelJob", arguments={"double": True}, optimizer=replace(ADAMW, learning_rate=1e-2))
STRATEGIES = {2: ["fsdp", "tensor", "pipeline", "ddp"], 4: ["fsdp+tensor", "ddp+pipeline", "ddp+tensor"]}
CHAINS = {num_ranks: [*strategies, strategies[0]] for num_ranks, strategies in STRATEGIES.items()}
POISONED_ROW = 4


def started(strategy: str, folder: Path, group: RankGroup, **job) -> tuple[Stepper, torch.optim.Optimizer]:
    spec = replace(CASE, strategy=strategy, arguments=CASE.arguments | job).spec(folder, group.num_ranks)
    stepper = Stepper(spec, load_job(spec), group)
    return stepper, stepper.new_optimizer(spec.optimizer.learning_rate)


def step(stepper: Stepper, optimizer: torch.optim.Optimizer, index: int) -> float:
    return stepper.train_step(STEPS[index % len(STEPS)], optimizer, "fp32", CASE.optimizer.learning_rate).loss


def pass_on(group: RankGroup, folder: Path) -> None:
    """One step in each layout, from the checkpoint of the one before."""
    losses = []
    for index, strategy in enumerate(CHAINS[group.num_ranks]):
        stepper, optimizer = started(strategy, folder, group)
        if index:
            dcp.load(stepper.state_tensors(optimizer), checkpoint_id=folder / f"of-{group.num_ranks}-{index}")
        losses.append(step(stepper, optimizer, index))
        dcp.save(stepper.state_tensors(optimizer), checkpoint_id=folder / f"of-{group.num_ranks}-{index + 1}")
    if group.is_first:
        (folder / f"losses-{group.num_ranks}.json").write_text(json.dumps(losses))


def take_whole(group: RankGroup, folder: Path, whole: dict[str, torch.Tensor]) -> None:
    """The next loss in each layout, from the whole tensors of one process."""
    losses, weights_kept = [], []
    for strategy in STRATEGIES[group.num_ranks]:
        stepper, optimizer = started(strategy, folder, group)
        stepper.restore(optimizer, whole)
        losses.append(step(stepper, optimizer, 2))
        weights = {name.removeprefix("model/"): tensor for name, tensor in whole.items() if name.startswith("model/")}
        stepper.load_weights(weights)
        found = stepper.weights()
        weights_kept.append(all(torch.equal(found[name], tensor) for name, tensor in weights.items()) if group.is_first else None)
    if group.is_first:
        (folder / f"whole-{group.num_ranks}.json").write_text(json.dumps([losses, weights_kept]))


def poison(group: RankGroup, folder: Path) -> None:
    """A step with a row whose loss is not a number, then one without it."""
    found = []
    for strategy in STRATEGIES[group.num_ranks]:
        stepper, optimizer = started(strategy, folder, group, poisoned_row=POISONED_ROW)
        before = stepper.weights()
        result = stepper.train_step(np.arange(7), optimizer, "fp32", 1e-2)
        after = stepper.weights()
        all_agree = group.sum([float(result.finite), float(np.isnan(result.loss))]) == [0.0, float(group.num_ranks)]
        unchanged = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        found.append([all_agree, unchanged, step(stepper, optimizer, 1)])
    if group.is_first:
        (folder / f"poisoned-{group.num_ranks}.json").write_text(json.dumps(found))


def compute_in_bf16(group: RankGroup, folder: Path) -> None:
    losses = []
    for strategy in STRATEGIES[group.num_ranks]:
        stepper, optimizer = started(strategy, folder, group, double=False)
        losses.append([stepper.train_step(rows, optimizer, "bf16", 1e-2).loss for rows in STEPS])
    if group.is_first:
        (folder / f"bf16-{group.num_ranks}.json").write_text(json.dumps(losses))


def drop_values(group: RankGroup, folder: Path) -> None:
    """Ranks that compute the same rows hold the same token table after some steps with dropout; others draw masks of their own."""
    stepper, optimizer = started("tensor", folder, group, dropout=0.5)
    drawn = float(torch.rand(()))
    losses = [step(stepper, optimizer, index) for index in range(3)]
    table = float(dict(stepper.model.named_parameters())["embedding.weight"].detach().abs().sum())
    same = [-group.largest(-value) == group.largest(value) for value in (table, drawn)]
    started("ddp", folder, group)
    drawn = float(torch.rand(()))
    differ = -group.largest(-drawn) != group.largest(drawn)
    if group.is_first:
        (folder / "dropout.json").write_text(json.dumps({"same": same, "differ": differ, "losses": losses}))


def build_unlike_models(group: RankGroup, folder: Path) -> None:
    try:
        started("ddp", folder, group, unlike=True)
    except TrainingError as error:
        (folder / f"unlike-{group.rank}.txt").write_text(str(error))


def choose_for_small_devices(group: RankGroup, folder: Path) -> None:
    """What "auto" comes to when devices have room for less and less. One rank has a little more than the other."""
    spec = replace(CASE, strategy="auto", arguments={}).spec(folder, group.num_ranks)
    job = load_job(spec)
    num_tokens = spec.batch_size_per_rank * int(job.lengths["train"].max())
    sizes = model_sizes(job.build_model(0), plan_of(job), spec.optimizer, num_tokens)
    copies, shards = (sizes.per_rank(layout) for layout in (Layout("ddp", replicate=2), Layout("fsdp", shard=2)))
    found = []
    true_bytes = stepping.device_bytes
    for room in (2 * copies, (copies + shards) // 2):
        stepping.device_bytes = lambda *_, room=room: int(room / USABLE_SHARE) + group.rank * 100
        stepper = Stepper(spec, load_job(spec), group)
        kept = Stepper(spec, load_job(spec), group, parallelism=stepper.parallelism)
        found.append([stepper.parallelism.strategy, stepper.choice, kept.layout == stepper.layout, kept.choice])
    stepping.device_bytes = true_bytes
    if group.is_first:
        (folder / "chosen.json").write_text(json.dumps(found))
