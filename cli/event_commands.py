"""`millstream retrain` and `millstream events`: ask the event bridge for a run, and see what it made of what happened."""

import getpass

import httpx

from ml.errors import ServiceError
from ml.event_client import send_event
from ml.events import Event
from ml.settings import Settings, load_settings
from services.event_bridge.launcher import NAME, bridge_token, event_bridge_address
from services.processes import read_process


def ask_for_run(name: str, why: str) -> None:
    """Ask for a training run of a model; it waits for one that is under way, for nothing else."""
    event = Event(kind="retrain.asked", name=name, source=f"user {getpass.getuser()}", summary=why)
    send_event(event, _settings_with_bridge())
    print(f"millstream: asked for a run of {name} (event {event.id}); `millstream events {name}` tells what becomes of it")


def show_events(name: str | None, limit: int) -> None:
    """Print the latest events and what became of each, newest first."""
    settings = _settings_with_bridge()
    query = {"limit": limit} | ({"name": name} if name else {})
    assert settings.bridge_token is not None  # noqa: S101 - see _settings_with_bridge
    headers = {"Authorization": f"Bearer {settings.bridge_token.get_secret_value()}"}
    try:
        answer = httpx.get(f"{settings.bridge_url}/v1/events", params=query, headers=headers, timeout=10, trust_env=False)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(f"the event bridge at {settings.bridge_url} did not answer ({error}); look at `make status`") from error
    row = "{:<20} {:<16} {:<15} {:<18} {}"
    print(row.format("received (UTC)", "model", "event", "status", "why"))
    for event in answer.json()["events"]:
        received = event["received"][:19].replace("T", " ")
        print(row.format(received, event["name"], event["kind"], event["status"], event["why"]))


def _settings_with_bridge() -> Settings:
    """The settings of this process; without a bridge in them, with that of the local stack.

    Raises:
        ServiceError: the local stack is not up.
    """
    settings = load_settings()
    if settings.bridge_url is not None:
        return settings
    if read_process(NAME, settings.state_dir) is None:
        raise ServiceError("no event bridge runs here; start the stack with `make up`, or set MILLSTREAM_BRIDGE_URL and _BRIDGE_TOKEN")
    url, token = event_bridge_address(settings.state_dir), bridge_token(settings.state_dir)
    return Settings.model_validate({**settings.model_dump(), "bridge_url": url, "bridge_token": token})
