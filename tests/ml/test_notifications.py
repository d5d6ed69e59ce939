"""Messages reach a real HTTP server and a real SMTP server; what fails is logged, and no secret is."""

import logging
import socketserver
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr

from ml.config import RunRequest, resolve_config
from ml.errors import DataError
from ml.notifications import notify, notify_of_run
from ml.outcome import Addresses, RunRecords, build_outcome
from ml.settings import Settings
from tests.ml.message_hook import Hook


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.server.shutdown()


@pytest.fixture
def refusing() -> Iterator[Hook]:
    hook = Hook(status=500)
    yield hook
    hook.server.shutdown()


class MailHandler(socketserver.StreamRequestHandler):
    """As much of SMTP as a client needs to hand in one mail."""

    def handle(self) -> None:
        self.wfile.write(b"220 test\r\n")
        while line := self.rfile.readline():
            command = line.strip().upper()
            if command == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                mail = []
                while (part := self.rfile.readline()) != b".\r\n":
                    mail.append(part)
                self.server.mails.append(b"".join(mail).decode())  # type: ignore[attr-defined]
            elif command == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            self.wfile.write(b"250 well\r\n")


def settings(*addresses: str) -> Settings:
    return Settings(notify_urls=SecretStr("  ".join(addresses)) if addresses else None)


def test_without_an_address_nothing_happens():
    assert notify("title", "body", settings()) == 0


def test_a_message_reaches_every_address(hook: Hook):
    assert notify("reviews: failed", "the reason\nmore", settings(hook.address, hook.address + "?x=1")) == 2
    path, message = hook.received[0]
    assert path.startswith("/hidden-path")
    assert (message["title"], message["message"]) == ("reviews: failed", "the reason\nmore")
    assert len(hook.received) == 2


def test_a_message_reaches_a_mail_server():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), MailHandler) as server:
        server.mails = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        sent = notify(
            "reviews: drift", "the inputs changed", settings(f"mailto://127.0.0.1:{port}?from=a@example.com&to=b@example.com&mode=insecure")
        )
        server.shutdown()
    assert sent == 1
    [mail] = server.mails  # type: ignore[attr-defined]
    assert "Subject: reviews: drift" in mail and "To: b@example.com" in mail and "the inputs changed" in mail


def test_what_fails_is_logged_without_a_secret_and_the_others_are_told(hook: Hook, refusing: Hook, caplog: pytest.LogCaptureFixture):
    unreachable = "json://user:very-secret@127.0.0.1:1/hidden-path"
    rubbish = [
        "very-secret",
        "nosuch://very-secret@hidden-path",
        "json://",
        "mailto://very-secret:hidden-path",
        "slack://very-secret/hidden-path",
    ]
    with caplog.at_level(logging.DEBUG):
        sent = notify("title", "body", settings(*rubbish, unreachable, refusing.address, hook.address))
    assert sent == 1
    assert len(hook.received) == len(refusing.received) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 7
    assert "address 6 of 8 in MILLSTREAM_NOTIFY_URLS (json) was not taken" in warnings[5]
    assert "(no scheme) is no Apprise URL" in warnings[0]
    assert "very-secret" not in caplog.text and "hidden-path" not in caplog.text


def test_a_failed_run_is_told_with_its_reason_and_report(hook: Hook):
    config = resolve_config(RunRequest(name="reviews"))
    addresses = Addresses(report_path="/state/runs/1/report.html", flow_run_url="http://127.0.0.1:1/runs/flow-run/1")
    now = datetime.now(UTC)
    error = DataError("reviews.csv has no column 'text'")
    assert notify_of_run(build_outcome("run-1", config, RunRecords(addresses=addresses), now, now, error), settings(hook.address)) == 1
    _, message = hook.received[0]
    assert message["title"] == "reviews: failed"
    lines = message["message"].splitlines()
    assert lines[0] == "reviews.csv has no column 'text'"
    assert lines[2:] == ["Report: /state/runs/1/report.html", "Run page: http://127.0.0.1:1/runs/flow-run/1"]


def test_a_run_that_ends_well_is_not_told(hook: Hook):
    now = datetime.now(UTC)
    outcome = build_outcome("run-1", resolve_config(RunRequest()), RunRecords(), now, now)
    for status in ("deployed", "deployed_uncompressed", "unchanged"):
        assert notify_of_run(outcome.model_copy(update={"status": status}), settings(hook.address)) == 0
    assert notify_of_run(outcome.model_copy(update={"status": "rejected", "reasons": ()}), settings(hook.address)) == 1
    assert [message["title"] for _, message in hook.received] == ["sentiment: rejected"]
