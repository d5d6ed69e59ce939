"""`millstream up | down | status | logs | clean`."""

import shutil

import typer
from rich.console import Console
from rich.table import Table

from ml.settings import load_settings
from services.local_stack import LocalStack


def start_stack() -> None:
    LocalStack(load_settings().state_dir).up()
    show_status()


def stop_stack() -> None:
    folder = load_settings().state_dir
    LocalStack(folder).down()
    print(f"millstream: everything is stopped; the state stays in {folder}")


def show_status() -> int:
    """Print one line per part; returns 1 when a part is not healthy."""
    parts = LocalStack(load_settings().state_dir).status()
    table = Table("part", "health", "address", "pid", "since")
    for part in parts:
        not_there = "not running" if part.managed and part.pid is None else "unhealthy"
        health = "healthy" if part.healthy else not_there
        table.add_row(part.part, health, part.url or "", str(part.pid or ""), part.since or "")
    Console().print(table)
    return 0 if all(part.healthy for part in parts) else 1


def show_logs(lines: int) -> None:
    folder = load_settings().state_dir / "logs"
    paths = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    if not paths:
        print(f"millstream: no logs in {folder}; `make up` starts the stack")
    for path in paths:
        print(f"==> {path} <==")
        print("\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]))


def remove_state(ask: bool) -> None:
    folder = load_settings().state_dir
    if ask:
        typer.confirm(f"Stop everything and delete {folder} with all stored data and models?", abort=True)
    if folder.exists():
        LocalStack(folder).down()
        shutil.rmtree(folder)
    print(f"millstream: removed {folder}")
