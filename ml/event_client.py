"""Sends an event to the event bridge, from whoever finds that something happened to a model."""

import httpx

from ml.errors import BadInputError, ConfigError, ServiceError
from ml.events import Event
from ml.settings import Settings

TIMEOUT_SECONDS = 10


class BridgeUnavailableError(ServiceError):
    """The event bridge did not answer, or answered that it is failing; the event may be sent again, it counts once."""

    retryable = True


def send_event(event: Event, settings: Settings) -> None:
    """Hand one event to the bridge; when this returns, the bridge has it on disk. One that it already has is no error.

    Args:
        settings: `bridge_url` and `bridge_token`.

    Raises:
        ConfigError: no bridge is known here, or its token is another one.
        BridgeUnavailableError: it does not answer, or answers 5xx; retryable.
        BadInputError: it refused the event, such as one of a model that no deployment trains.
    """
    if settings.bridge_url is None or settings.bridge_token is None:
        raise ConfigError("no event bridge is known here; start the stack with `make up`, or set MILLSTREAM_BRIDGE_URL and _BRIDGE_TOKEN")
    url = settings.bridge_url.rstrip("/") + "/v1/events"
    headers = {"Authorization": f"Bearer {settings.bridge_token.get_secret_value()}", "Content-Type": "application/json"}
    try:
        # trust_env off: a proxy that the environment names has nothing to do with it.
        response = httpx.post(url, content=event.model_dump_json(), headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        raise BridgeUnavailableError(f"{url}: no answer ({error!r}); check that the event bridge runs (`make status`)") from error
    if response.status_code in (202, 409):
        return
    said = f"{url}: {event.kind} of {event.name} was answered with {response.status_code}: {_detail(response)}"
    if response.status_code >= 500 or response.status_code in (408, 429):
        raise BridgeUnavailableError(f"{said}; send it again later")
    if response.status_code == 401:
        raise ConfigError(f"{said}. Check MILLSTREAM_BRIDGE_TOKEN")
    raise BadInputError(said)


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:300]
