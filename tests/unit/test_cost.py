"""The limit on what a unit test may cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import subprocess, sys, time
import pytest
from tests import cost

cost.SECONDS, cost.busy = 0.05, lambda: False
BUSY = "import time\\nwhile time.process_time() < 0.3: pass"

def burn(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass

@pytest.fixture
def made():
    burn(0.3)

def test_cheap(made): pass
def test_waits(): time.sleep(0.3)
def test_dear(): burn(0.4)
def test_of_a_child(): subprocess.run([sys.executable, "-S", "-c", BUSY], check=True)
def test_imports(): import imported
def test_wrong():
    burn(0.3)
    assert False
@pytest.mark.seconds(0.5)
def test_marked(): burn(0.3)
@pytest.mark.seconds(0.1)
def test_marked_too_low(): burn(0.7)
def test_untimed(monkeypatch):
    monkeypatch.setenv("RLHF_FAST_TEST_UNTIMED", "1")
    burn(0.3)
def test_beside_others(monkeypatch):
    monkeypatch.setattr(cost, "busy", lambda: True)
    burn(0.15)
def test_dear_beside_others(monkeypatch):
    monkeypatch.setattr(cost, "busy", lambda: True)
    burn(0.7)
"""


@pytest.mark.seconds(3)
def test_what_costs_more_than_it_says_fails(tmp_path: Path) -> None:
    (tmp_path / "test_these.py").write_text(TESTS)
    (tmp_path / "imported.py").write_text(
        "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end:\n    pass\n"
    )
    names = {key: value for key, value in os.environ.items() if not key.startswith("RLHF_FAST_TEST_")}
    environment = {**names, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = ["-p", "tests.cost", "-p", "no:cacheprovider", "-q", "-c", os.devnull, "test_these.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    failed = set(re.findall(r"^FAILED .*::(\w+)", done.stdout, re.MULTILINE))
    assert failed == {"test_dear", "test_of_a_child", "test_wrong", "test_marked_too_low", "test_dear_beside_others"}
    assert re.search(r"took 0\.\d s of processor time, over 2 times the 0\.05 s that it is to take", done.stdout)


def test_the_tests_of_this_folder_are_held_to_it(request: pytest.FixtureRequest) -> None:
    hooks = request.node.ihook.pytest_runtest_call.get_hookimpls()
    assert any(hook.function.__module__ == "tests.cost" for hook in hooks)
