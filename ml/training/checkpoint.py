"""Checkpoints: all that a training needs to go on exactly as if nothing had happened. Safetensors and JSON, no pickles.

step-00000050/
    rank-00000.safetensors  what this rank wrote of the tensors, see `ml.training.checkpoint_storage`
    tensors.json            type, shape and place of every tensor:
                            model/<parameter or buffer>, optimizer/<parameter>/<key>, random/<rank>/cpu and /cuda
    best.safetensors        best weights so far (a hard link), once there was a validation
    history.jsonl           the history up to here
    state.json              step, best metrics, early-stop counter, plan; sizes and digests of the files; written last

Tensors have the names and shapes of the unsplit model, so any number of ranks, split in any way, can read what any other wrote.
The schedule of the learning rate and the place in the data follow from the step alone.
"""

import os
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from ml.errors import TrainingError
from ml.training.checkpoint_folders import (
    BEST_FILE,
    HISTORY_FILE,
    REPLACED_PREFIX,
    STATE_FILE,
    WRITING_PREFIX,
    prune_checkpoints,
    step_of_checkpoint,
)
from ml.training.checkpoint_storage import (
    SafetensorsReader,
    SafetensorsWriter,
    StagedPlanner,
    StoredFile,
    StoredTensor,
    load_planner,
    read_index,
    stored_file,
    write_safetensors,
)
from ml.training.folders import WorkFolder, read_json, sync_file, sync_folder, write_json
from ml.training.plan import Plan
from ml.training.ranks import RankGroup
from ml.training.strategies.states import model_tensors

