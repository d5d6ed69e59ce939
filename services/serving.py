"""The foreground of a service of ours: its arguments, its log, and its HTTP server, until SIGTERM or Ctrl-C."""

import argparse
import os
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from services.event_log import configure_logging, log_event


def parse_arguments(module: str, description: str | None, host_help: str) -> argparse.Namespace:
    """`--host`, `--port` and `--log-file`, as `services.web_service` gives them; the log is configured by them."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--host", default="127.0.0.1", help=host_help)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log-file", type=Path, help="write the log there, with old files kept to a limit, and not to standard output")
    arguments = parser.parse_args()
    configure_logging(arguments.log_file)
    return arguments


def serve(app: FastAPI, arguments: argparse.Namespace, grace_seconds: int) -> None:
    """
    Args:
        grace_seconds: for requests under way at the end; below the ten seconds after which a process that was asked to end is killed.
    """
    log_event("starting", host=arguments.host, port=arguments.port, pid=os.getpid())
    # Server errors still reach the log; each request has its own line already.
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace_seconds,
    )
