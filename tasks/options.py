"""How every task runs: what is tried again, how a failure says where it happened, and why Prefect keeps no results of its own."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

R = TypeVar("R")

_NOTE = "in the stage "


def stage_task(task_run_name: str | None = None) -> Callable[[Callable[..., R]], "Task[..., R]"]:
    """A Prefect task that is tried again only after errors that may pass (`MillstreamError.retryable`).

    The one cache is the stage record in object storage (ml.stages): Prefect's own, which would pickle results, is off.
    """

    def decorate(function: Callable[..., R]) -> "Task[..., R]":
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if failed_stage(error) is None:
                    error.add_note(_NOTE + function.__name__)
                raise

        wrap = task(
            task_run_name=task_run_name or function.__name__,
            retries=2,
            retry_delay_seconds=[2, 10],
            retry_condition_fn=_is_retryable,
            cache_policy=NO_CACHE,
            persist_result=False,
        )
        return wrap(run)

    return decorate


def artifact_key(name: str, what: str) -> str:
    """Key of a Prefect artifact about a model: lower case letters, digits and dashes only."""
    return f"{name.replace('_', '-')}-{what}"


def failed_stage(error: BaseException) -> str | None:
    """The stage in which an error was raised, if it was raised in one."""
    notes = getattr(error, "__notes__", [])
    return next((note.removeprefix(_NOTE) for note in notes if note.startswith(_NOTE)), None)


def _is_retryable(task: Any, task_run: Any, state: Any) -> bool:
    return bool(getattr(state.result(raise_on_failure=False), "retryable", False))
