"""The rooms of the house: what each may import. A room imports those below it, and nobody's underscored names."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import rooms
from bench.reach import imports_of, module_of, python_files

ROOT = Path(__file__).resolve().parents[2]
ROOMS = """statistics machine kernels config runs ops data pages models rollout rewards feedback trainers.loop trainers
trainers.ppo evaluation planning pipeline doctor cli""".split()  # each below those that follow
FREE = ("rlhf_fast", "rlhf_fast.demo", "rlhf_fast.trainers")  # that only name what is elsewhere, or hold files


def room(module: str) -> str:
    parts = module.removeprefix("rlhf_fast.").split(".")
    deep = ".".join(parts[:2])
    return deep if deep in ROOMS else parts[0]


@pytest.mark.seconds(3)
def test_the_picture_of_the_rooms_is_of_these() -> None:
    """`python -m bench.rooms docs/pictures/rooms.svg` draws it again."""
    drawn = (ROOT / "docs" / "pictures" / "rooms.svg").read_text(encoding="utf-8")
    assert drawn == rooms.picture(rooms.imports(), "Rooms: each imports only what stands below it")
    assert "#cf222e" not in drawn  # no arrow goes up
    circle = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert rooms.picture(circle, "").count("#cf222e") == 2
    assert rooms.needed({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert rooms.ranks({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}


def modules() -> dict[str, Path]:
    return {module_of(file, ROOT): file for file in python_files(ROOT / "rlhf_fast")}


@pytest.mark.seconds(2)
def test_every_room_imports_only_those_below_it() -> None:
    files = modules()
    pairs = {
        (room(name), room(other))
        for name, file in files.items()
        for other in imports_of(file, name, files.keys())
        if name not in FREE and other not in FREE
    }
    assert {name for pair in pairs for name in pair} == set(ROOMS)
    assert [(a, b) for a, b in sorted(pairs) if ROOMS.index(a) < ROOMS.index(b)] == []


@pytest.mark.seconds(3)
def test_no_underscored_name_is_imported_from_another_room() -> None:
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_fast."):
                others = [f"{node.module}.{alias.name}" for alias in node.names]
                strange = [other for other in others if "._" in other and room(other) != room(name)]
                assert strange == [], name


CHANGING = """attention.Step engine.Statistics fitting.Fitting kl_controller.KLController pairs.PairGroup
sequence.Sequence token_budget.TokenBudget""".split()


@pytest.mark.seconds(3)
def test_a_dataclass_is_frozen_unless_it_is_known_to_change() -> None:
    """What is handed from room to room is changed by none of them."""
    found = {}
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                words = ast.unparse(decorator)
                if "dataclass" in words:
                    found[f"{name.rpartition('.')[2]}.{node.name}"] = "frozen=True" in words
    assert len(found) > 100
    assert sorted(name for name, frozen in found.items() if not frozen) == sorted(CHANGING)


def test_kernels_import_nothing_of_ours() -> None:
    files = modules()
    for name, file in files.items():
        if room(name) == "kernels":
            assert {room(other) for other in imports_of(file, name, files.keys())} <= {"kernels"}, name


FOUND = "import importlib.util, rlhf_fast; print(getattr(importlib.util.find_spec('kernels'), 'origin', None))"


@pytest.mark.parametrize("installed", [False, True])
def test_the_folder_of_kernels_shadows_no_package_of_that_name(installed: bool, tmp_path: Path) -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "rlhf_fast" / "kernels") == "../kernels"
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    said = subprocess.check_output([sys.executable, "-c", FOUND], cwd=ROOT, env=environment, text=True)
    assert said.strip() == (str(tmp_path / "kernels" / "__init__.py") if installed else "None")


@pytest.mark.parametrize("before", ["", "import sys, types; sys.modules['kernels'] = types.ModuleType('kernels'); "])
def test_a_folder_of_kernels_that_is_somebody_else_s_stays(before: str, tmp_path: Path) -> None:
    """Without an `__init__.py` as ours, on the path or already taken for a module."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "mine.py").write_text("x = 1\n")
    program = f"{before}import rlhf_fast, kernels; " + ("" if before else "import kernels.mine; ") + "print('there')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, env=environment) == b"there\n"


@pytest.mark.slow
@pytest.mark.seconds(3)
def test_a_wheel_and_an_sdist_have_the_kernels(tmp_path: Path) -> None:
    """Without a compiler, for it is the Python files that are looked at."""
    pytest.importorskip("setuptools")
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (tmp_path / name).symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file() and not name.startswith(("docs/", "bench/results")):
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "CC": "false", "CXX": "false", "RLHF_FAST_CUDA_ARCHS": ""}
    own = sorted(file.name for file in (ROOT / "kernels").iterdir() if file.suffix in (".py", ".json"))
    for kind, pattern in (("bdist_wheel", "*.whl"), ("sdist", "*.tar.gz")):
        command = [sys.executable, "setup.py", "-q", kind, "--dist-dir", "dist"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        (made,) = (tmp_path / "dist").glob(pattern)
        unpacked = tmp_path / kind
        shutil.unpack_archive(made, unpacked, "zip" if kind == "bdist_wheel" else "gztar")
        (folder,) = unpacked.rglob("rlhf_fast/kernels")
        assert not folder.is_symlink() and sorted(file.name for file in folder.iterdir()) == own
