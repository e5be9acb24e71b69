"""The tool that makes deliberate mistakes: what it draws, which tests it runs for one, and what it says of them."""

from __future__ import annotations

import ast
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import mutants, mutations
from bench.covered import SETUP, Map, state
from bench.mutations import Mutant
from bench.reach import find_tests

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("cosmic_ray")


def names(source: str) -> list[str]:
    return [str(test.relative_to(ROOT)) for test in find_tests(ROOT / source, ROOT)]


def test_the_nearest_tests_come_first_and_distant_ones_are_reached() -> None:
    assert names("rlhf_fast/statistics/intervals.py")[0] == "tests/unit/statistics/test_intervals.py"
    assert names("rlhf_fast/ops/gae.py")[0] == "tests/unit/ops/test_gae.py"
    blocks = names("rlhf_fast/rollout/blocks.py")  # by way of scheduler, engine and generator
    assert "tests/unit/rollout/test_generator.py" in blocks and "tests/unit/statistics/test_intervals.py" not in blocks
    assert "tests/scenarios/trainers/test_run_steps.py" in names("rlhf_fast/trainers/loop/steps.py")


def drawn(count: int, seed: int, room: str, root: Path = ROOT) -> list[Mutant]:
    return list(itertools.islice(mutations.draw(seed, root, room), count))


def test_the_same_mutants_come_for_a_seed_and_each_changes_what_is_run() -> None:
    once, again, others = (drawn(4, seed, "rlhf_fast/trainers/") for seed in (1, 1, 2))
    assert once == again and once != others
    for mutant in once:
        assert mutant.room == "trainers" and mutant.diff.count("\n") >= 1
        assert ast.dump(ast.parse(mutant.code)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))


def test_of_cplusplus_each_changes_a_line_and_no_part_of_a_name() -> None:
    pytest.importorskip("universalmutator")
    for mutant in drawn(30, 0, "csrc/cuda"):
        assert mutant.room == "csrc/cuda"
        old, new = (ROOT / mutant.file).read_text().splitlines(), mutant.code.splitlines()
        assert sum(a != b for a, b in zip(old, new, strict=False)) == 1 or len(new) == len(old) + 1
        assert "int0_t" not in mutant.diff and not new[mutant.line - 1].lstrip().startswith("//")


def test_annotations_and_unevaluated_code_are_not_changed() -> None:
    text = "from __future__ import annotations\nx: int | None = None\ndef f(a: int | str) -> int | None: ...\n"
    assert not mutations.is_visible(text, text.replace("a: int | str", "a: int + str"))
    assert mutations.is_visible(text, text.replace("= None", "= 1"))


def test_a_line_stands_for_its_statement_and_a_head_for_its_function() -> None:
    text = "x = (\n    1 +\n    2\n)\n\n\ndef f(a=1):\n    if a:\n        return x\n    return a\n"
    assert mutants.statement_lines(text, 3) == {1, 2, 3, 4, 9}  # and where its name is read
    assert mutants.statement_lines(text, 7) == {7, 8, 9, 10}
    assert mutants.statement_lines(text, 8) == {8}  # what is under it has lines of its own
    assert mutants.statement_lines(text, 9) == {9}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two functions, of which a test holds one."""
    for folder in ("rlhf_fast/room", "tests", "bench"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "rlhf_fast" / "__init__.py").touch()
    (tmp_path / "rlhf_fast" / "room" / "sums.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef less(a):\n    return a - 1\n"
    )
    (tmp_path / "rlhf_fast" / "room" / "alone.py").write_text("x = 1 + 2\n")
    (tmp_path / "tests" / "test_sums.py").write_text(
        "from rlhf_fast.room.sums import add\n\n\ndef test_add():\n    assert add(2, 5) == 7\n"
    )
    return tmp_path


def test_a_mistake_is_killed_or_survives_and_the_file_is_whole_again(project: Path) -> None:
    file = project / "rlhf_fast" / "room" / "sums.py"
    whole = file.read_text()
    outcomes = []
    for old, new in (("a + b", "a - b"), ("a - 1", "a - 2")):
        mutant = Mutant("rlhf_fast/room/sums.py", 2, "op", f"-{old}\n+{new}", whole.replace(old, new))
        outcome = mutants.attempt(mutant, project, 60.0)
        assert outcome is not None
        outcomes.append(outcome)
        assert file.read_text() == whole
    assert [one.killed for one in outcomes] == [True, False]
    assert "test_sums.py::test_add" in outcomes[0].by and outcomes[1].by.startswith("all passed")
    alone = mutants.attempt(Mutant("rlhf_fast/room/alone.py", 1, "op", "", "x = 1 - 2\n"), project, 60.0)
    assert alone is not None and (alone.killed, alone.by) == (False, "no test reaches it")
    shown = mutants.table([*outcomes, alone])
    assert "| room | 3 | 1 | 33% |" in shown and "+a - 2" in shown and "+a - b" not in shown


def test_a_test_that_fails_without_the_mistake_kills_nothing(project: Path) -> None:
    """Here each file's first test fails always; only of one of them does another test notice the mistake."""
    always = "def test_always():\n    assert False\n\n\n"
    test = project / "tests" / "test_sums.py"
    test.write_text(test.read_text().replace("def test_add", always + "def test_add"))
    whole = (project / "rlhf_fast" / "room" / "sums.py").read_text()
    for old, new, killed in (("a + b", "a - b", True), ("a - 1", "a - 2", False)):
        mutant = Mutant("rlhf_fast/room/sums.py", 2, "op", "", whole.replace(old, new))
        outcome = mutants.attempt(mutant, project, 60.0)
        assert outcome is not None and outcome.killed == killed
        assert ("test_sums.py::test_add" if killed else "1 passed, 1 deselected") in outcome.by


