"""The deliberate mistakes of `make mutants`: which can be made of a file, and drawing them by a seed.

Python's are made by cosmic-ray, those of C++ and CUDA by the rules of universalmutator.
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
LEFT_OUT = ("rlhf_fast/demo/", "rlhf_fast/_C")  # data, and what is compiled
CPLUSPLUS = (".cpp", ".h", ".cu", ".cuh")
# `is` for `==` is the same for most operands, and no decorator is taken away, since most are declarations.
USELESS = ("RemoveDecorator", "_Is", "_IsNot", "ExceptionReplacer")


@dataclass(frozen=True)
class Mutant:
    """Change of one place in one file."""

    file: str  # in the project
    line: int
    operator: str
    diff: str
    code: str  # of the whole file, changed

    @property
    def room(self) -> str:
        top, *parts = Path(self.file).parts
        if top == "csrc":
            return f"csrc/{parts[0]}" if len(parts) > 1 else "csrc"
        return parts[0] if len(parts) > 1 else top


def sources(root: Path = ROOT, room: str = "") -> list[Path]:
    """The files that mutants are made of, of rooms whose path begins so (`rlhf_fast/trainers`, `csrc/cpu`)."""
    files = python_files(root / "rlhf_fast")
    files += [file for file in sorted((root / "csrc").rglob("*")) if file.suffix in CPLUSPLUS]
    named = {file: file.relative_to(root).as_posix() for file in files}
    return [file for file, name in named.items() if not name.startswith(LEFT_OUT) and name.startswith(room)]


def draw(seed: int, root: Path = ROOT, room: str = "") -> Iterator[Mutant]:
    """Mutants without end, each once, over the files by their lines; the same for a seed and a state of the sources."""
    dice = random.Random(seed)
    files = sources(root, room)
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    made: set[tuple[str, str]] = set()
    while True:
        (file,) = dice.choices(files, lines)
        text = file.read_text(encoding="utf-8")
        of = of_python if file.suffix == ".py" else of_cplusplus
        mutant = of(str(file.relative_to(root)), text, dice)
        if mutant is not None and (mutant.file, mutant.code) not in made:
            made.add((mutant.file, mutant.code))
            yield mutant


def of_python(file: str, text: str, dice: random.Random) -> Mutant | None:
    """Draw one of the changes of cosmic-ray's operators: each place is as likely."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    found = _places(text)
    if not found:
        return None
    place, operators = dice.choice(sorted(found.items()))
    operator = dice.choice(operators)
    code = mutate_code(text, get_operator(operator)(), place[1])
    if code is None or code == text or not is_visible(text, code):
        return None
    return _mutant(file, text, code, operator.removeprefix("core/"))


@functools.lru_cache(maxsize=64)
def _places(text: str) -> dict[tuple[str, int], list[str]]:
    """The operators of cosmic-ray that can change each place: what stands there, and which of its kind it is."""
    import parso
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(parso.parse(text)))
    found: dict[tuple[str, int], list[str]] = {}
    counts: dict[str, int] = {}
    for name in sorted(operator_names()):
        cls = get_operator(name)
        if cls.arguments() or any(part in name for part in USELESS):  # some would have to be told what to put there
            continue
        stands = name.rpartition("_")[0] or name  # ReplaceBinaryOperator_Add of ..._Add_Sub
        source = name if "_Delete_" in name else stands  # what one finds, all do that change the same
        if source not in counts:
            counts[source] = sum(1 for node in nodes for _ in cls().mutation_positions(node))
        for place in range(counts[source]):
            found.setdefault((stands, place), []).append(name)
    return found


def of_cplusplus(file: str, text: str, dice: random.Random) -> Mutant | None:
    """Draw one of the changes of universalmutator's rules: each line is as likely. It may not compile."""
    changes, lines = _changes(text), text.splitlines(keepends=True)
    if not changes:
        return None
    number = dice.choice(sorted({line for line, *_ in changes}))
    new, rule = dice.choice([(changed, rule) for line, changed, rule, _ in changes if line == number])
    code = "".join([*lines[: number - 1], new, *lines[number:]])
    return _mutant(file, text, code, rule[0].strip())


@functools.lru_cache(maxsize=64)
def _changes(text: str) -> list[tuple[int, str, tuple[str, ...], object]]:
    """List what the rules of universalmutator make of each line: its number, the line changed, the rule."""
    from universalmutator.mutator import mutants_regexp

    rules = ["universal.rules", "c_like.rules", "cpp.rules"]
    lines = text.splitlines(keepends=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        found = mutants_regexp(lines, rules, ignorePatterns=[r"^\s*//", r"^#"], ignoreStringOnly=True)
    # A digit of a name (int64_t) is none of its own.
    return [one for one in found if "\\d" not in one[2][0] or _names(one[1]) <= _names(lines[one[0] - 1])]


def _names(line: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", line))


def _mutant(file: str, text: str, code: str, operator: str) -> Mutant:
    old, new = text.splitlines(), code.splitlines()
    line = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))) + 1
    rows = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    return Mutant(file, line, operator, "\n".join(row for row in rows if not row.startswith("@@")), code)


def is_visible(text: str, code: str) -> bool:
    """Return whether the program could differ: not in annotations, which nobody evaluates, nor under TYPE_CHECKING."""
    try:
        before, after = (ast.dump(_Bare().visit(ast.parse(each))) for each in (text, code))
    except SyntaxError:
        return False
    return before != after


class _Bare(ast.NodeTransformer):
    """Takes annotations and docstrings away."""

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
