"""torch.compile, tried before it is trusted.

A model is compiled in place: its parameters keep their names, so checkpoints do not differ. Lengths of batches vary, so
shapes are dynamic: one compilation for all of them, not one each.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)

# torch's own switches for where compiled code is kept.
_CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def has_compiler(device: torch.device) -> bool:
    """Whether there is what compiling needs: a C++ compiler for the CPU; for GPUs torch brings its own."""
    return device.type == "cuda" or any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def keep_compiled_code_in(folder: Path) -> None:
    """Keep what is compiled, so that a restart need not compile again. Call it before anything is compiled."""
    for variable, name in _CACHE_VARIABLES.items():
        os.environ[variable] = str(folder / name)


def compile_in_place(model: nn.Module, layers: Iterable[nn.Module] | None = None, *, dynamic: bool = True) -> None:
    """Make every later call of the model run compiled code; the first ones compile it.

    Args:
        layers: compile only these: like layers share their code, and a gradient is ready as soon as its layer is done.
        dynamic: one compilation for batches of all lengths; false where all have one, for which the code is then made.
    """
    for module in [model] if layers is None else layers:
        module.compile(dynamic=dynamic)


def undo_compile(model: nn.Module) -> None:
    """Back to running the model as written."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def try_compiled(
    model: nn.Module, run: Callable[[], object], layers: Iterable[nn.Module] | None = None, *, dynamic: bool = True
) -> str | None:
    """Compile, and run once. When that fails the model is as before, and the sentence that comes back says why.

    Args:
        run: uses the model, forward and backward.
    """
    compile_in_place(model, layers, dynamic=dynamic)
    try:
        run()
    # Whatever a compiler may raise, uncompiled code still trains.
    except Exception as error:
        undo_compile(model)
        sentence = f"the model could not be compiled ({type(error).__name__}: {_reason(error)}) and runs as it is"
        logger.warning("%s", sentence)
        return sentence
    return None


def _reason(error: Exception) -> str:
    """The first line of what a compiler says, with the next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]
