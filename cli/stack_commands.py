"""`millstream up | down | status | logs | clean`."""

import shutil
import subprocess

import typer

from ml.settings import load_settings
from services.local_stack import LocalStack
from services.supervisor.merged_log import MERGED_NAME


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
    row = "{:<15} {:<12} {:<32} {:>8}  {}"
    print(row.format("part", "health", "address", "pid", "since (UTC)"))
    for part in parts:
        not_there = "not running" if part.managed and part.pid is None else "unhealthy"
        since = part.since.removesuffix("+00:00").replace("T", " ") if part.since else ""
        print(row.format(part.part, "healthy" if part.healthy else not_there, part.url or "", part.pid or "", since))
    return 0 if all(part.healthy for part in parts) else 1


def show_logs(lines: int, follow: bool) -> None:
    """Print the end of the merged log, or of each part's own when there is none; then, if wanted, what comes."""
    folder = load_settings().state_dir / "logs"
    merged = folder / f"{MERGED_NAME}.log"
    paths = [merged] if merged.exists() else sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    if not paths:
        print(f"millstream: no logs in {folder}; `make up` starts the stack")
    for path in paths:
        print(f"==> {path} <==")
        print("\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]), flush=True)
    if follow and merged.exists():
        subprocess.run(["tail", "-n", "0", "-F", str(merged)], check=False)


def remove_state(ask: bool) -> None:
    folder = load_settings().state_dir
    if ask:
        typer.confirm(f"Stop everything and delete {folder} with all stored data and models?", abort=True)
    if folder.exists():
        LocalStack(folder).down()
        shutil.rmtree(folder)
    print(f"millstream: removed {folder}")
