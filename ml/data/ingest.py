"""From source objects to one table of texts and labels, with the bytes kept as they came."""

import difflib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ml.artifacts import ArtifactRef, RawDataset
from ml.config import DataConfig
from ml.data.readers import Columns, read_columns
from ml.data.sources import Source, SourceObject, open_source
from ml.data.values import cell_text, split_name
from ml.errors import DataError
from ml.storage.artifacts import ArtifactStore, digest_bytes

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# Tried only where the configured name is the default and no column has it.
COMMON_NAMES = {
    "text": ("text", "review", "sentence", "comment", "content", "message"),
    "label": ("label", "sentiment", "class", "category", "stars", "rating", "target"),
}
_OPTION = {"text": "TEXT=", "label": "LABEL=", "split": "data.split_column", "group": "data.group_column", "where": "data.where"}


def ingest(source: Source, config: DataConfig, store: ArtifactStore) -> RawDataset:
    """Store every source object once, by digest, and one Parquet table of all rows in source order.

    The table has `row_id`, `text`, `label` and, where configured, `split` and `group`: strings, empty cells null.
    `row_id` is a hash of text, label, and how often both were met before: rows that are added later change none.

    Raises:
        DataError: a column is not there, a file cannot be read, or the rows cannot be learned from: none, one, or
            one class only.
    """
    import pandas as pd

    objects: dict[str, ArtifactRef] = {}
    encodings: dict[str, str] = {}
    rows = _Rows()
    for item in source.objects:
        data = _read(item)
        objects[item.name] = store.put_bytes(data)
        columns = read_columns(item.name, data, config.encoding)
        if columns.encoding is not None:
            encodings[item.name] = columns.encoding
            if columns.encoding not in ("utf-8", "utf-8-sig"):
                logger.info("%s: read as %s; ENCODING= overrides this", item.name, columns.encoding)
        rows.add(_rows(item.name, columns, config))
    _check(source, rows, config)
    table = {"row_id": row_ids(rows.texts, rows.labels), "text": rows.texts, "label": rows.labels}
    if config.split_column is not None:
        table["split"] = rows.splits
    if config.group_column is not None:
        table["group"] = rows.groups
    frame = pd.DataFrame(table, dtype="str")
    logger.info("%s: %d rows from %d objects", source.description, len(frame), len(source.objects))
    return RawDataset(source=source.description, objects=objects, table=store.put_frame(frame), num_rows=len(frame), encodings=encodings)


def read_rows(source: str, store: ArtifactStore, *, text_column: str = "text", encoding: str | None = None) -> "pd.DataFrame":
    """All rows of a source for prediction: `text`, and every other column as it is, as strings; no label is needed.

    Raises:
        DataError: as `ingest` does, but for labels and the number of rows.
    """
    import pandas as pd

    config = DataConfig(source=source, text_column=text_column, encoding=encoding)
    frames = []
    for item in open_source(config, store).objects:
        columns = read_columns(item.name, _read(item), encoding)
        if columns.num_rows == 0:
            continue
        found = find_column(item.name, columns.cells, "text", text_column)
        cells = {
            ("text" if column == found else column): _as_written(item.name, column, values) for column, values in columns.cells.items()
        }
        frames.append(pd.DataFrame(cells, dtype="str"))
    if not frames:
        raise DataError(f"{source} holds no rows; add some or name another file")
    return pd.concat(frames, ignore_index=True)


def find_column(name: str, columns: Iterable[str], role: str, wanted: str) -> str:
    """The column that plays a role ("text", "label", "split", "group", "where").

    The name as configured; where that is the default and absent, the one column with a common name for the role.

    Raises:
        DataError: with the columns found and the nearest name.
    """
    columns = list(columns)
    if wanted in columns:
        return wanted
    guesses = []
    if wanted == role and role in COMMON_NAMES:
        guesses = [column for column in columns if column.lower() in COMMON_NAMES[role]]
        if len(guesses) == 1:
            logger.info("%s: no column %r; %r is taken for it (%s overrides this)", name, wanted, guesses[0], _OPTION[role])
            return guesses[0]
    close = guesses or difflib.get_close_matches(wanted.lower(), [column.lower() for column in columns], n=1, cutoff=0.5)
    nearest = next((column for column in columns if close and column.lower() == close[0].lower()), None)
    option = _OPTION[role]
    advice = f"say {option}{nearest or '<column>'}" if option.endswith("=") else f"set {option}" + (f" to {nearest}" if nearest else "")
    found = f"columns found: {', '.join(map(repr, columns))}" if columns else "the file has no columns"
    several = f", of which {', '.join(map(repr, guesses))} could be meant" if len(guesses) > 1 else ""
    raise DataError(f"{name} has no column {wanted!r}; {found}{several}; {advice}")


