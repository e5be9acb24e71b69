"""A PostgreSQL server for tests and benches, in a folder that goes away with it. Nothing of another server is touched."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds until the server answers


@dataclass(frozen=True)
class Cluster:
    """Connections over the socket are trusted; those over TCP need the password."""

    folder: Path
    port: int
    password: str

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}&port={self.port}"

    def database(self, options: str = "") -> str:
        """The URL of a new database."""
        name = f"votes_{secrets.token_hex(6)}"
        self.do(f"CREATE DATABASE {name} {options}")
        return self.url(name)

    def do(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]


def binaries() -> Path | None:
    """The folder of the newest PostgreSQL of Debian, or the one in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: float(file.parts[-3]))
    named = shutil.which("initdb")
    return found[-1].parent if found else Path(named).resolve().parent if named else None


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A server with its own data, from initdb to its end; as `postgres` where this process is root's."""
    programs = binaries()
    assert programs is not None, "PostgreSQL is not installed"
    who: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short, for the path of a socket has at most 107 characters
    try:
        password = secrets.token_hex(16)
        (folder / "password").write_text(password)
        if who:
            shutil.chown(folder, "postgres", "postgres")
        more = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
        command = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "-E", "UTF8", "--locale=C", *more]
        if who:
            shutil.chown(folder / "password", "postgres")
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, **who)
        assert done.returncode == 0, done.stderr
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-p", str(port)]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", *words], stdout=log, stderr=log, cwd=folder, **who
            )
        made = Cluster(folder, port, password)
        try:
            _wait(made, server)
            yield made
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nobody needs the data any more
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(made: Cluster, server: subprocess.Popen[bytes]) -> None:
    import psycopg

    end = time.monotonic() + PATIENCE
    while True:
        try:
            return made.do("SELECT 1")
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"PostgreSQL did not start: {(made.folder / 'log').read_text()}") from None
            time.sleep(0.05)
