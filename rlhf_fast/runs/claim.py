"""Claim a run's folder: a mark from the first instant, locked while a process writes in it.

The mark is `run.json`. A folder that has something in it but no mark is somebody else's, and nothing is written there.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from rlhf_fast import __version__
from rlhf_fast.runs.files import named_errors

MARK = "run.json"
_BYTES = 512  # of a mark, with spaces at its end: written over in one call, of which a kill leaves all or nothing


class Claim:
    """A folder that this process alone writes to until it lets go, or ends, however it ends.

    Raises:
        OSError: the folder is another verb's, another process's, somebody else's, or cannot be written; says which.
    """

    def __init__(self, path: Path, verb: str) -> None:
        self.path = path
        refuse_foreign(path)
        with named_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._file = os.fdopen(descriptor, "r+b")
        try:
            _lock(self._file, path)
            before = _mark(path)
            refuse_foreign(path)  # it may have been another one's before it was locked
            _refuse_other_verb(path, before, verb)
            mark = {
                "rlhf_fast": __version__,
                "verb": verb,
                "began": before.get("began") or datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                "process": os.getpid(),
                "host": socket.gethostname()[:100],
            }
            with named_errors(path):
                os.pwrite(self._file.fileno(), json.dumps(mark).ljust(_BYTES).encode(), 0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the claim."""
        self._file.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def check_claim(path: Path, verb: str) -> None:
    """Raise what `Claim` would raise, and change nothing: before work that takes long."""
    refuse_foreign(path)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, where a folder was expected; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{nearest} cannot be written to; choose another --out")
    if (path / MARK).exists():
        with contextlib.suppress(FileNotFoundError), open(path / MARK, "r+b") as file:
            _lock(file, path)
        _refuse_other_verb(path, _mark(path), verb)


def refuse_foreign(path: Path) -> None:
    """Raise if the folder has something in it, but no mark."""
    if not path.is_dir():
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} is no folder; choose another --out")
        return
    names = sorted(child.name for child in path.iterdir())
    if MARK not in names and names:
        raise FileExistsError(
            f"{path / names[0]} is there, and {path} is no run's folder; choose another --out, or an empty folder"
        )
    if MARK in names and not _mark(path) and (names != [MARK] or (path / MARK).stat().st_size):
        raise FileExistsError(f"{path / MARK} is not a run's; choose another --out")


def _refuse_other_verb(path: Path, mark: dict[str, Any], verb: str) -> None:
    if mark and mark["verb"] != verb and [child.name for child in path.iterdir()] != [MARK]:
        raise FileExistsError(
            f"{path} holds an interrupted run of {mark['verb']}, begun {mark.get('began')}, and this is {verb}; "
            "choose another --out"
        )


def _mark(path: Path) -> dict[str, Any]:
    """The mark of a folder; empty if it has none that is ours."""
    try:
        content = json.loads((path / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and {"rlhf_fast", "verb"} <= content.keys() else {}


def _lock(file: Any, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        mark = _mark(path)
        who = f"process {mark['process']} on {mark['host']}" if "process" in mark else "another process"
        raise FileExistsError(f"{path} is in use by {who}; wait for it, or choose another --out") from error
    except OSError as error:  # some network file systems have no locks
        print(f"{path}: cannot be locked ({error.strerror}); see that no other run writes there", file=sys.stderr)
