"""`python -m services.flow_process`: one flow run, in a process that outlives the worker which started it.

It leads a session of its own and writes to a log of its own, not into the worker's pipe, which breaks with the worker.
It is remembered with its pid and start time, so that the watchdog knows for certain whether a run that is said to be
running still has a process, and can end it with everything it started.
"""

import gc
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml.settings import REPOSITORY_ROOT, load_settings
from services.processes import forget_process, log_path, remember_process

RECORD_PREFIX = "flow-run."
LOG_NAME = "flow-runs"
OUR_LOGGERS = ("ml", "solutions", "flows", "tasks", "services")


def configure_logging() -> None:
    """Our own log lines reach the terminal and the Prefect UI. Must run before Prefect is imported."""
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", ",".join(OUR_LOGGERS))
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def record_name(flow_run_id: object) -> str:
    return f"{RECORD_PREFIX}{flow_run_id}"


@contextmanager
def remembered_flow_run(state_dir: Path) -> Iterator[Callable[..., None]]:
    """For a flow that runs in this very process: a hook to be called when it begins; forgotten again at the end."""
    names = []

    def remember(_flow: object, flow_run: Any, _state: object) -> None:
        names.append(record_name(flow_run.id))
        remember_process(names[-1], os.getpid(), state_dir)

    try:
        yield remember
    finally:
        for name in names:
            forget_process(name, state_dir)


def main() -> None:
    if os.getpgrp() != os.getpid():
        os.setsid()
    os.chdir(REPOSITORY_ROOT)  # where relative paths of `make run` start, too
    state_dir = load_settings().state_dir
    _write_to(log_path(LOG_NAME, state_dir))
    remember_process(record_name(os.environ["PREFECT__FLOW_RUN_ID"]), os.getpid(), state_dir)
    configure_logging()
    gc.set_threshold(100_000, 50, 50)  # imports make many objects and hardly any garbage: a tenth of the start
    sys.argv = sys.argv[:1]
    runpy.run_module("prefect.engine", run_name="__main__")


def _write_to(path: Path) -> None:
    """Standard output and error go to the end of a file, those of every process that this one starts, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


if __name__ == "__main__":
    main()
