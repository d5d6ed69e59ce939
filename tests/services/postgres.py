"""A real PostgreSQL server of the system's packages, in a folder of its own on a free loopback port."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

USER = "prefect"


def find_binaries() -> Path | None:
    """The folder with initdb and postgres of the newest installed version; Debian has it outside of PATH."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    found = [folder for folder in folders if (folder / "initdb").is_file() and (folder / "postgres").is_file()]
    return max(found, key=lambda folder: folder.parent.name, default=None)


class Postgres:
    """
    Attributes:
        port: of 127.0.0.1.
        password: of the user `prefect`, who owns the server.
    """

    def __init__(self, binaries: Path, folder: Path):
        self._binaries = binaries
        self._folder = folder
        self.password = secrets.token_hex(8)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        # It refuses to run as root, where we then are somebody else.
        self._as_somebody: list[str] = []
        if os.geteuid() == 0:
            name = "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"
            account = pwd.getpwnam(name)
            os.chown(folder, account.pw_uid, account.pw_gid)
            self._as_somebody = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        self._server: subprocess.Popen | None = None

    def create(self) -> None:
        password_file = self._folder / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o644)
        options = [f"--username={USER}", f"--pwfile={password_file}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]
        subprocess.run(
            [*self._as_somebody, self._binaries / "initdb", "-D", self._folder / "data", *options],
            cwd=self._folder,
            check=True,
            capture_output=True,
        )
        password_file.unlink()

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            address = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._folder)]
            command = [*self._as_somebody, self._binaries / "postgres", "-D", self._folder / "data", *address]
            self._server = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while subprocess.run([self._binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)], capture_output=True).returncode:
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9 of it and all of its workers."""
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None

    def sql(self, statement: str, database: str = "postgres") -> None:
        arguments = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database, "-c", statement]
        environment = {**os.environ, "PGPASSWORD": self.password}
        subprocess.run([self._binaries / "psql", *arguments], env=environment, check=True, capture_output=True)

    def url(self, database: str, *, user: str = USER, password: str | None = None) -> str:
        return f"postgresql+asyncpg://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}"


@contextlib.contextmanager
def running_postgres(binaries: Path) -> Iterator[Postgres]:
    # Not in pytest's folder, which the other account may not enter; short, since a socket's path must be.
    folder = Path(tempfile.mkdtemp(prefix="millstream-pg-"))
    server = Postgres(binaries, folder)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