def test_drawing_from_a_project_takes_each_place_once(project: Path) -> None:
    found = drawn(3, 0, "rlhf_fast/room/alone", project)
    assert len({one.code for one in found}) == 3 and {one.file for one in found} == {"rlhf_fast/room/alone.py"}


def test_outcomes_are_in_the_order_of_drawing_and_what_does_not_compile_is_not_counted(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(mutant: Mutant, tree: Path, limit: float, covered: Any) -> Any:
        time.sleep(0.02 * max(5 - mutant.line, 0))  # the first take longest
        return mutants.Outcome("a", mutant.line, "a", "", "", True, "", 0.0) if mutant.line % 2 else None

    monkeypatch.setattr(mutants, "attempt", attempt)
    given = (Mutant("a", line, "", "", "") for line in range(100))
    trees = [tmp_path / "0", tmp_path / "1"]
    outcomes = mutants.run_mutants(given, 3, trees, 1.0, None, tmp_path / "out.jsonl")
    assert [one.line for one in outcomes] == [1, 3, 5]
    assert {one.line for one in mutants.read(tmp_path / "out.jsonl")} >= {1, 3, 5}


def covered(project: Path, name: str, seconds: dict[str, float], contexts: dict[int, list[str]]) -> Map:
    """A map as a run of the suite would leave it."""
    coverage = pytest.importorskip("coverage")
    folder = project / "build" / "covered"
    folder.mkdir(parents=True)
    data = coverage.CoverageData(str(folder / "all"))
    for line, tests in contexts.items():
        for test in tests:
            data.set_context(test)
            data.add_lines({str(project / name): [line]})
    data.write()
    states = {name: state(project / name)}
    (folder / "tests.json").write_text(json.dumps({"seconds": seconds, "states": states}))
    return Map(folder, project)


def test_the_tests_that_run_a_line_are_tried_the_nearest_and_quickest_first(project: Path) -> None:
    name = "rlhf_fast/room/sums.py"
    seconds = {"tests/test_a.py::one": 5.0, "tests/test_a.py::two": 1.0, "tests/test_sums.py::test_add": 2.0}
    seconds |= {"tests/test_b.py::x" + SETUP: 1.0, "tests/test_b.py::x": 1.0, "tests/test_b.py::y": 0.5}
    tests = ["tests/test_a.py::one", "tests/test_a.py::two", "tests/test_sums.py::test_add"]
    known = covered(project, name, seconds, {2: tests, 6: ["tests/test_b.py::x" + SETUP]})
    mutant = Mutant(name, 2, "", "", "")
    plan = mutants.plan_of_python(mutant, project, 60.0, known)
    assert plan.tests == ["tests/test_sums.py::test_add", "tests/test_a.py::two", "tests/test_a.py::one"]
    assert plan.expected == 8.0
    assert mutants.plan_of_python(mutant, project, 3.5, known).tests == plan.tests[:2]
    other = mutants.plan_of_python(Mutant(name, 6, "", "", ""), project, 60.0, known)
    assert other.tests == ["tests/test_b.py::y", "tests/test_b.py::x"]  # a fixture serves all of its file
    known.data.set_context("")
    known.data.add_lines({str(project / name): [6]})  # and while tests are collected: then the near ones, too
    nearer = mutants.plan_of_python(Mutant(name, 6, "", "", ""), project, 60.0, known)
    assert nearer.tests == [*other.tests, "tests/test_sums.py::test_add"]
    (project / name).write_text((project / name).read_text() + "\n")  # no longer what was watched
    assert mutants.plan_of_python(mutant, project, 60.0, known).tests == ["tests/test_sums.py"]


def test_a_run_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def attempt(mutant: Mutant, tree: Path, limit: float, covered: Any) -> Any:
        tried.append(mutant.line)
        return mutants.Outcome("a", mutant.line, "room", "", mutant.diff, mutant.line != 3, "", 0.0)

    monkeypatch.setattr(mutants, "attempt", attempt)
    monkeypatch.setattr(mutants, "copy_tree", lambda root, folder: folder)
    monkeypatch.setattr(mutants, "draw", lambda seed, room: (Mutant("a", n, "", str(n), "") for n in range(100)))
    monkeypatch.setattr(mutants, "FOLDER", tmp_path)
    out = ["--out", str(tmp_path / "out.jsonl")]
    assert mutants.main(["--count", "2", *out]) == 0 and tried == [0, 1]
    assert mutants.main(["--count", "5", "--resume", *out]) == 0 and tried == [0, 1, 2, 3, 4]
    assert [one.line for one in mutants.read(tmp_path / "out.jsonl")] == [0, 1, 2, 3, 4]
    assert "| all | 5 | 4 | 80% |" in capsys.readouterr().out
    assert mutants.main(["--count", "5", "--resume", *out]) == 0 and len(tried) == 5