def row_ids(texts: Sequence[str | None], labels: Sequence[str | None]) -> list[str]:
    """One stable name a row: sha256 of its text, label and occurrence, 32 hex digits."""
    met: Counter[tuple[str | None, str | None]] = Counter()
    ids = []
    for pair in zip(texts, labels, strict=True):
        described = json.dumps([*pair, met[pair]]).encode()
        met[pair] += 1
        ids.append(hashlib.sha256(described).hexdigest()[:32])
    return ids


@dataclass
class _Rows:
    """What is kept of each row; all four lists are of one length."""

    texts: list[str | None] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    num_filtered: int = 0

    def add(self, other: "_Rows") -> None:
        self.texts += other.texts
        self.labels += other.labels
        self.splits += other.splits
        self.groups += other.groups
        self.num_filtered += other.num_filtered


def _rows(name: str, columns: Columns, config: DataConfig) -> _Rows:
    if columns.num_rows == 0:
        return _Rows()

    def cells(role: str, wanted: str) -> list[str | None]:
        column = find_column(name, columns.cells, role, wanted)
        return _texts(name, column, columns.cells[column])

    empty: list[str | None] = [None] * columns.num_rows
    found = find_column(name, columns.cells, "text", config.text_column)
    texts = _as_written(name, found, columns.cells[found])
    labels = cells("label", config.label_column)
    splits = cells("split", config.split_column) if config.split_column is not None else empty
    groups = cells("group", config.group_column) if config.group_column is not None else empty

    kept = [True] * columns.num_rows
    for column, values in config.where.items():
        wanted = {cell_text(value) for value in values}
        kept = [keep and cell in wanted for keep, cell in zip(kept, cells("where", column), strict=True)]
    names = {cell_text(value): label for value, label in config.label_names.items()}
    rows = [row for row in range(columns.num_rows) if kept[row]]
    return _Rows(
        texts=[texts[row] for row in rows],
        labels=[names.get(labels[row], labels[row]) for row in rows],
        splits=_splits(name, [splits[row] for row in rows], config),
        groups=[groups[row] for row in rows],
        num_filtered=columns.num_rows - len(rows),
    )


def _splits(name: str, splits: list[str | None], config: DataConfig) -> list[str | None]:
    if config.split_column is None:
        return splits
    if None in splits:
        raise DataError(
            f"{name}: column {config.split_column!r} is empty in {splits.count(None)} rows; fill it, or unset data.split_column"
        )
    try:
        return [split_name(str(split)) for split in splits]
    except DataError as error:
        raise DataError(f"{name}, column {config.split_column!r}: {error}") from error


def _as_written(name: str, column: str, cells: Sequence[object]) -> list[str | None]:
    """Strings keep their form (a review that says "1.0" or "True" is neither number nor boolean); blank ones are None."""
    return [(cell if cell.strip() else None) if isinstance(cell, str) else _text(name, column, row, cell) for row, cell in enumerate(cells)]


def _texts(name: str, column: str, cells: Sequence[object]) -> list[str | None]:
    return [_text(name, column, row, cell) for row, cell in enumerate(cells)]


def _text(name: str, column: str, row: int, cell: object) -> str | None:
    try:
        return cell_text(cell)
    except DataError as error:
        raise DataError(f"{name}, column {column!r}, row {row + 1}: {error}; name another column or write it as text") from error


def _read(item: SourceObject) -> bytes:
    data = item.read()
    if digest_bytes(data) != item.sha256:
        raise DataError(f"{item.name} changed while it was read; run again when it is no longer being written")
    return data


def _check(source: Source, rows: _Rows, config: DataConfig) -> None:
    where = source.description
    num_rows = len(rows.texts)
    if num_rows == 0:
        if rows.num_filtered:
            raise DataError(f"{where}: none of {rows.num_filtered} rows keeps data.where {config.where}; check its values")
        raise DataError(f"{where} holds no rows, only column names at most; add rows or name another file with DATA=")
    if num_rows == 1:
        raise DataError(f"{where} holds 1 row; a model needs at least two classes with ten or more rows each, so add rows")
    if not any(rows.texts):
        raise DataError(f"{where}: column {config.text_column!r} is empty in all {num_rows} rows; name the column with the text, TEXT=…")
    classes = sorted({label for label in rows.labels if label is not None})
    if len(classes) == 0:
        raise DataError(f"{where}: column {config.label_column!r} is empty in all {num_rows} rows; name the column with the class, LABEL=…")
    if len(classes) == 1:
        raise DataError(
            f"{where}: all rows are of one class, {classes[0]!r}; a classifier needs two. "
            "Add rows of another class, or name the column with the class, LABEL=…"
        )
