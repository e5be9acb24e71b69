"""Every exception is one line on the command line; a traceback is shown on demand alone."""

import errno
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml
from safetensors import SafetensorError

from rlhf_fast import cli
from rlhf_fast.runs.folder import read_result


def command_that(monkeypatch: pytest.MonkeyPatch, does: Callable[[], Any]) -> None:
    """Let `doctor` do this."""
    monkeypatch.setitem(cli.VERBS, "doctor", (cli.VERBS["doctor"][0], lambda _: does()))


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """What one line on stderr says of `doctor`, which ends with `code`."""
    assert cli.main(["doctor", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rlhf-fast: ") and captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("rlhf-fast: ").rstrip("\n")


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, RuntimeError, FloatingPointError])
def test_an_error_in_words_is_shown_in_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    command_that(monkeypatch, raising(kind("bad")))
    assert said(capsys, 1) == "bad"
    monkeypatch.setenv("RLHF_FAST_DEBUG", "1")  # checks values on accelerators, and says nothing of tracebacks
    assert said(capsys, 1) == "bad"


@pytest.mark.parametrize("words", [["doctor", "--traceback"], ["--traceback", "doctor"]])
def test_a_traceback_is_shown_above_the_line_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    command_that(monkeypatch, raising(ValueError("bad")))
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.endswith("\nrlhf-fast: bad\n")


def test_a_traceback_may_be_asked_for_with_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--traceback", "--tflops", "-1"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "rlhf-fast: --tflops: -1.0; expected more than 0" in err


def test_every_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["ppo", "--help"]):
        assert cli.main(words) == 0
        assert "--traceback" in capsys.readouterr().out


FORESEEN = [
    (SafetensorError("header too large"), "weights cannot be read or written (header too large)"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out (CUDA out of memory."),
    (MemoryError(), "memory ran out; take a smaller model"),
    (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "package wandb is not installed; pip install wandb"),
    (ModuleNotFoundError("", name="scipy.stats"), "package scipy is not installed; pip install 'rlhf-fast[report]'"),
    (ModuleNotFoundError("run.trackers: trackio is not installed; pip install trackio"), "run.trackers: trackio is"),
    (jinja2.UndefinedError("'x' is undefined"), "the chat template cannot be rendered: 'x' is undefined"),
    (jinja2.TemplateSyntaxError("unexpected '}'", 7), "the chat template cannot be rendered (line 7): unexpected '}'"),
    (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: permission denied; choose another place"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "/x: is a folder; a file is expected"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "/x: a part of this path is a file, not a folder"),
    (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "/x: there is no such file or folder"),
    (OSError(errno.ENOSPC, "no space left while writing x; free some"), "no space left while writing x; free some"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
    (yaml.YAMLError("odd indent"), "odd indent"),
]


@pytest.mark.parametrize(("error", "words"), FORESEEN, ids=[type(error).__name__ for error, _ in FORESEEN])
def test_foreseen_errors_say_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    command_that(monkeypatch, raising(error))
    line = said(capsys, 1)
    assert words in line and "[Errno" not in line and "a fault of rlhf-fast" not in line


def test_the_hub_and_the_network_are_named_as_such(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    command_that(monkeypatch, raising(OfflineModeIsEnabled("no route to host\nsecond line")))
    assert said(capsys, 1) == "the network: no route to host"


def test_torch_without_memory_on_a_cpu_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_that(monkeypatch, lambda: torch.empty(1 << 58))
    assert said(capsys, 1).startswith("memory ran out (")


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (lambda: {}["hidden_size"], "KeyError: 'hidden_size'"),
        (lambda: None + 1, "TypeError: unsupported operand type(s)"),
        (lambda: int("x"), "ValueError: invalid literal for int()"),
        (lambda: torch.zeros(2) @ torch.zeros(3), "RuntimeError: inconsistent tensor size"),
        (raising(AssertionError()), "AssertionError ("),
        (raising(RuntimeError()), "RuntimeError ("),
        (raising(ModuleNotFoundError("", name="rlhf_fast.gone")), "ModuleNotFoundError"),
    ],
)
def test_what_nobody_foresaw_is_called_a_fault_with_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, does: Callable[[], Any], words: str
) -> None:
    command_that(monkeypatch, does)
    line = said(capsys, 70)
    assert line.startswith(f"a fault of rlhf-fast itself, not of your command: {words}")
    assert "rlhf_fast/cli/__init__.py:" in line and "--traceback" in line


@pytest.mark.parametrize("reads", [0, 1])
@pytest.mark.parametrize("words", [["--help"], ["ppo", "--help"]])
def test_nobody_reads_on(words: list[str], reads: int) -> None:
    """As `rlhf-fast --help | head -1` and `| true` do; a long help is more than a pipe holds in the other."""
    code = (
        "import sys; from rlhf_fast import cli; "
        "cli.help.overview = cli.help.verb_help = lambda *_: 'line\\n' * 50_000; "
        f"sys.exit(cli.main({words!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(reads):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(timeout=60), err) == (141, b"")


def test_a_warning_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command_that(monkeypatch, lambda: print(warnings.formatwarning("two\n lines", UserWarning, "a.py", 3)))
    before = warnings.formatwarning
    assert cli.main(["doctor"]) == 0
    assert "rlhf-fast: two lines\n" in capsys.readouterr().out and warnings.formatwarning is before


def test_a_damaged_file_of_a_run_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for content, words in ((b'{"a": ', "is no JSON (Expecting value: line 1"), (b"\xff", "is no UTF-8 text (")):
        (tmp_path / "result.json").write_bytes(content)
        command_that(monkeypatch, lambda: read_result(tmp_path))
        line = said(capsys, 1)
        assert line.startswith(f"{tmp_path}, or a file in it, {words}") and "rlhf_fast/runs/folder.py:" in line


def test_a_file_of_another_encoding_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"out: \xff\xfe\n")
    assert cli.main(["demo", "--config", str(file)]) == 2
    assert f"--config: {file} is not YAML" in capsys.readouterr().err
