"""A service of ours that answers over HTTP, as a detached process: started or adopted, found again, stopped."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ml.settings import load_settings
from services.health import answers, runs_well
from services.processes import choose_port, reserved_port, start_process, stop_process, wait_until_healthy, write_atomically

START_TIMEOUT_SECONDS = 60
# Secrets that only the Prefect server needs; parts that take requests from others do not get them.
PREFECT_SERVER_ONLY = ("MILLSTREAM_PREFECT_DATABASE_URL",)


@dataclass(frozen=True)
class WebService:
    """`python -m <module> --host H --port P --log-file F` of a state folder.

    Args:
        port_setting: the field of Settings that fixes its port.
    """

    name: str
    module: str
    port_setting: str

    def start(self, state_dir: Path, environment: Mapping[str, str]) -> str:
        """Start the service, or adopt the one that runs with these settings, and wait until it answers. Returns its URL.

        Args:
            environment: settings of the process. One that runs with others is replaced.

        Raises:
            ServiceError: it does not start, with the end of its log; or its port is taken, with its holder.
        """
        port = reserved_port(self.name, getattr(load_settings(), self.port_setting), state_dir)
        command = [sys.executable, "-m", self.module, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--log-file", str(self.event_log_path(state_dir))]
        digest = hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest().encode()
        digest_path = state_dir / f"{self.name}.settings"

        same_settings = digest_path.is_file() and digest_path.read_bytes() == digest
        if not (same_settings and runs_well(self.name, command, lambda: self.is_healthy(state_dir), state_dir=state_dir)):
            self.stop(state_dir)
            write_atomically(digest_path, digest)
            start_process(self.name, command, state_dir=state_dir, env=environment, without=PREFECT_SERVER_ONLY)
            timeout = START_TIMEOUT_SECONDS
            wait_until_healthy(self.name, lambda: self.is_healthy(state_dir), state_dir=state_dir, timeout_seconds=timeout)
        return self.address(state_dir)

    def stop(self, state_dir: Path) -> None:
        """End it, requests under way first. Does nothing when there is none."""
        stop_process(self.name, state_dir)

    def address(self, state_dir: Path) -> str:
        """Where it listens, or will listen once it is started."""
        port = getattr(load_settings(), self.port_setting) or choose_port(self.name, state_dir)
        return f"http://127.0.0.1:{port}"

    def event_log_path(self, state_dir: Path) -> Path:
        """What it did, one JSON object a line; what it printed, such as a traceback, is in the log of its process."""
        return state_dir.resolve() / "logs" / f"{self.name}-events.log"

    def is_healthy(self, state_dir: Path) -> bool:
        """Whether it answers at /healthz. What it needs from others being away is no reason to restart it."""
        return answers(f"{self.address(state_dir)}/healthz")
