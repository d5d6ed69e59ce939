import sys
import types
from pathlib import Path

import psutil
import pytest
import torch

from ml.training import devices
from ml.training.devices import DeviceSampler, container_memory, memory_share


def control_group(folder: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "fs", folder / "cgroup"


def test_the_limit_of_a_container_version_2(tmp_path: Path):
    files = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 400\ninactive_file 250\n"}
    assert container_memory(*control_group(tmp_path, "0::/\n", files)) == (450, 1000)


def test_the_limit_of_a_container_version_1(tmp_path: Path):
    files = {
        "memory/pod/memory.limit_in_bytes": "1000\n",
        "memory/pod/memory.usage_in_bytes": "700\n",
        "memory/pod/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
    }
    assert container_memory(*control_group(tmp_path, "5:cpu:/\n4:memory:/pod\n0::/\n", files)) == (500, 1000)


def test_the_own_group_may_be_mounted_as_the_root(tmp_path: Path):
    files = {
        "memory/memory.limit_in_bytes": "1000\n",
        "memory/memory.usage_in_bytes": "700\n",
        "memory/memory.stat": "total_inactive_file 0\n",
    }
    assert container_memory(*control_group(tmp_path, "4:memory:/kubepods/burstable/pod1\n", files)) == (700, 1000)


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n", "memory.current": "7\n", "memory.stat": "inactive_file 0\n"}])
def test_no_container_no_limit(tmp_path: Path, files: dict[str, str]):
    assert container_memory(*control_group(tmp_path, "0::/\n", files)) is None


def test_a_limit_of_its_own_is_nearer_than_the_machines():
    rss = psutil.Process().memory_info().rss
    assert memory_share(rss, rss * 100 // 98) == pytest.approx(0.98, rel=0.01)
    assert memory_share(rss) < 0.98


def test_samples_are_taken_in_the_background_until_it_is_closed():
    sampler = DeviceSampler(torch.device("cpu"), sample_seconds=0.01)
    sampler.start()
    total = sum(i * i for i in range(3_000_000))
    assert total > 0
    sampler.close()
    found = sampler.take()
    assert 20 < found.cpu_percent < 400
    assert found.rss_bytes is not None
    assert found.node_cpu_percent is not None
    assert found.gpu_percent is None
    assert sampler.take().rss_bytes is None  # nothing was seen since


class FakeNvml(types.ModuleType):
    """NVML of a machine with one GPU, as far as it is asked; `broken` makes the meter of use fail, as on a part of a GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: bool):
        super().__init__("pynvml")
        self.broken = broken
        self.uuids: list[str] = []

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.uuids.append(uuid)
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> types.SimpleNamespace:
        if self.broken:
            raise self.NVMLError
        return types.SimpleNamespace(gpu=73)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(used=60e9, total=80e9)


@pytest.mark.parametrize("broken", [False, True])
def test_a_gpu_is_found_by_its_identity_and_read(monkeypatch: pytest.MonkeyPatch, broken: bool):
    nvml = FakeNvml(broken)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50_000_000_000)
    sampler = DeviceSampler(torch.device("cuda", 0))
    sampler.sample()
    found = sampler.take()
    assert nvml.uuids == ["GPU-1234"]
    assert found.gpu_percent == (None if broken else 73)
    assert (found.gpu_memory_bytes, found.gpu_memory_total_bytes, found.gpu_memory_peak_bytes) == (60e9, 80e9, 50e9)


def test_without_the_library_of_the_driver_a_gpu_is_not_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices._open_gpu(torch.device("cuda", 0)) is None
