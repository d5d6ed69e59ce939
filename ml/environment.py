"""The machine and the library versions of this process: what a measured number is worth nothing without."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from ml.artifacts import Record

_REPORTED_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "onnx",
    "onnxruntime",
    "scikit-learn",
    "numpy",
    "pandas",
    "great-expectations",
    "prefect",
    "minio",
)
# What decides how fast low precision runs on this machine.
_REPORTED_CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16")


class Environment(Record):
    platform: str
    python: str
    cpu: str
    cpu_flags: tuple[str, ...]
    num_cores: int
    memory_bytes: int
    libraries: dict[str, str]


def describe_environment() -> Environment:
    """The machine and the library versions of this process."""
    import psutil

    model, flags = _describe_cpu()
    libraries = {}
    for name in _REPORTED_LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a machine that only serves or only trains lacks some of them
    return Environment(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=model,
        cpu_flags=flags,
        num_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        libraries=libraries,
    )


def _describe_cpu() -> tuple[str, tuple[str, ...]]:
    """Model name and the flags that matter for speed, from /proc/cpuinfo where there is one."""
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    return model, tuple(flag for flag in _REPORTED_CPU_FLAGS if flag in flags)
