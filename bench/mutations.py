"""Draw the mutants of `make mutants`, by a seed: a file, a place in it, and a change of that place.

Changes of Python are cosmic-ray's, those of C++ and CUDA the rules of universalmutator.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.reach import python_files

ROOT = Path(__file__).resolve().parents[1]
EXCLUDED = ("rlhf_fast/demo/", "rlhf_fast/_C")  # data, and what is compiled
CPLUSPLUS = (".cpp", ".h", ".cu", ".cuh")
# `is` for `==` is the same for most operands, and no decorator is taken away, since most are declarations.
EXCLUDED_OPERATORS = ("RemoveDecorator", "_Is", "_IsNot", "ExceptionReplacer")


@dataclass(frozen=True)
class Mutant:
    """Mutant: the source with a change of one place in one file."""

    file: str  # in the project
    line: int
    operator: str
    diff: str
    code: str  # of the whole file, changed

    @property
    def room(self) -> str:
        """Name of the room that the file is in: "trainers", "csrc/cpu"."""
        top, *parts = Path(self.file).parts
        if top == "csrc":
            return f"csrc/{parts[0]}" if len(parts) > 1 else "csrc"
        return parts[0] if len(parts) > 1 else top


def sources(root: Path = ROOT, room: str = "") -> list[Path]:
    """List the files to mutate whose path begins with `room` (`rlhf_fast/trainers`, `csrc/cpu`)."""
    files = python_files(root / "rlhf_fast")
    files += [file for file in sorted((root / "csrc").rglob("*")) if file.suffix in CPLUSPLUS]
    named = {file: file.relative_to(root).as_posix() for file in files}
    return [file for file, name in named.items() if not name.startswith(EXCLUDED) and name.startswith(room)]


def draw(seed: int, root: Path = ROOT, room: str = "") -> Iterator[Mutant]:
    """Draw mutants without end, none twice, from files by their number of lines; the same for a seed and sources."""
    rng = random.Random(seed)
    files = sources(root, room)
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    made: set[tuple[str, str]] = set()
    while True:
        (file,) = rng.choices(files, lines)
        text = file.read_text(encoding="utf-8")
        mutate = mutate_python if file.suffix == ".py" else mutate_cplusplus
        mutant = mutate(str(file.relative_to(root)), text, rng)
        if mutant is not None and (mutant.file, mutant.code) not in made:
            made.add((mutant.file, mutant.code))
            yield mutant


def mutate_python(file: str, text: str, rng: random.Random) -> Mutant | None:
    """Apply one of cosmic-ray's operators, each place being as likely; None if that changes nothing that runs."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    places = _places(text)
    if not places:
        return None
    place, operators = rng.choice(sorted(places.items()))
    operator = rng.choice(operators)
    code = mutate_code(text, get_operator(operator)(), place[1])
    if code is None or code == text or not is_visible(text, code):
        return None
    return _mutant(file, text, code, operator.removeprefix("core/"))


@functools.lru_cache(maxsize=64)
def _places(text: str) -> dict[tuple[str, int], list[str]]:
    """Find the places that cosmic-ray can change, (syntax, its number in the file), and the operators for each."""
    import parso
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(parso.parse(text)))
    found: dict[tuple[str, int], list[str]] = {}
    counts: dict[str, int] = {}
    for name in sorted(operator_names()):
        cls = get_operator(name)
        if cls.arguments() or any(part in name for part in EXCLUDED_OPERATORS):  # some need arguments
            continue
        syntax = name.rpartition("_")[0] or name  # ReplaceBinaryOperator_Add of ..._Add_Sub
        source = name if "_Delete_" in name else syntax  # operators on the same syntax find the same places
        if source not in counts:
            counts[source] = sum(1 for node in nodes for _ in cls().mutation_positions(node))
        for place in range(counts[source]):
            found.setdefault((syntax, place), []).append(name)
    return found


def mutate_cplusplus(file: str, text: str, rng: random.Random) -> Mutant | None:
    """Apply one of universalmutator's rules, each line as likely. The result may not compile; None if none fits."""
    changes, lines = _changes(text), text.splitlines(keepends=True)
    if not changes:
        return None
    number = rng.choice(sorted({line for line, *_ in changes}))
    new, rule = rng.choice([(changed, rule) for line, changed, rule, _ in changes if line == number])
    code = "".join([*lines[: number - 1], new, *lines[number:]])
    return _mutant(file, text, code, rule[0].strip())


@functools.lru_cache(maxsize=64)
def _changes(text: str) -> list[tuple[int, str, tuple[str, ...], object]]:
    """List the changes by universalmutator's rules: line number, changed line, rule."""
    from universalmutator.mutator import mutants_regexp

    rules = ["universal.rules", "c_like.rules", "cpp.rules"]
    lines = text.splitlines(keepends=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        found = mutants_regexp(lines, rules, ignorePatterns=[r"^\s*//", r"^#"], ignoreStringOnly=True)
    # A digit within a name (int64_t) is not a number.
    return [
        change for change in found if "\\d" not in change[2][0] or _names(change[1]) <= _names(lines[change[0] - 1])
    ]


def _names(line: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", line))


def _mutant(file: str, text: str, code: str, operator: str) -> Mutant:
    old, new = text.splitlines(), code.splitlines()
    line = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))) + 1
    rows = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    return Mutant(file, line, operator, "\n".join(row for row in rows if not row.startswith("@@")), code)


def is_visible(text: str, code: str) -> bool:
    """Return whether a change can show when the program runs: not in annotations, docstrings or under TYPE_CHECKING."""
    try:
        before, after = (ast.dump(_StripTypes().visit(ast.parse(each))) for each in (text, code))
    except SyntaxError:
        return False
    return before != after


class _StripTypes(ast.NodeTransformer):
    """Transformer that removes annotations, and code under TYPE_CHECKING."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        self.generic_visit(node)
        return node
