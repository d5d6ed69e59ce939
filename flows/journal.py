"""Keeps what a run has produced so far, so that every run ends with an outcome and a report, also one that fails."""

import contextlib
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

from ml.artifacts import Record
from ml.config import RunRequest
from ml.errors import WriteConflictError
from ml.leases import run_lease
from ml.notifications import notify, notify_of_run
from ml.outcome import PipelineOutcome, RunRecords, StageTiming
from ml.runs import Run, start_run
from ml.settings import load_settings
from ml.stages import StageResult
from ml.storage.connect import open_artifact_store
from tasks.cause import with_cause
from tasks.options import failed_stage
from tasks.reporting import publish_outcome

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


class Journal:
    """`with Journal(request) as journal:` around a run. An error inside is written down as the outcome, then raised on."""

    run: Run

    def __init__(self, request: RunRequest):
        self.request = request
        self.records = RunRecords()
        self._until_the_end = contextlib.ExitStack()

    def __enter__(self) -> "Journal":
        store = open_artifact_store()
        self.run = start_run(store, with_cause(self.request))
        # Nothing that the run finds in the store is deleted while it holds its lease.
        self._lease = self._until_the_end.enter_context(run_lease(store, self.run.run_id))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._until_the_end:
            if error is not None:
                self._close_with(error)

    def _close_with(self, error: BaseException) -> None:
        stage = failed_stage(error)
        try:
            try:
                self._lease.check()
                self.records = self.records.model_copy(update={"current_stage": stage})
            except WriteConflictError:
                # What the records name may be deleted by now: no manifest shall name it.
                self.records = RunRecords(current_stage=stage)
            notify_of_run(publish_outcome(self.run, self.records, error), load_settings())
        except Exception:
            # The store may be what failed: the first error is the one that people must see.
            logger.exception("the outcome of run %s could not be written", self.run.run_id)
            notify(f"{self.run.config.name}: failed", f"{error}\nRun {self.run.run_id}; its outcome could not be written", load_settings())

    def keep(self, field: str | None, result: StageResult[R]) -> R:
        """Note a finished stage, under a field of RunRecords if one is given, and return its record."""
        timing = StageTiming(stage=result.label, key=result.key, reused=result.reused, seconds=result.seconds)
        self.note(stages=(*self.records.stages, timing))
        if field is not None:
            self.note(**{field: result.record})
        return result.record

    def keep_all(self, field: str, results: Sequence[StageResult[R]]) -> tuple[R, ...]:
        """Note several results of one stage as one field of RunRecords."""
        found = tuple(self.keep(None, result) for result in results)
        self.note(**{field: found})
        return found

    def note(self, **fields: Any) -> None:
        self._lease.check()
        self.records = self.records.model_copy(update=fields)

    def close(self) -> PipelineOutcome:
        """The run has come to its end: write outcome and report, and tell people when it did not end well."""
        self._lease.check()
        outcome = publish_outcome(self.run, self.records, None)
        notify_of_run(outcome, load_settings())
        return outcome
