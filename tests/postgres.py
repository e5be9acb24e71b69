"""A PostgreSQL server for tests and benches, in a folder that goes away with it; no other server is touched."""

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
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds until the server answers


class Cluster:
    """A server with its own data. Connections over the socket are trusted; those over TCP need the password.

    With `fsync` off it is quick, and still loses at a crash of its own what it had not given to the system.
    """

    def __init__(self, folder: Path, fsync: bool) -> None:
        programs = binaries()
        assert programs is not None, "PostgreSQL is not installed"
        self.programs, self.folder, self.password = programs, folder, secrets.token_hex(16)
        self.fsync = "on" if fsync else "off"
        self.who: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            self.who = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(folder, "postgres", "postgres")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        secret = folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)  # in a folder that only its owner opens
        more = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        words = [
            str(programs / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--locale=C",
            *more,
        ]
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, **self.who)
        assert done.returncode == 0, done.stderr
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"]
        words += ["-p", str(self.port), "-D", str(self.folder / "data"), "-c", f"fsync={self.fsync}"]
        with (self.folder / "log").open("a") as log:
            self.server = subprocess.Popen(
                [self.programs / "postgres", *words], stdout=log, stderr=log, cwd=self.folder, **self.who
            )
        import psycopg

        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self.do("SELECT 1")
            except psycopg.OperationalError:
                if self.server.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()}") from None
                time.sleep(0.05)

    def crash(self) -> None:
        """End it at once, without a word to the disk of what waits in memory."""
        if self.server is not None:
            self.server.send_signal(signal.SIGQUIT)
            self.server.wait()
            self.server = None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}&port={self.port}"

    def database(self, options: str = "", setting: str = "") -> str:
        """The URL of a new database."""
        name = f"votes_{secrets.token_hex(6)}"
        self.do(f"CREATE DATABASE {name} {options}")
        if setting:
            self.do(f"ALTER DATABASE {name} SET {setting}")
        return self.url(name)

    def schema(self) -> str:
        """The URL of a new schema of the first database, which is as empty as a new database and made at once."""
        name = f"votes_{secrets.token_hex(6)}"
        self.do(f"CREATE SCHEMA {name}")
        return f"{self.url()}&options=-csearch_path%3D{name}"

    def do(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)


def binaries() -> Path | None:
    """The folder of the newest PostgreSQL of Debian, or the one in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: float(file.parts[-3]))
    named = shutil.which("initdb")
    return found[-1].parent if found else Path(named).resolve().parent if named else None


@contextlib.contextmanager
def cluster(fsync: bool = False) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short, for the path of a socket has at most 107 characters
    try:
        made = Cluster(folder, fsync)
        try:
            made.start()
            yield made
        finally:
            made.crash()  # nobody needs the data any more
    finally:
        shutil.rmtree(folder, ignore_errors=True)
