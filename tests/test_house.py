"""The rooms of the house: what each may import. A room imports those below it, and nobody's underscored names."""

from __future__ import annotations

import ast
from pathlib import Path

from bench.reach import imports_of, module_of, python_files

ROOT = Path(__file__).resolve().parents[1]
ROOMS = """statistics machine kernels config runs ops data pages models rollout rewards feedback trainers.loop trainers
trainers.ppo evaluation planning pipeline doctor cli""".split()  # each below those that follow
FREE = ("rlhf_fast", "rlhf_fast.demo", "rlhf_fast.trainers")  # that only name what is elsewhere, or hold files


def room(module: str) -> str:
    parts = module.removeprefix("rlhf_fast.").split(".")
    deep = ".".join(parts[:2])
    return deep if deep in ROOMS else parts[0]


def modules() -> dict[str, Path]:
    return {module_of(file, ROOT): file for file in python_files(ROOT / "rlhf_fast")}


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


def test_no_underscored_name_is_imported_from_another_room() -> None:
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_fast."):
                others = [f"{node.module}.{alias.name}" for alias in node.names]
                strange = [other for other in others if "._" in other and room(other) != room(name)]
                assert strange == [], name


def test_kernels_import_nothing_of_ours() -> None:
    files = modules()
    for name, file in files.items():
        if room(name) == "kernels":
            assert {room(other) for other in imports_of(file, name, files.keys())} <= {"kernels"}, name
