"""`millstream predict`: score a file of rows with the champion, in this process instead of row by row over HTTP."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cli.registry_commands import champion
from ml.errors import BadInputError
from ml.registry import Registry
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from services.local_stack import running_stack

if TYPE_CHECKING:
    import pandas as pd

BATCH_ROWS = 32
WRITERS = (".csv", ".parquet", ".jsonl")


def predict_rows(data: str, out: Path, name: str, text_column: str | None, encoding: str | None) -> None:
    """Write every row with `predicted_<field>` columns for each field of the reply.

    Raises:
        BadInputError: no such model, an output that cannot be written, or a source that cannot be read.
    """
    from rich.progress import track

    from ml.data.ingest import read_rows
    from ml.predictor import load_predictor

    if out.suffix not in WRITERS:
        raise BadInputError(f"{out}: the output ends in {out.suffix or 'nothing'}; write one of {', '.join(WRITERS)}")
    if not out.parent.is_dir():
        raise BadInputError(f"{out}: the folder {out.parent} does not exist; create it or name another file")
    with running_stack(load_settings().state_dir), tempfile.TemporaryDirectory() as folder:
        store = open_artifact_store()
        version = champion(Registry(store), name)
        rows = read_rows(data, store, text_column=text_column or "text", encoding=encoding)
        predictor = load_predictor(store.get_folder(version.bundle, Path(folder)))
        empty = rows["text"].fillna("").str.strip() == ""
        asked = [{"text": text} for text in rows.loc[~empty, "text"]]
        batches = list(_batches(asked))
        replies = [reply for batch in track(batches, description=f"{name} {version.version}") for reply in predictor.predict(batch)]
    scored = rows.join(_columns(replies, rows.index[~empty]))
    _write(scored, out)
    print(f"millstream: {len(replies)} rows scored by {name} {version.version}, {int(empty.sum())} without text left empty: {out}")


def _batches(requests: list[dict]) -> Iterator[list[dict]]:
    for first in range(0, len(requests), BATCH_ROWS):
        yield requests[first : first + BATCH_ROWS]


def _columns(replies: list[dict], index: "pd.Index") -> "pd.DataFrame":
    """One column per field; a field that is itself an object becomes one column per key."""
    import pandas as pd

    flat = []
    for reply in replies:
        row = {}
        for field, value in reply.items():
            if isinstance(value, dict):
                row |= {f"predicted_{field}_{key}": item for key, item in value.items()}
            else:
                row[f"predicted_{field}"] = value
        flat.append(row)
    return pd.DataFrame(flat, index=index)


def _write(frame: "pd.DataFrame", out: Path) -> None:
    part = out.with_name(f".{out.name}.part")
    if out.suffix == ".csv":
        frame.to_csv(part, index=False)
    elif out.suffix == ".parquet":
        frame.to_parquet(part, index=False)
    else:
        frame.to_json(part, orient="records", lines=True, force_ascii=False)
    part.replace(out)
