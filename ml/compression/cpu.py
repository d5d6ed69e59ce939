"""What the processor does with 8-bit numbers."""

import platform
from functools import lru_cache
from pathlib import Path

_INT8_DOT_PRODUCT_FLAGS = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}
_CPU_INFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def int8_products_saturate() -> bool:
    """Whether a pair of u8 x s8 products may overflow, so that weights must be kept to 7 bits.

    x86 without VNNI adds two such products in 16 bits (`vpmaddubsw`): 2 x 255 x 127 does not fit. With VNNI, and on ARM, the sum
    has 32 bits. An x86 whose flags cannot be read counts as one without: 7 bits are right everywhere, only a little coarser.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return False
    if not _CPU_INFO.is_file():
        return True
    return not _INT8_DOT_PRODUCT_FLAGS & cpu_flags(_CPU_INFO.read_text())


def cpu_flags(cpu_info: str) -> set[str]:
    """The flags of the first processor in the text of /proc/cpuinfo."""
    for line in cpu_info.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()
