"""Checkpoints: all that a training needs to go on exactly as if nothing had happened. Safetensors and JSON, no pickles.

step-00000050/
    model.safetensors       parameters and buffers
    optimizer.safetensors   <parameter>/exp_avg, /exp_avg_sq, /step
    random.safetensors      random generator state of every rank
    best.safetensors        best weights so far (a hard link), once there was a validation
    history.jsonl           the history up to here
    state.json              step, best metric, early-stop counter, plan, sizes of the files
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ml.errors import TrainingError
from ml.training.checkpoint_folders import BEST_FILE, HISTORY_FILE, STATE_FILE, prune_checkpoints, step_of_checkpoint
from ml.training.folders import WorkFolder, read_json, sync_file, sync_folder, write_json
from ml.training.plan import Plan
from ml.training.ranks import RankGroup

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"


@dataclass
class Progress:
    """Where a training stands. `step` counts finished steps; the sampler and the schedule follow from it alone."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = float("inf")
    best_accuracy: float | None = None
    num_validations_without_gain: int = 0


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; what is shared under several names comes once."""
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = {name: parameter.data for name, parameter in model.named_parameters()}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in state}
    return tensors


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights, durable and whole before the name appears."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model_tensors(model).items()}, part)
    sync_file(part)
    part.replace(path)
    sync_folder(path.parent)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy weights written by `save_weights` into a model of the same architecture.

    Raises:
        TrainingError: names or shapes differ.
    """
    stored = load_file(path)
    own = model_tensors(model)
    differing = sorted(
        name for name in own.keys() | stored.keys() if name not in own or name not in stored or own[name].shape != stored[name].shape
    )
    if differing:
        raise TrainingError(f"{path} is of another architecture: {len(differing)} tensors differ, first {differing[0]!r}; train anew")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def save_checkpoint(
    work: WorkFolder, progress: Progress, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, group: RankGroup
) -> None:
    """Write a checkpoint of this step and delete older ones. All ranks call it; the first one writes."""
    random_states = {f"cpu.{rank}": state for rank, state in enumerate(group.gather(torch.get_rng_state()))}
    if group.device.type == "cuda":
        states = group.gather(torch.cuda.get_rng_state(group.device))
        random_states |= {f"cuda.{rank}": state for rank, state in enumerate(states)}
    if not group.is_first:
        return
    work.checkpoints.mkdir(parents=True, exist_ok=True)
    part = work.checkpoints / f".writing-{progress.step:08d}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model_tensors(model).items()}, part / MODEL_FILE)
    save_file(_optimizer_tensors(model, optimizer), part / OPTIMIZER_FILE)
    save_file(random_states, part / RANDOM_FILE)
    shutil.copyfile(work.history, part / HISTORY_FILE)
    for path in part.iterdir():
        sync_file(path)
    if progress.best_step:
        os.link(work.best_weights(progress.best_step), part / BEST_FILE)
    state = {
        "format_version": FORMAT_VERSION,
        "progress": asdict(progress),
        "plan": plan.to_json(),
        "files": {path.name: path.stat().st_size for path in part.iterdir()},
    }
    write_json(part / STATE_FILE, state)
    final = work.checkpoint(progress.step)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    sync_folder(work.checkpoints)
    prune_checkpoints(work.checkpoints)


def read_state(folder: Path) -> tuple[Progress, Plan]:
    """Progress and plan of a checkpoint.

    Raises:
        TrainingError: the checkpoint is of a format that this version does not read.
    """
    state: dict[str, Any] = read_json(folder / STATE_FILE) or {}
    if state.get("format_version") != FORMAT_VERSION:
        raise TrainingError(
            f"{folder}: checkpoint format {state.get('format_version')}, this version reads {FORMAT_VERSION}; delete it to train anew"
        )
    return Progress(**state["progress"]), Plan.from_json(state["plan"])


def load_checkpoint(
    folder: Path, work: WorkFolder, model: nn.Module, optimizer: torch.optim.Optimizer, group: RankGroup, seed: int
) -> None:
    """Restore model, optimizer, this rank's random state, and the best weights' file."""
    load_weights(model, folder / MODEL_FILE)
    _load_optimizer_tensors(model, optimizer, load_file(folder / OPTIMIZER_FILE))
    states = load_file(folder / RANDOM_FILE)
    if len([name for name in states if name.startswith("cpu.")]) == group.num_ranks:
        torch.set_rng_state(states[f"cpu.{group.rank}"])
        if group.device.type == "cuda" and f"cuda.{group.rank}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{group.rank}"], group.device)
    else:
        # Another number of ranks draws other dropout masks in any case; it must only not draw the first ones again.
        torch.manual_seed(seed * 1_000_003 + step_of_checkpoint(folder) * 1_009 + group.rank)
    if group.is_first and (folder / BEST_FILE).is_file():
        best = work.best_weights(read_state(folder)[0].best_step)
        best.parent.mkdir(parents=True, exist_ok=True)
        if not best.is_file():
            os.link(folder / BEST_FILE, best)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        # Fused AdamW keeps its step count beside the parameter.
        optimizer.state[parameter][key] = tensor.to(parameter.device)
