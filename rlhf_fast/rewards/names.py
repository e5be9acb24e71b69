"""Read a reward as it is written on the command line or in YAML: its parts, and functions in files of one's own.

Imports no torch, so that what is wrong in it is said before anything is loaded.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_fast.rewards.rules import rule
from rlhf_fast.runs import model_names

WEIGHT = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\*"  # of a part of a list that is written as text
URLS = ("http://", "https://")
_FUNCTION = re.compile(r"(.+\.py)(?::(.*))?")


def written_list(text: str) -> list[tuple[float, str]]:
    """ "1*runs/reward, 0.5*rule:math" as a list. A comma that no weight follows belongs to a name."""
    written = [each.partition("*") for each in re.split(rf",\s*(?={WEIGHT})", text)]
    return [(float(weight), source.strip()) for weight, _, source in written]


def is_list(text: str) -> bool:
    return re.match(WEIGHT, text) is not None


def is_function(text: str) -> bool:
    """Return whether a text names a Python file, with or without the name of a function in it."""
    return _FUNCTION.fullmatch(text) is not None and not text.startswith(URLS) and not Path(text).is_dir()


def reward_models(text: str) -> list[str]:
    """The checkpoints that a written reward names, such as runs/reward in "1*runs/reward, 0.5*rule:math"."""
    return [each for each in _sources(text) if not each.startswith(("rule:", *URLS)) and not is_function(each)]


def check(text: str, setting: str = "reward") -> None:
    """Refuse a written reward of which a part is unknown, missing or broken.

    Raises:
        ValueError: names the part: a rule that is none, a model that is no reward model, a Python file with an error.
        FileNotFoundError: a model or file that is not there.
    """
    for source in _sources(text):
        if source.startswith("rule:"):
            rule(source.removeprefix("rule:"))
        elif is_function(source):
            load_function(source, setting)
        elif not source.startswith(URLS):
            model_names.check(source, setting, "reward")


def load_function(source: str, setting: str = "reward") -> Callable[..., Any]:
    """The function that FILE.py:function names. The file is run, as `import` does; once for all its functions.

    Modules beside the file can be imported by it; those that are installed go before them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no function is named, the file does not have it, or an error in the file, with its line.
    """
    match = _FUNCTION.fullmatch(source)
    assert match is not None, source
    file, name = Path(match[1]).expanduser(), match[2] or ""
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: there is no file {file}; expected FILE.py:function")
    names = _functions(file, setting)
    if not name:
        example = f"{file}:{names[0] if names else 'function'}"
        raise ValueError(
            f"{setting}: {file} is a Python file; name the function in it, such as {example}{_that_has(names)}"
        )
    function = getattr(_module(file.resolve(), setting), name, None)
    if function is None:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {file}:{near[0]}?" if near else _that_has(names)
        raise ValueError(f"{setting}: {file} has no {name!r}{hint}")
    if not callable(function):
        raise ValueError(
            f"{setting}: {name} in {file} is {type(function).__name__}; expected a function (prompts, responses) -> "
            "scores"
        )
    return function


def line_of(function: Callable[..., Any], source: str) -> str:
    """A function by its name and where it stands, for messages: "my.py:score (line 3)"."""
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", None)
    return f"{source} (line {line})" if line else source


def place_in(error: BaseException, function: Any) -> str:
    """Say where an error came up, as far inside as the file of `function` goes: " (my.py line 7)"."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name} line {lines[-1]})" if file and lines else ""


def _sources(text: str) -> list[str]:
    return [source for _, source in written_list(text)] if is_list(text) else [text]


def _that_has(names: list[str]) -> str:
    return f"; it has {', '.join(names[:8])}" if names else "; it defines no function"


def _functions(file: Path, setting: str) -> list[str]:
    """The functions that a file defines, without running it."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        where = f" line {error.lineno}" if error.lineno else ""
        raise ValueError(f"{setting}: {file}{where}: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}: {file} cannot be read as Python: {error}") from error
    return [each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]


@functools.cache
def _module(file: Path, setting: str) -> ModuleType:
    name = f"reward_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module  # where dataclasses look for the types that they are annotated with
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" line {lines[-1]}" if lines else ""
        raise ValueError(f"{setting}: {file}{where}: {type(error).__name__}: {error}") from error
    return module
