"""Starts and stops the event bridge as a detached process of the local stack, and keeps its secret."""

import base64
import secrets
from collections.abc import Mapping
from pathlib import Path

from services.event_bridge.authentication import SECRET_PREFIX
from services.processes import service_lock, write_atomically
from services.web_service import WebService

_SERVICE = WebService("event-bridge", "services.event_bridge", "bridge_port")

NAME = _SERVICE.name
stop_event_bridge = _SERVICE.stop
event_bridge_address = _SERVICE.address
event_log_path = _SERVICE.event_log_path
is_healthy = _SERVICE.is_healthy


def start_event_bridge(state_dir: Path, environment: Mapping[str, str]) -> str:
    """Start it, or adopt the one that runs with these settings; see `WebService.start`. Returns its URL.

    Args:
        environment: `MILLSTREAM_*` settings of the process, and PREFECT_API_URL. The token is added.
    """
    return _SERVICE.start(state_dir, {**environment, "MILLSTREAM_BRIDGE_TOKEN": bridge_token(state_dir)})


def bridge_token(state_dir: Path) -> str:
    """The secret of this folder's bridge, made once and readable by its owner only.

    In the form that libraries of Standard Webhooks take: `whsec_` and the key in base64.
    """
    path = state_dir / NAME / "token"
    with service_lock(f"{NAME}.token", state_dir):
        if not path.exists():
            write_atomically(path, (SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()).encode())
        return path.read_text(encoding="utf-8")
