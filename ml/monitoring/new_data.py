"""Data that was put under the model's prefix after its training began."""

import logging
import random
from dataclasses import dataclass
from datetime import datetime

from ml.data.ingest import find_column, read_rows
from ml.data.sources import is_readable
from ml.data.values import cell_text
from ml.errors import DataError
from ml.monitoring.drift import distinct
from ml.monitoring.records import cut_text
from ml.monitoring.reference import Reference
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class NewData:
    """Distinct texts, their labels where there are any, and what could not be read, in words."""

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_new_data(store: ArtifactStore, reference: Reference, since: datetime, until: datetime, *, max_rows: int, seed: int = 0) -> NewData:
    """The objects put within [since, until), newest first up to MAX_BYTES; an object that cannot be read is noted, not an error."""
    listed = store.objects.list(store.datasets_bucket, keys.dataset_prefix(reference.version.name))
    infos = [info for info in listed if since <= info.modified < until and is_readable(info.key.rpartition("/")[2])]
    texts: list[str] = []
    labels: list[str | None] = []
    notes: list[str] = []
    num_bytes = 0
    for info in sorted(infos, key=lambda info: info.modified, reverse=True):
        num_bytes += info.size_bytes
        address = f"s3://{info.bucket}/{info.key}"
        if num_bytes > MAX_BYTES:
            notes.append(f"{address} and older objects were not compared: more than {MAX_BYTES // 2**20} MiB")
            break
        try:
            found_texts, found_labels = _read_object(store, address, reference)
        except DataError as error:
            notes.append(f"new data was not compared: {error}")
            continue
        texts += found_texts
        labels += found_labels
    kept = _sample(distinct(texts), max_rows, seed)
    return NewData(
        texts=tuple(texts[row] for row in kept),
        labels=tuple(label for row in kept if (label := labels[row]) is not None),
        notes=tuple(notes),
    )


def _read_object(store: ArtifactStore, address: str, reference: Reference) -> tuple[list[str], list[str | None]]:
    config = reference.data
    frame = read_rows(address, store, text_column=config.text_column, encoding=config.encoding)
    kept = frame["text"].notna()
    for column, values in config.where.items():
        kept &= frame[find_column(address, frame.columns, "where", column)].isin(values)
    frame = frame.loc[kept]
    texts = [cut_text(text) for text in frame["text"]]
    try:
        column = find_column(address, frame.columns, "label", config.label_column)
    except DataError as error:
        logger.info("%s: classes are not compared: %s", address, error)
        return texts, [None] * len(texts)
    names = {cell_text(value): label for value, label in config.label_names.items()}
    cells = [cell_text(cell) for cell in frame[column]]
    return texts, [names.get(cell, cell) if cell is not None else None for cell in cells]


def _sample(positions: list[int], num_rows: int, seed: int) -> list[int]:
    return positions if len(positions) <= num_rows else random.Random(seed).sample(positions, num_rows)
