"""`python -m services.supervisor`: keeps the stack of `make up` alive.

Restarts parts that died or hang, makes the states of flow runs true (watchdog.py), and writes one readable log
(merged_log.py). It ends when the stack is no longer to stay up. The event bridge looks after the supervisor in turn.
"""

import signal
import threading
import time

import httpx

from ml.errors import MillstreamError
from ml.settings import load_settings
from services import worker
from services.local_stack import PARTS, LocalStack
from services.processes import read_process, stop_process
from services.supervisor.launcher import NAME
from services.supervisor.merged_log import MergedLog
from services.supervisor.watchdog import Watchdog

POLL_SECONDS = 1.0
HEALTH_SECONDS = 10.0
# A part that is alive but does not answer: a machine that trains on all of its cores answers late.
HANG_SECONDS = 60.0
MAX_BACKOFF_SECONDS = 60.0


class Supervisor:
    """One state folder's stack, looked after until `stop` is set."""

    def __init__(self, stack: LocalStack, stop: threading.Event):
        self._stack = stack
        self._stop = stop
        self._log = MergedLog(stack.state_dir / "logs")
        self._watchdog = Watchdog(stack.state_dir, stack.prefect_api_url)
        self._server_answers = True
        self._last_well = dict.fromkeys(PARTS, time.monotonic())
        self._last_health_check = time.monotonic()
        self._num_heals = 0
        self._heal_again_at = 0.0

    def run(self) -> None:
        """Look after everything once a second."""
        self._say("looks after " + ", ".join(self._stack.own_parts))
        while not self._stop.is_set() and self._stack.stays_up:
            self._log.collect()
            self._watch_flow_runs()
            self._end_hung_parts()
            self._heal()
            self._stop.wait(POLL_SECONDS)
        self._log.collect()

    def _watch_flow_runs(self) -> None:
        try:
            for text in self._watchdog.check():
                self._say(text)
            self._server_answers = True
        except (httpx.HTTPError, MillstreamError) as error:
            if self._server_answers:
                self._say(f"flow runs cannot be watched while the Prefect server does not answer: {error}")
            self._server_answers = False

    def _end_hung_parts(self) -> None:
        """End what is alive and has not answered for long; `_heal` then starts it anew."""
        if time.monotonic() - self._last_health_check < HEALTH_SECONDS:
            return
        for name in self._stack.own_parts:
            # Without the server nobody can say whether the worker is well.
            unknown = name == worker.NAME and not self._server_answers
            if unknown or read_process(name, self._stack.state_dir) is None or PARTS[name].is_healthy(self._stack.state_dir):
                self._last_well[name] = time.monotonic()
            elif time.monotonic() - self._last_well[name] > HANG_SECONDS:
                self._say(f"{name} has not answered for {HANG_SECONDS:.0f} s: it is ended and started anew")
                stop_process(name, self._stack.state_dir)
        self._last_health_check = time.monotonic()

    def _heal(self) -> None:
        dead = [name for name in self._stack.own_parts if read_process(name, self._stack.state_dir) is None]
        if not dead or time.monotonic() < self._heal_again_at:
            return
        started = time.monotonic()
        self._say(f"{' and '.join(dead)} died: starting again")
        try:
            self._stack.heal()
            self._say(f"{' and '.join(dead)} runs again, {time.monotonic() - started:.1f} s later")
        except MillstreamError as error:
            self._say(f"{' and '.join(dead)} could not be started: {error}")
        # What dies again and again is started less and less often.
        recently = started - self._heal_again_at < MAX_BACKOFF_SECONDS
        self._num_heals = self._num_heals + 1 if recently else 1
        self._heal_again_at = time.monotonic() + min(MAX_BACKOFF_SECONDS, 0.5 * 2**self._num_heals)
        self._last_well = dict.fromkeys(PARTS, time.monotonic())

    def _say(self, text: str) -> None:
        self._log.write(NAME, text)


def main() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Supervisor(LocalStack(load_settings().state_dir), stop).run()


if __name__ == "__main__":
    main()
