"""Find which tests reach a source file: by the imports of both, the nearest first.

A test is as far from a module as there are imports between them. `from rlhf_fast import models` is one to the package
models, whose __init__ imports its files.
"""

from __future__ import annotations

import ast
import functools
import os
from collections import deque
from collections.abc import Collection
from pathlib import Path

from tests.simt.build import included

ROOTS = ("rlhf_fast", "tests", "bench")


def find_tests(source: Path, root: Path, farthest: int = 4) -> list[Path]:
    """List the test files that import a Python file, directly or through others: those of its own name first, then
    unit tests, then the rest, each group by the number of imports between.

    Args:
        source: the file.
        root: the folder of the project.
        farthest: the most imports between a test and the file.
    """
    imported_by: dict[str, set[str]] = {}
    files = {module_of(file, root): file for name in ROOTS for file in python_files(root / name)}
    for name, file in files.items():
        for other in imports_of(file, name, files.keys()):
            imported_by.setdefault(other, set()).add(name)
    start = module_of(source, root)
    distance, queue = {start: 0}, deque([start])
    while queue:
        module = queue.popleft()
        if distance[module] == farthest:
            continue
        for other in sorted(imported_by.get(module, ())):
            if other not in distance:
                distance[other] = distance[module] + 1
                queue.append(other)
    stem = source.parent.name if source.stem == "__init__" else source.stem
    tests = [name for name in distance if files[name].name.startswith("test_")]

    def rank(name: str) -> tuple[bool, bool, int, str]:
        other = stem.strip("_") not in files[name].stem
        return other, not name.startswith("tests.unit."), distance[name], name

    return [files[name] for name in sorted(tests, key=rank)]


def python_files(folder: Path) -> list[Path]:
    """List the Python files below a folder, through symbolic links too (rlhf_fast/kernels is one)."""
    files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(file for file in files if file.suffix == ".py")


def find_op_tests(source: Path, root: Path) -> list[Path]:
    """List the op tests for a file of csrc/ or kernels/: first those named like a kernel that includes it, then those
    that mention such a kernel, then the rest.

    Args:
        source: the file.
        root: the folder of the project.
    """
    kernels = [file for file in sorted((root / "csrc").rglob("*")) if file.suffix in (".cpp", ".cu")]
    own = [file for file in kernels if file == source or source in included(file, root)]
    stems = sorted({file.stem for file in own if file.stem != "bindings"}) or [source.stem]
    tests = sorted((root / "tests" / "unit" / "ops").glob("test_*.py"))

    def distance(test: Path) -> int:
        if any(stem in test.stem for stem in stems):
            return 0
        text = test.read_text(encoding="utf-8")
        return 1 if any(stem in text for stem in stems) else 2

    return sorted(tests, key=lambda test: (distance(test), test.name))


def module_of(file: Path, root: Path) -> str:
    """Name the module of a Python file of the project: "rlhf_fast.ops.gae"."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, name: str, known: Collection[str]) -> set[str]:
    """List the modules of the project that a file imports, within functions too.

    Args:
        name: the file's own module.
        known: all modules of the project.
    """
    imported: set[str] = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in _import_statements(file, file.stat().st_mtime_ns):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        else:
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{parent}.{base}".rstrip(".")
            names = {f"{base}.{alias.name}" for alias in node.names}
            modules = {each for each in names if each in known}
            imported |= modules if modules == names else {*modules, base}  # the other names are defined in `base`
    return {module for module in imported if module in known and module != name}


@functools.cache
def _import_statements(file: Path, changed: int) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Parse the import statements of a file; cached by its time of change, as each search parses all files."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
