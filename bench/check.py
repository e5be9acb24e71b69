"""Check what a change may have broken, within a minute: `python -m bench.check`, or `make check`.

Changed files are linted, and the tests that reach them run (reach.py), the nearest first, until the time is over. The
tests that were not run are counted at the end; `make test` runs all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.reach import find_op_tests, find_tests

ROOT = Path(__file__).resolve().parents[1]
NEAR = 2  # imports between a test and what it is run for
SPARE = 5.0  # seconds, for the test that runs when the time is over


def changed(since: str, root: Path = ROOT) -> list[Path]:
    """List the files that differ from a commit, and new ones that git does not ignore; deleted ones are left out."""
    listed = subprocess.check_output(["git", "diff", "--name-only", "--diff-filter=d", since], cwd=root, text=True)
    new = subprocess.check_output(["git", "ls-files", "--others", "--exclude-standard"], cwd=root, text=True)
    return [root / name for name in dict.fromkeys([*listed.splitlines(), *new.splitlines()])]


def choose_tests(files: Iterable[Path], root: Path = ROOT) -> list[Path]:
    """List the test files that reach any of `files`: changed tests first, then for each file in turn its nearest."""
    files = list(files)
    columns: list[list[Path]] = []
    changed_tests = []
    for file in files:
        place = file.relative_to(root)
        if place.parts[0] == "tests" and file.name.startswith("test_"):
            changed_tests.append(file)
        elif place.suffix == ".py" and place.parts[0] in ("rlhf_fast", "bench", "tests"):
            columns.append(find_tests(root / place, root, NEAR))
        elif place.parts[0] in ("csrc", "kernels"):  # whose files the ops find by name
            columns.append(find_op_tests(file, root))
        elif place.suffix == ".md":
            columns.append([*(root / "tests" / name for name in ("unit/test_docs.py", "scenarios/test_readme.py"))])
    longest = max(map(len, columns), default=0)
    turns = [column[i] for i in range(longest) for column in columns if i < len(column)]
    return list(dict.fromkeys([*changed_tests, *turns]))


class Budget:
    """Plugin of pytest that ends the session after so many seconds, between two tests."""

    def __init__(self, seconds: float) -> None:
        self.end, self.left = time.monotonic() + seconds, 0

    def pytest_runtestloop(self, session: Any) -> None:
        self.left = len(session.items)

    def pytest_runtest_logfinish(self) -> None:
        self.left -= 1

    def pytest_runtest_setup(self, item: Any) -> None:
        if time.monotonic() > self.end:
            item.session.shouldstop = "the time is over"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--since", default="HEAD", help="the commit that the change is from")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all; the last test may take longer")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds - SPARE
    files = changed(options.since)
    python = [str(file) for file in files if file.suffix == ".py"]
    for tool in (["check", "-q"], ["format", "--check", "-q"]) if python else ():
        if code := subprocess.run([sys.executable, "-m", "ruff", *tool, *python], cwd=ROOT).returncode:
            return code
    # Types are checked beside the tests: two cores for a minute.
    mypy = [sys.executable, "-m", "mypy", "rlhf_fast", "bench"]
    types = subprocess.Popen(mypy, cwd=ROOT, stdout=subprocess.PIPE, text=True) if python else None
    # Triton decides when it is imported whether its kernels run on the CPU: those that change alone are tested so.
    triton = bool(python) and all(ROOT / "kernels" in Path(file).parents for file in python)
    if triton:
        os.environ["TRITON_INTERPRET"] = "1"
    code = _run_tests(choose_tests(files), end, ["-k", "triton"] if triton else [])
    if types is not None:
        output, _ = types.communicate()
        if types.returncode:
            print(output)
        code = code or types.returncode
    return code


def _run_tests(tests: list[Path], end: float, words: list[str]) -> int:
    """Run test files, with further words for pytest, until `time.monotonic()` is `end`.

    Returns:
        pytest's exit code, 0 if the time ended them.
    """
    if not tests:
        print("no test reaches what was changed")
        return 0
    import pytest

    budget = Budget(end - time.monotonic())
    code = int(
        pytest.main(
            ["-q", "-x", "-m", "not slow and not gpu", "--durations=5", "--durations-min=1", *words, *map(str, tests)],
            plugins=[budget],
        )
    )
    if budget.left:
        print(f"{budget.left} tests that reach the change were not run; make test runs all")
    return 0 if code == pytest.ExitCode.INTERRUPTED and budget.left else code


if __name__ == "__main__":
    sys.exit(main())
