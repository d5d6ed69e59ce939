"""A flow without content, for `bench_event_to_run`: what is left is what it takes to start any flow at all."""

import time
from pathlib import Path
from typing import Any

from prefect import flow


@flow(name="benchmark-empty", persist_result=False)
def empty(request: dict[str, Any]) -> None:
    """Write down when the first line ran, in seconds since the epoch, to the file that the request names."""
    began = time.time()
    path = Path(request["write_to"])
    part = path.with_suffix(".part")
    part.write_text(repr(began), encoding="utf-8")
    part.rename(path)
