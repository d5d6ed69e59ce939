"""What a rank's process, machine and GPU are doing, looked at every few seconds by a thread of its own.

What cannot be known here (no GPU, no NVML, no `/proc`) is None, never a guess.
"""

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

SAMPLE_SECONDS = 2.0
# Counting the pages of a process takes milliseconds where it holds tens of gigabytes.
_SAMPLES_PER_PSS = 20
_CGROUP_FILES = (
    # (controller folder, limit, use, name of the file cache in memory.stat that the kernel can take back), version 2 first.
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class DeviceSample:
    """What was seen since the last call of `DeviceSampler.take`: means of percentages, largest values of memory.

    Args:
        cpu_percent: of this process; 100 is one core.
        node_cpu_percent: of all cores of the machine, 0 to 100.
        rss_bytes: memory of this process, shared pages in full.
        pss_bytes: the same with shared pages divided by those who share them.
        node_memory_share: in use, of what may be used: the machine's, the container's or the given limit, whichever is nearest.
        gpu_percent: share of the time in which any kernel ran, 0 to 100 (NVML). It does not say how busy a kernel keeps the GPU.
        gpu_memory_bytes: in use on the GPU by all processes (NVML), what torch keeps for later included.
        gpu_memory_peak_bytes: the most that tensors of this process took.
        gpu_memory_total_bytes: what the GPU has.
    """

    cpu_percent: float
    node_cpu_percent: float | None = None
    rss_bytes: int | None = None
    pss_bytes: int | None = None
    node_memory_share: float | None = None
    gpu_percent: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_memory_peak_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None


class DeviceSampler:
    """Samples in a thread from `start` to `close`; both may be called by any thread.

    Args:
        memory_limit_bytes: what this process may use, where that is less than the machine and the container allow.
    """

    def __init__(self, device: "torch.device", *, memory_limit_bytes: int | None = None, sample_seconds: float = SAMPLE_SECONDS):
        self._device = device
        self._memory_limit_bytes = memory_limit_bytes
        self._sample_seconds = sample_seconds
        self._process = psutil.Process()
        self._gpu = _open_gpu(device)
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-sampler", daemon=True)
        self._num_samples = 0
        self._pss_bytes: int | None = None
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, float] = {}
        self._taken = (time.perf_counter(), time.process_time())

    def start(self) -> None:
        psutil.cpu_percent()  # the first call only sets the start of what the next one measures
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def take(self) -> DeviceSample:
        """What was seen since the last call. Costs microseconds: it asks the system for nothing but the process's CPU time."""
        now = (time.perf_counter(), time.process_time())
        wall, cpu = (new - old for new, old in zip(now, self._taken, strict=True))
        self._taken = now
        with self._lock:
            means = {name: total / self._counts[name] for name, total in self._sums.items()}
            largest = dict(self._largest)
            self._sums.clear()
            self._counts.clear()
            self._largest.clear()
        memory = {name: int(value) for name, value in largest.items() if name.endswith("_bytes")}
        return DeviceSample(cpu_percent=100 * cpu / max(wall, 1e-9), node_memory_share=largest.get("node_memory_share"), **means, **memory)

    def sample(self) -> None:
        """Look once; the thread does it every `sample_seconds`."""
        rss = self._process.memory_info().rss
        if self._num_samples % _SAMPLES_PER_PSS == 0:
            self._pss_bytes = _pss_bytes()
        self._num_samples += 1
        means: dict[str, float | None] = {"node_cpu_percent": psutil.cpu_percent()}
        largest: dict[str, float | None] = {
            "rss_bytes": rss,
            "pss_bytes": self._pss_bytes,
            "node_memory_share": memory_share(rss, self._memory_limit_bytes),
        }
        if self._device.type == "cuda":
            largest |= _torch_memory(self._device)
        if self._gpu is not None:
            percent, gpu_memory = _read_gpu(self._gpu)
            means["gpu_percent"] = percent
            largest |= gpu_memory
        with self._lock:
            for name, value in means.items():
                if value is not None:
                    self._sums[name] = self._sums.get(name, 0.0) + value
                    self._counts[name] = self._counts.get(name, 0) + 1
            for name, value in largest.items():
                if value is not None:
                    self._largest[name] = max(value, self._largest.get(name, 0.0))

    def _run(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(psutil.Error, OSError):  # a file of /proc that is gone for a moment is not worth a training
                self.sample()
            self._ending.wait(self._sample_seconds)


def memory_share(rss_bytes: int, limit_bytes: int | None = None) -> float:
    """Memory in use of what may be used: of the machine, of the container, and of this process's own limit, the nearest to its end."""
    node = psutil.virtual_memory()
    shares = [1.0 - node.available / node.total]
    container = container_memory()
    if container is not None and container[1] < node.total:
        shares.append(container[0] / container[1])
    if limit_bytes is not None:
        shares.append(rss_bytes / limit_bytes)
    return max(shares)


def container_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """(bytes in use, limit) of the control group of this process, versions 1 and 2; None where there is none or it has no limit.

    File cache that the kernel can take back is not counted as in use: it never leads to a kill.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    for controller, limit_file, use_file, cache in _CGROUP_FILES:
        own = next((path for _, names, path in lines if (controller in names.split(",") if controller else names == "")), None)
        if own is None:
            continue
        # In a container the own group is often mounted as the root.
        for folder in (root / controller / own.lstrip("/"), root / controller):
            try:
                limit, used = (folder / limit_file).read_text().strip(), int((folder / use_file).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":
                return max(used - int(statistics.get(cache, 0)), 0), int(limit)
    return None


def _pss_bytes() -> int | None:
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), None)


def _torch_memory(device: "torch.device") -> dict[str, float | None]:
    import torch

    return {"gpu_memory_peak_bytes": torch.cuda.max_memory_allocated(device)}


def _open_gpu(device: "torch.device") -> Any | None:
    """NVML's handle of the GPU behind a torch device, whatever CUDA_VISIBLE_DEVICES calls it; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no module, no driver library, no such GPU, a part of a GPU: all the same, nothing can be read
        return None


def _read_gpu(handle: Any) -> tuple[float | None, dict[str, float | None]]:
    import pynvml

    try:
        percent = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:  # parts of a GPU (MIG) have no meter of use
        percent = None
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return percent, {}
    return percent, {"gpu_memory_bytes": int(memory.used), "gpu_memory_total_bytes": int(memory.total)}
