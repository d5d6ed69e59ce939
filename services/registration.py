"""`python -m services.registration`: makes the Prefect server know what Millstream runs. May be repeated at any time.

The work pool, every deployment of prefect.yaml, and the automation that notices a flow run whose host is gone.
"""

import os
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from ml.errors import ServiceError
from ml.settings import REPOSITORY_ROOT, load_settings
from services.worker import WORK_POOL

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

CRASH_SILENT_RUNS = "crash silent flow runs"
# Prefect beats every 30 s at the least; four missed beats are no hiccup of a busy machine.
SILENCE_SECONDS = 120


def register() -> None:
    """Register everything with the server at PREFECT_API_URL.

    Raises:
        ServiceError: the server refused something; with what it said.
    """
    load_settings()
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _register_work_pool(client)
        _register_crash_automation(client)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, cwd=REPOSITORY_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        file = REPOSITORY_ROOT / "prefect.yaml"
        raise ServiceError(f"the deployments of {file} were not registered:\n{done.stdout}{done.stderr}")


def _register_work_pool(client: "SyncPrefectClient") -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    try:
        client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template))
    else:
        client.update_work_pool(WORK_POOL, WorkPoolUpdate(base_job_template=template))


def _register_crash_automation(client: "SyncPrefectClient") -> None:
    """A flow run that beat once and is silent since: its host is gone. For what runs here the watchdog is quicker."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    ended = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "AwaitingRetry")
    message = f"no sign of life from its process for {SILENCE_SECONDS} s"
    crash = ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=True)
    automation = AutomationCore(
        name=CRASH_SILENT_RUNS,
        description="Reports a flow run as crashed, and frees its slot, when its host no longer sends a sign of life.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ended)},
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=SILENCE_SECONDS),
        ),
        actions=[crash],
    )
    known = client.read_automations_by_name(CRASH_SILENT_RUNS)
    for superfluous in known[1:]:
        client.delete_automation(superfluous.id)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)


def main() -> None:
    register()
    print(f"registered with {os.environ.get('PREFECT_API_URL')}")


if __name__ == "__main__":
    main()
