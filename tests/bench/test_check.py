"""`make check`: which tests are run for which files, and that it ends in time."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bench import check
from bench.check import ROOT, Budget, changed, choose_tests
from bench.reach import find_tests


def names(*files: str) -> list[str]:
    return [str(test.relative_to(ROOT)) for test in choose_tests([ROOT / file for file in files])]


def test_changed_tests_come_first_and_then_each_files_own() -> None:
    found = names(
        "rlhf_fast/statistics/intervals.py", "csrc/cpu/gae.cpp", "tests/unit/cli/test_cli.py", "docs/sft.md", "Makefile"
    )
    assert found[0] == "tests/unit/cli/test_cli.py"
    own = {"tests/unit/statistics/test_intervals.py", "tests/unit/ops/test_gae.py", "tests/unit/test_docs.py"}
    assert set(found[1:4]) == own
    assert "tests/unit/rewards/test_reward_measures.py" in found and len(found) == len(set(found))
    assert names("csrc/cpu/simd.h") == names(*["csrc/cpu/simd.h"] * 2) and len(names("csrc/cpu/simd.h")) > 20
    assert names("Makefile") == [] and names("kernels/gae.py")[0] == "tests/unit/ops/test_gae.py"


def test_unit_tests_come_before_dearer_ones_that_are_not_of_its_name(tmp_path: Path) -> None:
    for name in (
        "rlhf_fast/room/part.py",
        "tests/scenarios/test_a.py",
        "tests/scenarios/test_part.py",
        "tests/unit/test_z.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import rlhf_fast.room.part\n" if name.startswith("tests") else "")
    (tmp_path / "tests/unit/test_y.py").write_text("import tests.unit.test_z\n")
    found = find_tests(tmp_path / "rlhf_fast/room/part.py", tmp_path)
    assert [file.name for file in found] == ["test_part.py", "test_z.py", "test_y.py", "test_a.py"]


def test_what_types_or_a_test_find_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Types:
        returncode = 0

        def communicate(self) -> tuple[str, None]:
            return "wrong types", None

    monkeypatch.setattr(check, "changed", lambda since: [ROOT / "bench" / "check.py"])
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Types())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    for of_types, of_tests, code in ((0, 0, 0), (1, 0, 1), (0, 2, 2)):
        monkeypatch.setattr(Types, "returncode", of_types)
        monkeypatch.setattr(check, "_run_tests", lambda tests, end, words, of_tests=of_tests: of_tests)
        assert check.main([]) == code
        assert ("wrong types" in capsys.readouterr().out) == bool(of_types)


def test_what_is_new_and_what_differs_is_changed(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    for name in ("kept.py", "edited.py", "gone.py", ".gitignore"):
        (tmp_path / name).write_text("ignored.py\n")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (tmp_path / "edited.py").write_text("x = 1\n")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "new.py").touch()
    (tmp_path / "ignored.py").touch()
    assert [file.name for file in changed("HEAD", tmp_path)] == ["edited.py", "new.py"]


def test_it_ends_between_two_tests_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Item:
        class session:
            shouldstop: Any = False

    budget = Budget(10.0)
    budget.pytest_runtestloop(type("Session", (), {"items": [1, 2, 3]}))
    budget.pytest_runtest_setup(Item)
    assert not Item.session.shouldstop
    budget.pytest_runtest_logfinish()
    monkeypatch.setattr(time, "monotonic", lambda: budget.end + 1.0)
    budget.pytest_runtest_setup(Item)
    assert Item.session.shouldstop == "the time is over" and budget.left == 2
