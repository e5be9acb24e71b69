"""Files that survive a kill: whole ones are written aside and renamed, growing ones gain whole lines only."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error that names the file and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no space left while writing {path}; free some and run again") from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise OSError(error.errno, f"{path} cannot be written; choose another --out") from error
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a kill at any instant, sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_folder_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder aside by `fill`, then rename it to `path`; nothing is left of it when `fill` fails.

    A kill leaves the old folder, the new one, or (between two renames) none, never a part of one; `restore_folder`
    then brings the old one back.
    """
    restore_folder(path)
    aside, old = _beside(path)
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.mkdir()
            fill(aside)
            for file in aside.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Restore a folder after a kill inside `write_folder_atomic`: the old or the new one, with nothing beside it."""
    aside, old = _beside(path)
    if not path.exists() and old.exists():  # it came between the two renames
        os.replace(old, path)
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """Name where a folder is written, and where the one that it replaces waits."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line in a single write; half a line, which a killed process may have left, is removed first."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with named_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # A write is cut where a page ends if the process is killed in the middle of it.
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
            written = os.write(descriptor, line)
            if written < len(line):  # the disk filled up in the middle of it: take the half line back
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that `append_line` writes, without half a one at its end; none if there is no file."""
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].decode().split("\n")[:-1]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows as JSON Lines, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise before work is lost when `folder`'s disk has less room than `what` will need."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs about {needed_bytes / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; "
            "free some space or choose another --out",
        )
