"""Record which tests run each line: `python -m bench.covered` runs the suite once under coverage.py.

It takes twenty minutes on two cores and writes build/covered; `make mutants` then tries a mutant by the tests that run
its line. Triton's tests are left out, since interpreted kernels take three times as long under coverage. Lines that run
in other processes are not recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import monotonic  # by this name, for tests replace that of the module
from typing import Any

from bench.reach import python_files

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "covered"
SETUP = " (setup)"  # marks the context of a test's fixtures, which may serve all tests of its file


class Map:
    """Coverage of an earlier run of the suite; it holds for the files that have not changed since."""

    def __init__(self, folder: Path = FOLDER, root: Path = ROOT) -> None:
        import coverage

        kept = json.loads((folder / "tests.json").read_text(encoding="utf-8"))
        self.root, self.states = root, kept["states"]
        self.seconds: dict[str, float] = kept["seconds"]
        self.data = coverage.CoverageData(str(folder / "all"))
        self.data.read()
        self.of_file: dict[str, list[str]] = {}
        for test in self.seconds:
            if not test.endswith(SETUP):
                self.of_file.setdefault(test.partition("::")[0], []).append(test)

    def tests(self, name: str, lines: Iterable[int]) -> dict[str, list[str]]:
        """Find the tests that run any of a file's lines, by test file; {} if there are none or the file changed."""
        if self.states.get(name) != state(self.root / name):
            return {}
        by_line = self.data.contexts_by_lineno(str(self.root / name))
        tests: set[str] = set()
        for test in {test for line in lines for test in by_line.get(line, ()) if test}:
            # What runs before a test may be a fixture of its whole file.
            tests.update(self.of_file.get(test.partition("::")[0], []) if test.endswith(SETUP) else [test])
        grouped: dict[str, list[str]] = {}
        for test in sorted(tests):
            grouped.setdefault(test.partition("::")[0], []).append(test)
        return grouped

    def is_imported(self, name: str, lines: Iterable[int]) -> bool:
        """Return whether any of a file's lines were run outside of all tests, while they were collected."""
        by_line = self.data.contexts_by_lineno(str(self.root / name))
        return any("" in by_line.get(line, ()) for line in lines)

    def setup(self, name: str) -> float:
        """Return the longest setup of a test in a test file, in seconds."""
        return max((self.seconds.get(test + SETUP, 0.0) for test in self.of_file.get(name, ())), default=0.0)


class Recorder:
    """Plugin of pytest that sets coverage.py's context to the running test, and times each test."""

    def __init__(self, folder: Path) -> None:
        import coverage

        self.folder, self.seconds = folder, dict[str, float]()
        self.coverage = coverage.Coverage(
            data_file=str(folder / "data"),
            data_suffix=f"{os.getpid()}",
            source=[str(ROOT / "rlhf_fast")],
            config_file=False,
        )
        self.coverage.start()

    def _watch(self, context: str) -> Iterator[None]:
        self.coverage.switch_context(context)
        started = monotonic()
        yield
        self.seconds[context] = monotonic() - started
        self.coverage.switch_context("")

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        (self.folder / f"seconds.{os.getpid()}").write_text(json.dumps(self.seconds), encoding="utf-8")


def pytest_configure(config: Any) -> None:
    """Register the recorder; pytest calls this where `-p` names this module, in every process of pytest-xdist."""
    import pytest

    recorder = Recorder(FOLDER)

    class Hooks:
        pytest_sessionfinish = recorder.pytest_sessionfinish

        @pytest.hookimpl(hookwrapper=True, tryfirst=True)
        def pytest_runtest_setup(self, item: Any) -> Iterator[None]:
            yield from recorder._watch(item.nodeid + SETUP)

        @pytest.hookimpl(hookwrapper=True, tryfirst=True)
        def pytest_runtest_call(self, item: Any) -> Iterator[None]:
            yield from recorder._watch(item.nodeid)

    config.pluginmanager.register(Hooks(), "recorder")


def main() -> int:
    import coverage

    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.iterdir():
        file.unlink()
    states = {str(file.relative_to(ROOT)): state(file) for file in python_files(ROOT / "rlhf_fast")}
    words = ["-q", "-p", "bench.covered", "-n", "2", "--dist", "worksteal", "-m", "not slow and not gpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RLHF_FAST_TEST_UNTIMED": "1"}
    code = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment).returncode
    both = coverage.CoverageData(str(FOLDER / "all"))
    seconds: dict[str, float] = {}
    for file in FOLDER.glob("data.*"):
        one = coverage.CoverageData(str(file))
        one.read()
        both.update(one)
    for file in FOLDER.glob("seconds.*"):
        seconds |= json.loads(file.read_text(encoding="utf-8"))
    both.write()
    (FOLDER / "tests.json").write_text(json.dumps({"seconds": seconds, "states": states}), encoding="utf-8")
    return code


def state(file: Path) -> str:
    """Hash a file, to tell later whether it has changed."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
