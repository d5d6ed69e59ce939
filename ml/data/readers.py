"""Rows of one source object: CSV, JSONL or Parquet bytes -> columns of cells."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from ml.data.encodings import decode
from ml.errors import DataError

_DELIMITERS = (",", ";", "\t", "|")
_SNIFFED_RECORDS = 50
# The csv module's own limit of 131,072 characters a cell is less than some reviews; a cell beyond this is a lost quote.
_MAX_CELL_CHARACTERS = 16 * 1024 * 1024
_MAX_UNPACKED_BYTES = 16 * 1024**3


@dataclass(frozen=True)
class Columns:
    """Cells by column, in file order; `encoding` is None for files that are not text."""

    cells: dict[str, list[object]]
    num_rows: int
    encoding: str | None


def read_columns(name: str, data: bytes, encoding: str | None = None) -> Columns:
    """Parse one object; its extension says what it is.

    Raises:
        DataError: it is not what its extension says, or a record is malformed (with the line it starts on).
    """
    kind = name.lower()
    if kind.endswith(".gz"):
        data, kind = _unpack(name, data), kind.removesuffix(".gz")
    if kind.endswith(".parquet"):
        return _read_parquet(name, data)
    text, used = decode(data, encoding, name)
    if kind.endswith((".csv", ".tsv")):
        return _read_csv(name, text, used, delimiter="\t" if kind.endswith(".tsv") else None)
    return _read_jsonl(name, text, used)


def _unpack(name: str, data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(_MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a whole gzip file ({error}); write it again") from error
    if len(unpacked) > _MAX_UNPACKED_BYTES:
        raise DataError(f"{name} unpacks to more than {_MAX_UNPACKED_BYTES // 1024**3} GiB; split it into several files of one folder")
    return unpacked


def _read_parquet(name: str, data: bytes) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
        cells = {str(column): table.column(column).to_pylist() for column in table.column_names}
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"{name} cannot be read as Parquet: {error}. Write it again, or give CSV or JSONL") from error
    return Columns(cells, table.num_rows, None)


def _read_jsonl(name: str, text: str, encoding: str) -> Columns:
    records = []
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}, line {number}: not JSON ({error.msg}), found {line.strip()[:60]!r}; each line is one object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f'{name}, line {number}: found {line.strip()[:80]!r}, not an object such as {{"text": …, "label": …}}')
        records.append(record)
    columns = dict.fromkeys(column for record in records for column in record)
    cells = {column: [record.get(column) for record in records] for column in columns}
    if "\\ud" in text.lower():
        cells = {column: [_whole_characters(cell) for cell in values] for column, values in cells.items()}
    return Columns(cells, len(records), encoding)


def _whole_characters(cell: object) -> object:
    """Half of a surrogate pair, which JSON can escape but UTF-8 cannot hold, becomes U+FFFD."""
    return cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(cell, str) else cell


def _read_csv(name: str, text: str, encoding: str, delimiter: str | None) -> Columns:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or _sniff(text), strict=True)
    header: list[str] | None = None
    records: list[list[str]] = []
    line = 1
    try:
        for record in reader:
            if not any(map(str.strip, record)):
                pass  # blank line, or one of separators only
            elif header is None:
                header = _header(name, record)
            else:
                records.append(_fit(name, record, len(header), line))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f'{name}, line {line}: {error}. A quote in a quoted cell is doubled (""), and every opening quote needs a closing one'
        ) from error
    columns = list(zip(*records, strict=True)) if records else [()] * len(header or ())
    return Columns({column: list(cells) for column, cells in zip(header or (), columns, strict=True)}, len(records), encoding)


def _header(name: str, record: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in record]
    while header and not header[-1]:
        header.pop()
    # An empty name in front is the index column that data frames write.
    header = [cell or f"column {position}" for position, cell in enumerate(header, start=1)]
    if twice := sorted({cell for cell in header if header.count(cell) > 1}):
        raise DataError(f"{name}: the first line names the column {twice[0]!r} twice; columns found: {', '.join(header)}. Rename one")
    return header


def _fit(name: str, record: list[str], num_columns: int, line: int) -> list[str]:
    if len(record) == num_columns:
        return record
    if len(record) > num_columns and not any(cell.strip() for cell in record[num_columns:]):
        return record[:num_columns]
    raise DataError(
        f"{name}, line {line}: found {len(record)} cells, the first line names {num_columns} columns; the record starts "
        f"{record[0][:60]!r}. A cell that holds the separator or a line break must be in double quotes"
    )


def _sniff(text: str) -> str:
    """The separator that parts the first records most evenly, and into the most columns."""
    best, most_columns = ",", 1
    for delimiter in _DELIMITERS:
        widths = _widths(text, delimiter)
        if widths and widths[0] > most_columns and sum(width == widths[0] for width in widths) >= 0.9 * len(widths):
            best, most_columns = delimiter, widths[0]
    if most_columns == 1:
        # No separator is even: take the one that parts the header, so that the error names the malformed line.
        first = text.split("\n", 1)[0]
        best = max(_DELIMITERS, key=first.count)
    return best


def _widths(text: str, delimiter: str) -> list[int]:
    widths: list[int] = []
    try:
        for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
            if record:
                widths.append(len(record))
            if len(widths) == _SNIFFED_RECORDS:
                break
    except csv.Error:
        return []
    return widths
