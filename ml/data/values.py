"""One written form for every value of a cell, so that a class has one name whatever file it came from."""

import datetime
import decimal
import math
import re
from collections.abc import Iterable

from ml.errors import DataError

_WHOLE_OR_DECIMAL = re.compile(r"([+-]?\d+)\.(\d*?)0*")
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def cell_text(value: object) -> str | None:
    """A cell as a string, or None when it is empty: missing, NaN, or nothing but white space.

    Numbers lose a meaningless fraction: 1, 1.0 and "1.0" are "1"; "01" stays, for it may be a code. Booleans are
    "true" and "false", however they were written.

    Raises:
        DataError: the cell holds a list, a struct or bytes.
    """
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()  # type: ignore[union-attr]
    if value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in ("NaTType", "NAType"):
        return None
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, bool | int | float | decimal.Decimal | datetime.date | datetime.time):
        text = str(value)
        if isinstance(value, float) and value.is_integer():
            text = str(int(value))
    else:
        raise DataError(f"a cell holds {type(value).__name__} {str(value)[:80]!r}, not text, a number or true/false")
    if match := _WHOLE_OR_DECIMAL.fullmatch(text):
        whole, fraction = match.groups()
        text = f"{whole}.{fraction}" if fraction else whole
    if text.lower() in ("true", "false"):
        text = text.lower()
    return text or None


def split_name(value: str) -> str:
    """`train`, `validation` or `test` from the usual spellings of them.

    Raises:
        DataError: anything else.
    """
    name = _SPLITS.get(value.strip().lower())
    if name is None:
        raise DataError(f"the split column says {value!r}; it may say train, validation or test")
    return name


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Class names in a fixed order: by number when all are numbers, else by code point."""
    distinct = set(labels)
    try:
        return sorted(distinct, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(distinct)