FORMAT_VERSION = 2
# A rank whose disk is slow is waited for this long by those that are done. One that is gone is noticed at once.
WRITE_TIMEOUT = timedelta(minutes=30)

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """Where a training stands, as JSON. `step` counts finished steps; the sampler and the schedule follow from it alone.

    Args:
        seconds: of training, interruptions not counted.
        poisoned_steps: whose batch gave no finite loss or gradient, and which changed nothing.
        balance: what load-aware sharing has measured, for it to go on from.
        scaler: of fp16, its scale and how long it has held.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = float("inf")
    best_accuracy: float | None = None
    best_recall: float | None = None
    num_validations_without_gain: int = 0
    num_validations: int = 0
    num_poisoned_in_a_row: int = 0
    poisoned_steps: list[int] = field(default_factory=list)
    balance: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a whole model's weights by name, durable and whole before the file has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write_safetensors(part, dict(tensors))
    part.replace(path)
    sync_folder(path.parent)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy weights written by `write_weights` into a model of the same architecture.

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


class Checkpointer:
    """Writes the checkpoints of one training. All ranks have one and make the same calls.

    The bytes are copied while the training waits, and written while it goes on. Each rank copies only what it is to write; the
    copies stay in memory (of the CPU) for the next time. Several ranks learn their shares by the first save, which the
    training therefore waits for. Talks to the other ranks in a group of its own, so that its messages never meet the training's.

    Args:
        keep_last: how many checkpoints are kept.
        asynchronous: otherwise the training waits until all is written, and no copies are made.
    """

    def __init__(self, work: WorkFolder, group: RankGroup, *, keep_last: int, asynchronous: bool):
        self._work = work
        self._group = group
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._process_group: dist.ProcessGroup | None = None
        if group.num_ranks > 1:
            self._process_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT))
        self._copies: Tensors = {}
        self._share: set[str] = set()
        self._shape_of_share: dict[str, tuple[torch.Size, torch.dtype]] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._writing_step = 0
        self._best: tuple[int, StoredFile] | None = None

    def save(self, progress: Progress, plan: Plan, tensors: Tensors) -> float:
        """Begin a checkpoint of this moment; afterwards the tensors may change. Waits for the one before, if that is still written.

        Args:
            tensors: name -> tensor, of `Stepper.state_tensors`. A DTensor where it is split; else the same in every rank that
                has it, and not every rank need have it. Random states are added here.

        Returns:
            Seconds that the training was held up.

        Raises:
            TrainingError: this one or the one before could not be written, such as on a full disk. Older ones are untouched.
        """
        started = time.perf_counter()
        self.wait()
        self._writing_step = progress.step
        state = {"format_version": FORMAT_VERSION, "progress": asdict(progress), "plan": plan.to_json(), "num_ranks": self._group.num_ranks}
        tensors = {name: tensor.detach() for name, tensor in tensors.items()} | _random_states(self._group)
        local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
        try:
            folder = self._start_folder(progress)
            history_bytes = self._work.history.stat().st_size if self._group.is_first else 0
        except OSError as error:
            raise self._failure(str(error)) from error
        if self._asynchronous and self._knows_its_share(local):
            copies = self._copied({name: local[name] for name in self._share})
            arguments = (folder, state, tensors, copies, history_bytes)
            # A daemon: when the training ends with an error, nobody waits for ranks that may be gone.
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(folder, state, tensors, local, history_bytes)
            self.wait()
        return time.perf_counter() - started

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until the last checkpoint is written and has its name.

        Raises:
            TrainingError: it could not be written.
            RuntimeError: from gloo, when another rank is gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, CheckpointException):
            rank, (cause, _) = min(error.failures.items())
            raise self._failure(f"rank {rank}: {type(cause).__name__}: {cause}") from error
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the last checkpoint and give the copies' memory back. Raises what `wait` does."""
        self.wait()
        self._copies = {}

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif self._thread is not None:
            # The training failed, the checkpoint need not: the other ranks write it too, and if one is gone, gloo says so.
            self._thread.join()
            self._thread = None

    def _failure(self, reason: str) -> TrainingError:
        return TrainingError(
            f"the checkpoint of step {self._writing_step} could not be written to {self._work.checkpoints} ({reason}); "
            "the older ones are untouched. Make room or repair the disk there, then run again to go on from the last one"
        )

    def _start_folder(self, progress: Progress) -> Path:
        folder = self._work.checkpoints / f"{WRITING_PREFIX}{progress.step:08d}"
        if self._group.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if progress.best_step:
                # At once: the next validation may find better ones and delete these.
                os.link(self._work.best_weights(progress.best_step), folder / BEST_FILE)
        return folder

    def _knows_its_share(self, local: Tensors) -> bool:
        """Whether every rank does: DCP decides the same way again as long as no rank has other tensors than last time."""
        if self._process_group is None:
            self._share = set(local)
            return True
        shape = {name: (tensor.shape, tensor.dtype) for name, tensor in local.items()}
        num_changed = torch.tensor(int(shape != self._shape_of_share))
        dist.all_reduce(num_changed, group=self._process_group)
        self._shape_of_share = shape
        return not num_changed.item()

    def _copied(self, local: Tensors) -> Tensors:
        """The tensors' present values, in memory that is used again by the next checkpoint."""
        cuda = self._group.device.type == "cuda"
        copies: Tensors = {}
        for name, tensor in local.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda and tensor.is_cuda)
            copies[name] = copy.copy_(tensor, non_blocking=cuda)
        self._group.synchronize()
        self._copies = copies
        return copies

    def _write(self, folder: Path, state: dict[str, Any], tensors: Tensors, staged: Tensors, history_bytes: int) -> None:
        def commit(files: list[StoredFile]) -> None:
            self._commit(folder, state, files, history_bytes)

        planner = StagedPlanner(staged)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                save(
                    tensors,
                    storage_writer=SafetensorsWriter(folder, self._group.rank, commit),
                    planner=planner,
                    process_group=self._process_group,
                    no_dist=self._process_group is None,
                )
            self._share = {item.index.fqn for item in planner.plan.items}
        except BaseException as error:  # DCP's own is no Exception; the training's thread raises it
            self._error = error
            self._shape_of_share = None
            if self._group.is_first:
                shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, folder: Path, state: dict[str, Any], files: list[StoredFile], history_bytes: int) -> None:
        """In the first rank, with every rank's files on disk."""
        with self._work.history.open("rb") as source, (folder / HISTORY_FILE).open("wb") as target:
            target.write(source.read(history_bytes))
        sync_file(folder / HISTORY_FILE)
        files = [*files, stored_file(folder / HISTORY_FILE)]
        if best_step := state["progress"]["best_step"]:
            if self._best is None or self._best[0] != best_step:
                self._best = best_step, stored_file(folder / BEST_FILE)
            files.append(self._best[1])
        write_json(folder / STATE_FILE, state | {"files": {file.name: file.to_json() for file in files}})
        final = self._work.checkpoint(state["progress"]["step"])
        if final.exists():
            final.rename(final.with_name(f"{REPLACED_PREFIX}{final.name}"))
        folder.rename(final)
        sync_folder(self._work.checkpoints)
        prune_checkpoints(self._work.checkpoints, self._keep_last)


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


