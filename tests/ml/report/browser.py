"""Opens a page in headless Chromium through its debugging protocol, uses it, and says what the page is like."""

import base64
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
        self.open(page.as_uri(), width=width, dark=dark)
        return Visit({name: self.evaluate(expression) for name, expression in facts.items()}, self.requests, self.messages)

    def open(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Open a page, and forget what was asked for and said before."""
        self._events.clear()
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=url)
        self._wait_for("Page.loadEventFired")

    @property
    def requests(self) -> list[str]:
        """Every URL that was asked for since `open`, the page itself and web sockets included, in order."""
        self.evaluate("0")  # takes in what has come since
        asked = {
            "Network.requestWillBeSent": lambda parameters: parameters["request"]["url"],
            "Network.webSocketCreated": lambda parameters: parameters["url"],
        }
        return [asked[event["method"]](event["params"]) for event in self._events if event["method"] in asked]

    @property
    def messages(self) -> list[str]:
        """What the browser wrote to the console since `open`, refused content included."""
        return [event["params"]["entry"]["text"] for event in self._events if event["method"] == "Log.entryAdded"]

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; of a promise, what it comes to."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer)
        return answer["result"].get("value")

    def wait_until(self, expression: str, timeout_seconds: float = ANSWER_SECONDS) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + timeout_seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"not within {timeout_seconds:g} s: {expression}\n{self.text[-3000:]}"
            time.sleep(0.1)
        return value

    @property
    def text(self) -> str:
        """The page as it is read."""
        return self.evaluate("document.body.innerText")

    def click(self, element: str) -> None:
        """Click in the middle of the element that a JavaScript expression finds, waiting until it is there."""
        self.wait_until(f"!!({element})")
        self.evaluate(f"({element}).scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(({element}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type_into(self, element: str, text: str) -> None:
        """Replace what stands in an input field, as a person would: click, select all, type."""
        self.click(element)
        select_all = {"key": "a", "code": "KeyA", "windowsVirtualKeyCode": 65, "modifiers": 2, "commands": ["selectAll"]}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **select_all)
        self._call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key that has a name, such as Enter (13)."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, file: Path) -> None:
        """What is to be seen now, as PNG."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

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
            "--hide-scrollbars",
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
            # No pings: nobody answers the browser between two calls.
            with connect(address, max_size=None, proxy=None, ping_interval=None) as connection:
                yield Chromium(connection)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
