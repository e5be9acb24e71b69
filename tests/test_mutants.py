"""The tool that makes deliberate mistakes: what it draws, which tests it runs for one, and what it says of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bench import mutants
from bench.reach import reaching

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("cosmic_ray")


def names(source: str) -> list[str]:
    return [str(test.relative_to(ROOT)) for test in reaching(ROOT / source, ROOT)]


def test_the_nearest_tests_come_first_and_distant_ones_are_reached() -> None:
    assert names("rlhf_fast/statistics/intervals.py")[0] == "tests/test_intervals.py"
    assert names("rlhf_fast/ops/gae.py")[0] == "tests/ops/test_gae.py"
    blocks = names("rlhf_fast/rollout/blocks.py")  # by way of scheduler, engine and generator
    assert "tests/rollout/test_generator.py" in blocks and "tests/test_intervals.py" not in blocks
    assert "tests/trainers/test_run_steps.py" in names("rlhf_fast/trainers/loop/steps.py")


def test_the_same_mutants_come_for_a_seed_and_each_changes_what_is_run() -> None:
    drawn, again, others = (list(mutants.draw(6, seed, room="trainers/")) for seed in (1, 1, 2))
    assert drawn == again and drawn != others
    for mutant in drawn:
        assert mutant.room == "trainers" and mutant.diff.count("\n") >= 1
        assert ast.dump(ast.parse(mutant.code)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))


def test_annotations_and_unevaluated_code_are_not_changed() -> None:
    text = "from __future__ import annotations\nx: int | None = None\ndef f(a: int | str) -> int | None: ...\n"
    changed = text.replace("a: int | str", "a: int + str")
    assert not mutants.is_visible(text, mutants.Mutant("a.py", 3, "", "", changed))
    assert mutants.is_visible(text, mutants.Mutant("a.py", 3, "", "", text.replace("= None", "= 1")))


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
        mutant = mutants.Mutant("rlhf_fast/room/sums.py", 2, "op", f"-{old}\n+{new}", whole.replace(old, new))
        outcomes.append(mutants.attempt(mutant, project, 60.0))
        assert file.read_text() == whole
    assert [one.killed for one in outcomes] == [True, False]
    assert "test_sums.py::test_add" in outcomes[0].by and outcomes[1].by == "all passed"
    alone = mutants.attempt(mutants.Mutant("rlhf_fast/room/alone.py", 1, "op", "", "x = 1 - 2\n"), project, 60.0)
    assert (alone.killed, alone.by) == (False, "no test reaches it")
    shown = mutants.table([*outcomes, alone])
    assert "| room | 3 | 1 | 33% |" in shown and "+a - 2" in shown and "+a - b" not in shown


def test_drawing_from_a_project_takes_each_place_once(project: Path) -> None:
    drawn = list(mutants.draw(3, 0, project, room="room/alone"))
    assert len({one.code for one in drawn}) == 3 and {one.file for one in drawn} == {"rlhf_fast/room/alone.py"}