def load_checkpoint(folder: Path, tensors: Tensors, group: RankGroup, *, work: WorkFolder, seed: int) -> None:
    """Fill the tensors with the checkpoint's values; restore this rank's random state and the file of the best weights.

    Each rank reads only what its own layout needs.

    Args:
        tensors: as given to `Checkpointer.save`, by whatever layout these ranks have.

    Raises:
        TrainingError: the checkpoint is of another architecture or optimizer, or its index is damaged.
    """
    try:
        index = read_index(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{folder}: the index of tensors cannot be read ({error}); delete the folder to go on from an older one"
        ) from error
    _check_architecture(folder, tensors, index, group)
    states = {name: torch.empty_like(state) for name, state in _random_states(group).items() if name in index}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # No talk between the ranks: each knows from the index what it needs.
        load({**tensors, **states}, storage_reader=SafetensorsReader(folder, index), planner=load_planner(), no_dist=True)
    if sum(name.startswith("random/") and name.endswith("/cpu") for name in index) == group.num_ranks:
        torch.set_rng_state(states[f"random/{group.rank}/cpu"])
        if f"random/{group.rank}/cuda" in states:
            torch.cuda.set_rng_state(states[f"random/{group.rank}/cuda"], group.device)
    else:
        # Another number of ranks draws other dropout masks in any case; it must only not draw the first ones again.
        torch.manual_seed(seed * 1_000_003 + step_of_checkpoint(folder) * 1_009 + group.rank)
    if group.is_first and (folder / BEST_FILE).is_file():
        best = work.best_weights(read_state(folder)[0].best_step)
        best.parent.mkdir(parents=True, exist_ok=True)
        if not best.is_file():
            os.link(folder / BEST_FILE, best)


def _check_architecture(folder: Path, tensors: Tensors, index: dict[str, StoredTensor], group: RankGroup) -> None:
    """All ranks together must ask for all that is stored, except random states, and for nothing else."""
    differing = []
    for name, tensor in tensors.items():
        stored = index.get(name)
        if stored is None:
            differing.append(f"{name} is not stored")
        elif stored.shape != tuple(tensor.shape) or stored.dtype != tensor.dtype:
            differing.append(f"{name} is stored as {stored.dtype} {list(stored.shape)}, here it is {tensor.dtype} {list(tensor.shape)}")
    names = sorted(name for name in index if not name.startswith("random/"))
    num_asking = group.sum([float(name in tensors) for name in names] + [0.0])
    differing += [f"{name} is stored, here there is none" for name, number in zip(names, num_asking, strict=False) if not number]
    if differing:
        raise TrainingError(
            f"{folder} is of another architecture or optimizer: {len(differing)} tensors differ, first: {differing[0]}; "
            "train anew in another folder"
        )


def _random_states(group: RankGroup) -> Tensors:
    states = {f"random/{group.rank}/cpu": torch.get_rng_state()}
    if group.device.type == "cuda":
        states[f"random/{group.rank}/cuda"] = torch.cuda.get_rng_state(group.device)
    return states
