"""Opens a page in headless Chromium through its debugging protocol, and says what the page is like."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect
from websockets.sync.connection import Connection

START_SECONDS = 30
ANSWER_SECONDS = 30


@dataclass(frozen=True)
class Visit:
    """What opening the page did.

    Args:
        requests: every URL that was asked for, the page itself included.
        messages: what the page wrote to the console, refused content included.
    """

    facts: dict[str, Any]
    requests: list[str]
    messages: list[str]


class Chromium:
    """One browser with one tab."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._last_id = 0
        self._events: list[dict] = []

    def visit(self, page: Path, *, width: int, dark: bool, facts: dict[str, str]) -> Visit:
        """Open a page at a width in CSS pixels and evaluate JavaScript expressions in it."""
        self._events.clear()
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=page.as_uri())
        self._wait_for("Page.loadEventFired")
        found = {}
        for name, expression in facts.items():
            answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
            assert "exceptionDetails" not in answer, answer
            found[name] = answer["result"].get("value")
        requests = [event["params"]["request"]["url"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        messages = [event["params"]["entry"]["text"] for event in self._events if event["method"] == "Log.entryAdded"]
        return Visit(found, requests, messages)

    def _call(self, method: str, **parameters: Any) -> dict:
        self._last_id += 1
        self._connection.send(json.dumps({"id": self._last_id, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == self._last_id:
                assert "error" not in message, (method, message)
                return message["result"]

    def _wait_for(self, event: str) -> None:
        while not any(seen["method"] == event for seen in self._events):
            self._receive()

    def _receive(self) -> dict:
        message = json.loads(self._connection.recv(timeout=ANSWER_SECONDS))
        if "method" in message:
            self._events.append(message)
        return message


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def open_chromium(executable: str) -> Iterator[Chromium]:
    """A browser with a profile of its own, ended with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            executable,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + START_SECONDS
            while not (port_file.is_file() and port_file.read_text()):
                assert process.poll() is None, f"{executable} ended with {process.returncode}"
                assert time.monotonic() < deadline, f"{executable} opened no debugging port in {START_SECONDS} s"
                time.sleep(0.1)
            port = port_file.read_text().splitlines()[0]
            tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            with connect(address, max_size=None, proxy=None) as connection:
                yield Chromium(connection)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
