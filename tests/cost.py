"""The limit on what a test may cost, in seconds of a processor, so that a busy machine makes none fail.

A test of tests/unit takes a second; what takes over `SPARE` times that fails, unless it is marked with what it takes:
`@pytest.mark.seconds(3)`. Counted are this process and the children that it has waited for, without fixtures and
without imports, which the first test to need a library does for all. A second is one of a processor of about 2023: a
slower one is given as much more as a loop takes there. Where at least half the processors have been at work in the last
minute, two may be threads of one core, on which all takes twice as long: twice the time then. Nothing is counted under
coverage, a debugger or a sanitizer, nor where RLHF_FAST_TEST_UNTIMED is set.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

SECONDS, SPARE, SHARED = 1.0, 2.0, 2.0
USUAL = 0.06  # seconds that the loop of `slowness` takes


def used() -> float:
    """Processor seconds of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def slowness() -> float:
    """How many times as long as usual this processor takes for a loop of Python at the moment; at least 1."""
    taken = []
    for _ in range(3):
        start = used()
        sum(i * i for i in range(1_000_000))
        taken.append(used() - start)
    return max(1.0, min(taken) / USUAL)


def busy() -> bool:
    """Whether others may share this processor's core."""
    return os.getloadavg()[0] > (os.cpu_count() or 1) / 2


class Imports:
    """The processor seconds that imports have taken."""

    def __init__(self) -> None:
        self.seconds, self.importing = 0.0, False
        bootstrap: Any = importlib._bootstrap  # what a statement calls for a new module
        self.find = bootstrap._find_and_load
        bootstrap._find_and_load = self

    def __call__(self, name: str, import_: Any) -> Any:
        if self.importing:
            return self.find(name, import_)
        self.importing, start = True, used()
        try:
            return self.find(name, import_)
        finally:
            self.importing, self.seconds = False, self.seconds + used() - start


IMPORTS = Imports()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    start = used() - IMPORTS.seconds
    result = yield
    taken = used() - IMPORTS.seconds - start
    watched = sys.gettrace() is not None or {"RLHF_FAST_TEST_MODULE", "RLHF_FAST_TEST_UNTIMED"} & os.environ.keys()
    mark = item.get_closest_marker("seconds")
    said = float(mark.args[0]) if mark else SECONDS
    allowed = SPARE * said * (SHARED if busy() else 1)
    if taken > allowed and not watched and taken > allowed * slowness():
        pytest.fail(
            f"took {taken:.1f} s of processor time, over {allowed / said:g} times the {said:g} s that it is to take: "
            f"make it cheaper, mark it @pytest.mark.seconds({taken:.0f}), or move it out of tests/unit",
            pytrace=False,
        )
    return result
