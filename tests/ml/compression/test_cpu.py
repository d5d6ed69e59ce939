import pytest

from ml.compression import cpu

WITH_VNNI = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n"
WITHOUT_VNNI = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni_like\n"


@pytest.fixture(autouse=True)
def _forget_this_machine():
    cpu.int8_products_saturate.cache_clear()
    yield
    cpu.int8_products_saturate.cache_clear()


def test_flags_are_those_of_the_first_processor():
    assert cpu.cpu_flags(WITH_VNNI) == {"fpu", "avx2", "avx512f", "avx512_vnni"}
    assert cpu.cpu_flags("nothing of the kind") == set()


@pytest.mark.parametrize(
    ("machine", "cpu_info", "saturates"),
    [
        ("x86_64", WITH_VNNI, False),
        ("x86_64", WITHOUT_VNNI, True),
        ("AMD64", None, True),
        ("aarch64", None, False),
    ],
)
def test_products_saturate_on_x86_without_vnni(monkeypatch, tmp_path, machine: str, cpu_info: str | None, saturates: bool):
    path = tmp_path / "cpuinfo"
    if cpu_info is not None:
        path.write_text(cpu_info)
    monkeypatch.setattr(cpu, "_CPU_INFO", path)
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    assert cpu.int8_products_saturate() is saturates
