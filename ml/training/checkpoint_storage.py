"""How torch.distributed.checkpoint (DCP) writes to a folder and reads from it here: safetensors and JSON.

DCP decides which rank writes which piece of which tensor, so that nothing is written twice, and which pieces a rank of any
other layout must read. Its own file writer keeps that in a pickle, and its safetensors writer cannot read back numbers
(tensors without a dimension). So the bytes are written here:

    rank-<5 digits>.safetensors   the pieces that this rank wrote
    tensors.json                  name -> type and shape of the whole tensor, and where its pieces lie

A file is hashed as it is written. Large writes and hashing let the interpreter go, so a training in the same process goes on.
DCP's own messages between the ranks are pickles, among processes of one training; none reaches a disk or is read from one.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ml.training.folders import digest_of_file, write_json

INDEX_FILE = "tensors.json"
_CHUNK_BYTES = 16 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# A single rank has no group to talk to, which is what DCP warns of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning)


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint, by its name in the folder."""

    name: str
    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.num_bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class StoredTensor:
    """Type and shape of a whole tensor, and its pieces: file, offset in the tensor, shape of the piece."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Piece:
    """What a rank tells the first one of a piece that it wrote."""

    file: StoredFile
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class StagedPlanner(DefaultSavePlanner):
    """Plans by the tensors that the training has, and gives out the bytes that were set aside for this checkpoint.

    Args:
        staged: name -> this rank's part of the tensor.
    """

    def __init__(self, staged: dict[str, torch.Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = SavePlan([item for item in plan.items if not _is_empty_part(item)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._staged[index.fqn]


class SafetensorsWriter(StorageWriter):
    """One rank's side of writing a checkpoint.

    Args:
        commit: called in the first rank with all files, once every rank's are on disk; what it raises, every rank raises.
    """

    def __init__(self, folder: Path, rank: int, commit: Callable[[list[StoredFile]], None]):
        self._folder = folder
        self._rank = rank
        self._commit = commit

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces to one file, durable."""
        pieces = {item.index.fqn: cast(torch.Tensor, planner.resolve_data(item)) for item in plan.items}
        results: list[WriteResult] = []
        if pieces:
            file = write_safetensors(self._folder / f"rank-{self._rank:05d}.safetensors", pieces)
            results = [_written(item, file) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, StoredFile] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for result in (result for of_rank in results for result in of_rank):
            piece: _Piece = result.storage_data
            whole = cast(TensorStorageMetadata, metadata.state_dict_metadata[result.index.fqn])
            entry = tensors.setdefault(
                result.index.fqn, {"dtype": _DTYPE_NAMES[whole.properties.dtype], "shape": list(whole.size), "pieces": []}
            )
            entry["pieces"].append({"file": piece.file.name, "offset": piece.offset, "shape": piece.shape})
            files[piece.file.name] = piece.file
        write_json(self._folder / INDEX_FILE, tensors)
        self._commit([*files.values(), stored_file(self._folder / INDEX_FILE)])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class SafetensorsReader(StorageReader):
    """Reads the pieces that this rank's layout needs, whichever ranks wrote them."""

    def __init__(self, folder: Path, index: dict[str, StoredTensor]):
        self._folder = folder
        self._index = index

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=stored.dtype),
                size=torch.Size(stored.shape),
                chunks=[ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)) for _, offset, shape in stored.pieces],
            )
            for name, stored in self._index.items()
        }
        files = {MetadataIndex(name, offset): file for name, stored in self._index.items() for file, offset, _ in stored.pieces}
        return Metadata(state_dict_metadata=tensors, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._files: dict[MetadataIndex, str] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            if 0 not in item.lengths:
                by_file.setdefault(self._files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for item in items:
                    self._read(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @staticmethod
    def _read(file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        if item.lengths:
            part = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
            source = file.get_slice(item.storage_index.fqn)[part]
        else:
            source = file.get_tensor(item.storage_index.fqn)
        target = planner.resolve_tensor(item).detach()
        target.copy_(source)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def load_planner() -> LoadPlanner:
    """For flat dictionaries of tensors, as all are here."""
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Which tensors a checkpoint has. Raises OSError or ValueError when the index is damaged."""
    return {
        name: StoredTensor(
            dtype=_DTYPES[entry["dtype"]],
            shape=tuple(entry["shape"]),
            pieces=tuple((piece["file"], tuple(piece["offset"]), tuple(piece["shape"])) for piece in entry["pieces"]),
        )
        for name, entry in json.loads((folder / INDEX_FILE).read_bytes()).items()
    }


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> StoredFile:
    """Write a safetensors file (format: huggingface.co/docs/safetensors), durable, and hash it on the way.

    The library's own writer keeps the interpreter locked while it writes, which would hold up a training beside it.

    Raises:
        ValueError: a type of tensor that checkpoints do not hold.
        OSError: such as a full disk.
    """
    # Wide types first, so that every tensor is aligned to its own type.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name} has type {tensor.dtype}; a checkpoint holds {', '.join(str(dtype) for dtype in _DTYPE_NAMES)}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("wb", buffering=0) as file:
        for piece in (len(text).to_bytes(8, "little"), text, *(_bytes_of(tensors[name]) for name in names)):
            view = memoryview(piece)
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                num_bytes += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return StoredFile(path.name, num_bytes, digest.hexdigest())


def stored_file(path: Path) -> StoredFile:
    """Size and digest of a file that is there."""
    return StoredFile(path.name, path.stat().st_size, digest_of_file(path))


def _is_empty_part(item: WriteItem) -> bool:
    """A tensor with fewer rows than ranks leaves some ranks without any."""
    data = item.tensor_data
    return data is not None and 0 in data.chunk.sizes and 0 not in data.size


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _written(item: WriteItem, file: StoredFile) -> WriteResult:
    data = item.tensor_data
    assert data is not None, item.index  # noqa: S101 - the planner lets nothing but tensors through
    return WriteResult(index=item.index, size_in_bytes=0, storage_data=_Piece(file, tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
