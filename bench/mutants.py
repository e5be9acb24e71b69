"""Deliberate mistakes, one at a time: does any test notice? `python -m bench.mutants --count 200 --seed 0`

A mutant is the source with one small change (an operator, a number, a branch), made by cosmic-ray. They are drawn over
the files by their lines, and of a file's changes each is as likely. Each is tried in a copy of the tree, by the tests
that reach its file (reach.py), until one fails. CONTRIBUTING.md says how to read what comes out.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.reach import reaching

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("demo/", "_C")  # of rlhf_fast: data, and what is compiled
# `is` for `==` is the same for most operands, and no decorator is taken away, since most are declarations.
USELESS = ("RemoveDecorator", "_Is", "_IsNot", "ExceptionReplacer")


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str  # in the project
    line: int
    operator: str
    diff: str
    code: str  # of the whole file, changed

    @property
    def room(self) -> str:
        parts = Path(self.file).parts
        return parts[1] if len(parts) > 2 else "rlhf_fast"


@dataclass(frozen=True)
class Outcome:
    file: str
    line: int
    room: str
    operator: str
    diff: str
    killed: bool
    by: str  # the test that failed, or why it is taken for killed
    seconds: float


def sources(root: Path = ROOT, room: str = "") -> list[Path]:
    """The files that mutants are made of."""
    files = sorted((root / "rlhf_fast").rglob("*.py"))
    named = {file: str(file.relative_to(root / "rlhf_fast")) for file in files}
    return [file for file, name in named.items() if not name.startswith(LEFT_OUT) and name.startswith(room)]


def draw(count: int, seed: int, root: Path = ROOT, room: str = "") -> Iterator[Mutant]:
    """So many mutants, the same for a seed and a state of the sources."""
    dice = random.Random(seed)
    files = sources(root, room)
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    made: set[str] = set()
    while count:
        (file,) = dice.choices(files, lines)
        text = file.read_text(encoding="utf-8")
        found = changes(text)
        if not found:
            continue
        place, operators = dice.choice(sorted(found.items()))
        mutant = mutate(file.relative_to(root), text, dice.choice(operators), place[1])
        if mutant is None or mutant.code in made or not is_visible(text, mutant):
            continue
        made.add(mutant.code)
        count -= 1
        yield mutant


def changes(text: str) -> dict[tuple[str, int], list[str]]:
    """The operators of cosmic-ray that can change each place: what stands there, and which of its kind it is."""
    import parso
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(parso.parse(text)))
    found: dict[tuple[str, int], list[str]] = {}
    for name in sorted(operator_names()):
        cls = get_operator(name)
        if cls.arguments() or any(part in name for part in USELESS):  # some would have to be told what to put there
            continue
        stands = name.rpartition("_")[0] or name  # ReplaceBinaryOperator_Add of ..._Add_Sub
        for place in range(sum(1 for node in nodes for _ in cls().mutation_positions(node))):
            found.setdefault((stands, place), []).append(name)
    return found


def mutate(file: Path, text: str, operator: str, place: int) -> Mutant | None:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutate_code(text, get_operator(operator)(), place)
    if code is None or code == text:
        return None
    old, new = text.splitlines(), code.splitlines()
    line = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))) + 1
    rows = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    diff = [row for row in rows if not row.startswith("@@")]
    return Mutant(str(file), line, operator.removeprefix("core/"), "\n".join(diff), code)


def is_visible(text: str, mutant: Mutant) -> bool:
    """Whether the program could differ: not in annotations, which nobody evaluates, nor under TYPE_CHECKING."""
    try:
        before, after = (ast.dump(_Bare().visit(ast.parse(code))) for code in (text, mutant.code))
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


def attempt(mutant: Mutant, tree: Path, limit: float) -> Outcome:
    """Run the tests that reach the mutant's file in a copy of the tree, until one fails."""
    file = tree / mutant.file
    whole = file.read_text(encoding="utf-8")
    tests = [str(test.relative_to(tree)) for test in reaching(file, tree)]
    started = time.monotonic()
    killed, by = False, "no test reaches it"
    if tests:
        file.write_text(mutant.code, encoding="utf-8")
        try:
            killed, by = _run(tests, tree, limit, interpreted=mutant.room == "kernels")
        finally:
            file.write_text(whole, encoding="utf-8")
    seconds = round(time.monotonic() - started, 1)
    return Outcome(mutant.file, mutant.line, mutant.room, mutant.operator, mutant.diff, killed, by, seconds)


def _run(tests: list[str], tree: Path, limit: float, interpreted: bool) -> tuple[bool, str]:
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if interpreted:
        words, environment["TRITON_INTERPRET"] = [*words, "-k", "triton"], "1"
    process = subprocess.Popen(
        words,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return False, f"passed for {limit:.0f} s, then stopped"
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if process.returncode == 0:
        return False, "all passed"
    return True, failed[0].split(" - ")[0] if failed else f"pytest ended with {process.returncode}"


def copy_of(root: Path, folder: Path) -> Path:
    """The tree as git knows it, with what is compiled."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    for compiled in (root / "rlhf_fast").glob("_C*.so"):
        shutil.copy2(compiled, folder / "rlhf_fast" / compiled.name)
    return folder


def table(outcomes: list[Outcome]) -> str:
    """Killed and survived by room, and every survivor."""
    rows = ["| room | mutants | killed | |", "|---|---|---|---|"]
    for room in [*sorted({one.room for one in outcomes}), "all"]:
        of = [one for one in outcomes if room in (one.room, "all")]
        killed = sum(one.killed for one in of)
        rows.append(f"| {room} | {len(of)} | {killed} | {killed / len(of):.0%} |")
    survivors = [one for one in outcomes if not one.killed]
    shown = [f"\n{one.file}:{one.line} {one.operator} ({one.by})\n{one.diff}" for one in survivors]
    return "\n".join([*rows, *shown])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--room", default="", help="only of files whose path below rlhf_fast begins so: trainers/")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of tests for each")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.jsonl", help="one outcome a line")
    given = parser.parse_args(words)
    outcomes: list[Outcome] = []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(given.out, "w", encoding="utf-8") as file:
        tree = copy_of(ROOT, Path(folder))
        started = time.monotonic()
        for number, mutant in enumerate(draw(given.count, given.seed, room=given.room), start=1):
            outcome = attempt(mutant, tree, given.limit)
            outcomes.append(outcome)
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            left = (time.monotonic() - started) / number * (given.count - number)
            said = f"killed by {outcome.by}" if outcome.killed else f"SURVIVED: {outcome.by}"
            print(
                f"[{number}/{given.count}, {left / 60:.0f} min left] {outcome.file}:{outcome.line} {said} "
                f"in {outcome.seconds:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
    print(table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
