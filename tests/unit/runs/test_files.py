"""Files that survive full disks, errors and kills at any instant."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.runs import files
from rlhf_fast.runs.files import (
    append_line,
    named_errors,
    require_space,
    write_atomic,
    write_folder_atomic,
    write_jsonl,
)

KILLS = 20


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_with(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)

    return fill


@settings(max_examples=20, deadline=None)
@given(st.text())
def test_write_atomic_writes_any_text_as_it_is(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.txt"
    write_atomic(file, text)
    assert file.read_bytes() == text.encode()


def test_write_atomic_makes_folders_replaces_the_old_file_and_leaves_nothing_aside(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file.txt"
    write_atomic(file, "old, and longer")
    write_atomic(file, "new")
    assert file.read_text() == "new"
    assert names(file.parent) == ["file.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "file.txt"
    write_atomic(file, "old")
    monkeypatch.setattr(os, step, failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_write_atomic_keeps_the_old_file_when_the_text_cannot_be_encoded(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "half a character: \ud800")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file = tmp_path / "file.txt"
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError) as caught:
        write_atomic(file, "text")
    assert caught.value.errno == number
    assert f"no space left while writing {file}; free some and run again" in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_forbidden_folder_names_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(number))
    for write in (lambda path: write_atomic(path, ""), lambda path: write_folder_atomic(path, fill_with(""))):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "new" / "file")
        assert f"{tmp_path / 'new' / 'file'} cannot be written; choose another --out" in str(caught.value)


def test_named_errors_leaves_other_errors_as_they_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"^same$"), named_errors(Path("file")):
        raise FileNotFoundError("same")


def test_write_folder_atomic_replaces_a_folder_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    write_folder_atomic(folder, lambda aside: (aside / "old").touch())
    write_folder_atomic(folder, fill_with("new"))
    assert names(folder) == ["inner"]
    assert (folder / "inner" / "file").read_text() == "new"
    assert names(folder.parent) == ["folder"]


def test_write_folder_atomic_keeps_the_old_folder_when_filling_fails(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        (aside / "half").touch()
        raise OSError(errno.ENOSPC, "full")

    folder = tmp_path / "folder"
    write_folder_atomic(folder, fill_with("old"))
    with pytest.raises(OSError, match=f"no space left while writing {folder}"):
        write_folder_atomic(folder, fill)
    assert (folder / "inner" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_what_a_kill_left_aside_does_not_get_into_the_next_folder(tmp_path: Path) -> None:
    for left in (tmp_path / ".folder.tmp", tmp_path / ".folder.old"):
        left.mkdir()
        (left / "stale").touch()
    write_folder_atomic(tmp_path / "folder", fill_with("new"))
    assert names(tmp_path / "folder") == ["inner"]
    assert names(tmp_path) == ["folder"]


rows = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=4)


@settings(max_examples=20, deadline=None)
@given(st.lists(rows, max_size=5))
def test_lines_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[dict[str, Any]]
) -> None:
    appended, whole = (tmp_path_factory.getbasetemp() / name for name in ("appended.jsonl", "whole.jsonl"))
    appended.write_bytes(b"")
    for row in written:
        append_line(appended, row)
    write_jsonl(whole, written)
    assert appended.read_bytes() == whole.read_bytes()
    assert [json.loads(line) for line in appended.read_bytes().split(b"\n")[:-1]] == written


def test_append_line_takes_half_a_line_back_when_the_disk_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines.jsonl"
    append_line(file, {"row": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
    with pytest.raises(OSError, match=f"no space left while writing {file}"):
        append_line(file, {"row": 2})
    assert file.read_text() == '{"row": 1}\n'


def test_require_space_raises_with_what_is_needed_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_200_000_000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    folder = tmp_path / "not" / "yet"
    require_space(folder, 1_200_000_000, "the demo")
    with pytest.raises(OSError) as caught:
        require_space(folder, 3_400_000_000, "the demo")
    assert caught.value.errno == errno.ENOSPC
    assert f"the demo needs about 3.4 GB in {folder}, where 1.2 GB are free" in str(caught.value)
    assert not folder.parent.exists()


def test_require_space_asks_the_disk_that_a_relative_folder_will_be_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    require_space(Path("runs/new"), 1, "it")
    with pytest.raises(OSError, match="it needs about"):
        require_space(Path("runs/new"), 10**18, "it")


def test_half_a_line_of_a_killed_process_is_no_line_and_is_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert files.whole_lines(file) == []
    for before in (b"", b'{"a": "\xc3\xa9"}\n'):
        for half in (b'{"a"', b'{"a": "\xc3'):
            file.write_bytes(before + half)
            assert "\n".join([*files.whole_lines(file), ""]).encode() == before
            files.append_line(file, {"b": 1})
            assert file.read_bytes() == before + b'{"b": 1}\n'
    files.append_line(file, {"c": 2})
    assert len(files.whole_lines(file)) == 3


# Kills ---------------------------------------------------------------------------------------------------------------

# The writer loads files.py alone, so that it starts in a moment.
WRITER = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
folder = Path(sys.argv[2])

def fill(aside):
    for part in range(3):
        (aside / str(part)).write_text(text)

number = 0
while True:
    number += 1
    text = '{"number": %d, "text": "%s"}' % (number, "x" * 20_000)
    files.write_atomic(folder / "whole.json", text)
    files.append_line(folder / "lines.jsonl", {"number": number, "text": "x" * 100})
    files.write_folder_atomic(folder / "checkpoint", fill)
    if number == 1:
        print("started", flush=True)
"""


def kill_at_random(folder: Path, seed: int) -> None:
    """Write into `folder` in another process, which is killed up to 40 ms after its first round."""
    arguments = [sys.executable, "-S", "-c", WRITER, files.__file__, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == b"started\n"
            time.sleep(random.Random(seed).uniform(0.0, 0.04))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(writer.pid, signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_kill_at_any_instant_leaves_whole_files_whole_lines_and_whole_folders(tmp_path: Path) -> None:
    for seed in range(KILLS):
        kill_at_random(tmp_path, seed)  # each writer goes on with what the one before it has left
        assert json.loads((tmp_path / "whole.json").read_text())["number"] >= 1
        # The last one may be half a line, which the next writer takes back.
        assert all(len(json.loads(line)["text"]) == 100 for line in files.whole_lines(tmp_path / "lines.jsonl"))
        checkpoint = tmp_path / "checkpoint"
        if checkpoint.exists():
            assert names(checkpoint) == ["0", "1", "2"]
            assert len({json.loads(part.read_text())["number"] for part in checkpoint.iterdir()}) == 1
    aside = {".whole.json.tmp", ".checkpoint.tmp", ".checkpoint.old"}
    assert set(names(tmp_path)) <= {"whole.json", "lines.jsonl", "checkpoint"} | aside
