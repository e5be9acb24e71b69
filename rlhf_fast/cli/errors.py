"""Tell a person of an exception: one line that says what to do, and an exit code.

An error with words of its own is shown in them; one of Python or of a library that nobody here foresaw is called a
fault of this program, with its place, so that it can be reported.
"""

from __future__ import annotations

import contextlib
import dis
import errno
import json
import os
import select
import sys
import traceback
from pathlib import Path
from types import TracebackType

import yaml

from rlhf_fast.config.settings import ConfigError
from rlhf_fast.runs.folder import PageError

FAILED, USAGE, FAULT, BROKEN_PIPE = 1, 2, 70, 141  # exit codes
_RAISE = dis.opmap["RAISE_VARARGS"]
_PACKAGE = Path(__file__).resolve().parents[1]
_EXTRAS = {"matplotlib": "report", "scipy": "report", "tensorboard": "trackers", "triton": "triton"}
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def explained(error: Exception, verb: str) -> tuple[str, int]:
    """Explain an error as (words for the user, exit code)."""
    if isinstance(error, PageError) and isinstance(error.__cause__, Exception):
        reason, code = explained(error.__cause__, verb)
        return f"{error.kept}: {reason}; {error.remedy}", code
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, ConfigError):
        return f"{error}; see rlhf-fast {verb} --help", USAGE
    if _is_out_of_memory(error):
        return _out_of_memory_words(error), FAILED
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("rlhf_fast"):
        return _missing_module_words(error.name), FAILED
    if "jinja2" in kinds:
        line = getattr(error, "lineno", None)
        return f"the chat template cannot be rendered{f' (line {line})' if line else ''}: {error}", FAILED
    if "safetensors" in kinds or "safetensors_rust" in kinds:
        return f"weights cannot be read or written ({error}); if a file is damaged, save or download it again", FAILED
    if kinds & {"huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "urllib"}:
        return f"the network: {_first_line(error)}", FAILED
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return _damaged_file_words(error), FAILED
    if isinstance(error, OSError):
        return _system_words(error), FAILED
    if _has_words(error):
        return str(error), FAILED
    return _fault_words(error), FAULT


def say(message: str) -> None:
    """Print one line on stderr, whoever reads it."""
    line = " ".join(part.strip() for part in message.splitlines())
    with contextlib.suppress(BrokenPipeError):
        print(f"rlhf-fast: {line}", file=sys.stderr)


def show_traceback(error: BaseException) -> None:
    """Print all that Python says of an error."""
    traceback.print_exception(error)


def reader_is_gone() -> bool:
    """Return whether nobody reads standard output any more, as behind `| head`; then nothing more is written to it."""
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, as in a notebook
        return False
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)  # else Python complains at its end
    return gone


def _has_words(error: Exception) -> bool:
    """Return whether an error's message was written for people: by a `raise`, of a kind that says what is wrong."""
    if isinstance(error, UnicodeError | RecursionError) or not str(error).strip():
        return False
    foreseen = ValueError, TypeError, RuntimeError, FloatingPointError, ImportError, EOFError, yaml.YAMLError
    return isinstance(error, foreseen) and _was_raised(error.__traceback__)


def _was_raised(trace: TracebackType | None) -> bool:
    """Return whether the innermost frame is at a `raise`, and not in what Python or a compiled module found wrong."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY)


def _out_of_memory_words(error: Exception) -> str:
    said = _first_line(error)
    if _has_words(error) and type(error).__name__ != "OutOfMemoryError" and not isinstance(error, MemoryError):
        return str(error)  # of a trainer, which knows the part that did not fit
    return (
        f"memory ran out{f' ({said})' if said else ''}; take a smaller model, shorter texts or fewer at a time "
        "(rlhf-fast doctor --config RUN/config.yaml says what a run takes, and what to change)"
    )


def _missing_module_words(name: str) -> str:
    top = name.partition(".")[0]
    extra = _EXTRAS.get(top)
    return (
        f"the package {top} is not installed; pip install {f'{chr(39)}rlhf-fast[{extra}]{chr(39)}' if extra else top}"
    )


def _damaged_file_words(error: json.JSONDecodeError | UnicodeDecodeError) -> str:
    """Word a file that is damaged, or another than it should be, and that nobody named on the way."""
    kind = "JSON" if isinstance(error, json.JSONDecodeError) else "UTF-8 text"
    file = _being_read(error.__traceback__)
    which = f"{file}, or a file in it," if file and file.is_dir() else str(file or "a file")
    return f"{which} is no {kind} ({error}; read at {_place(error)}); if it is damaged, put it back or choose another"


def _being_read(trace: TracebackType | None) -> Path | None:
    """The file or folder that the innermost function of this package with such a variable had at hand."""
    named = None
    while trace is not None:
        inside = Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)
        for name in ("path", "file") if inside else ():
            value = trace.tb_frame.f_locals.get(name)
            named = value if isinstance(value, Path) else named
        trace = trace.tb_next
    return named


def _system_words(error: OSError) -> str:
    """The operating system's errors name the file first; those with words of their own are shown in them."""
    if error.errno is None or error.filename is None:
        return _in_words(error)
    reasons = {
        errno.EACCES: "permission denied; choose another place, or change who may use it",
        errno.EISDIR: "is a folder; a file is expected",
        errno.ENOTDIR: "a part of this path is a file, not a folder",
        errno.ENOENT: "there is no such file or folder",
        errno.EROFS: "the disk is read-only; choose another place",
        errno.ENOSPC: "no space is left on the disk; free some and run again",
        errno.ENAMETOOLONG: "the name is too long",
    }
    return f"{error.filename}: {reasons.get(error.errno, error.strerror or type(error).__name__)}"


def _in_words(error: OSError) -> str:
    """Drop Python's "[Errno 28] ", where words of our own follow it."""
    text = error.strerror if error.errno is not None and error.strerror else str(error)
    return text or type(error).__name__


def _fault_words(error: Exception) -> str:
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"a fault of rlhf-fast itself, not of your command: {said:.300} ({_place(error)}); the same command with "
        "--traceback shows how it came to it, which a report of the fault should hold"
    )


def _place(error: Exception) -> str:
    """file:line of the last step within this package, and within whatever it called, if that is another."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    places = dict.fromkeys(_short(frame) for frame in (own[-1:] + frames[-1:]))
    return ", ".join(places) or "nowhere"


def _short(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    inside = path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE) else Path(*path.parts[-2:])
    return f"{inside}:{frame.lineno}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
