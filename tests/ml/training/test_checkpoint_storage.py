import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ml.training.checkpoint_storage import stored_file, write_safetensors


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(13, dtype=torch.uint8),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(7).bfloat16(),
        "turned": torch.randn(4, 6).t(),
        "number": torch.tensor(3),
        "nothing": torch.zeros(2, 0),
        "große Namen/é": torch.tensor([True, False]),
        "more than one piece": torch.randn(5 * 2**20),
    }
    path = tmp_path / "file.safetensors"
    written = write_safetensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_slice("turned")[1:3, 2:4], tensors["turned"][1:3, 2:4])
    assert written == stored_file(path)
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.num_bytes == path.stat().st_size


def test_a_type_that_is_not_stored_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"waves has type torch\.complex64"):
        write_safetensors(tmp_path / "file", {"waves": torch.zeros(3, dtype=torch.complex64)})
