"""Mutation testing: does any test fail for a deliberate mistake? `python -m bench.mutants --count 200 --seed 0`

A mutant is the source with one small change (an operator, a number, a branch; mutations.py). In a copy of the tree,
tests run until one fails: those that run the mutant's line where `python -m bench.covered` has been run on these
sources, else those that reach its file (reach.py), the nearest first. CONTRIBUTING.md says how to read the results.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.covered import FOLDER, Map
from bench.mutations import ROOT, Mutant, draw
from bench.reach import find_op_tests, find_tests
from tests.simt import build


@dataclass(frozen=True)
class Outcome:
    """Outcome of one mutant, a row of the results."""

    file: str
    line: int
    room: str
    operator: str
    diff: str
    killed: bool
    by: str  # the test that failed, or which tests passed
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Plan of the tests to run for a mutant."""

    tests: list[str]
    expected: float  # seconds that these tests take without the mistake; 0: unknown
    arguments: tuple[str, ...] = ()  # of pytest
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Verdict of a plan on a mutant."""

    killed: bool
    by: str  # as in Outcome
    test: str = ""  # the id of the test that failed


def attempt(mutant: Mutant, tree: Path, limit: float, covered: Map | None = None) -> Outcome | None:
    """Run a mutant's tests in a copy of the tree until one fails; None if it does not compile, or to the same code.

    Args:
        limit: seconds of tests.
    """
    file = tree / mutant.file
    original = file.read_text(encoding="utf-8")
    started = time.monotonic()
    environment: tuple[tuple[str, str], ...] = ()  # of a test without the mistake
    if file.suffix == ".py":
        plan = plan_of_python(mutant, tree, limit, covered)
        environment = plan.environment
        _put(file, mutant.code)
    else:
        before = libraries_of(file, tree)
        _put(file, mutant.code)
    try:
        if file.suffix != ".py":
            after = {side: build.library(side, tree) for side in before}
            if all(have_same_code(after[side], before[side]) for side in before):
                return None
            plan = plan_of_compiled(file, tree, after, limit, covered)
            environment = _environment_of(before)
        verdict = _verdict_of(plan, environment, file, mutant.code, original, tree, limit)
    except build.CompileError:
        return None
    finally:
        _put(file, original)
    seconds = round(time.monotonic() - started, 1)
    return Outcome(
        mutant.file, mutant.line, mutant.room, mutant.operator, mutant.diff, verdict.killed, verdict.by, seconds
    )


TIMES = itertools.count(1_000_000_000)


def _put(file: Path, text: str) -> None:
    """Write a source with a time that none before it had: Python takes byte code for that of a source by its second
    and its size, which two mistakes can have in common."""
    file.write_text(text, encoding="utf-8")
    second = next(TIMES)
    os.utime(file, (second, second))


def _verdict_of(
    plan: Plan, environment: tuple[tuple[str, str], ...], file: Path, code: str, original: str, tree: Path, limit: float
) -> Verdict:
    """Run a plan on a mutant. A test that fails without the mistake as well is deselected, and the others run again."""
    if not plan.tests:
        return Verdict(False, "no test reaches it")
    while True:
        verdict = _run(plan, tree, limit)
        if not verdict.test or verdict.test in plan.arguments:
            return verdict
        _put(file, original)
        alone = Plan([verdict.test], 0.0, plan.arguments, environment)
        if not _run(alone, tree, limit).killed:
            return verdict
        print(f"{verdict.test} fails without a mistake, too: left out", file=sys.stderr, flush=True)
        plan = replace(plan, arguments=(*plan.arguments, "--deselect", verdict.test))
        _put(file, code)


def libraries_of(file: Path, tree: Path) -> dict[str, Path]:
    """Build the libraries that a C++ or CUDA file is part of, by side ("cpu", "cuda")."""
    parts = {
        side: [source for source in build.sources(side, tree) if file == source or file in build.included(source, tree)]
        for side in ("cpu", "cuda")
    }
    if file.name in ("bindings.cpp", "isa.cpp"):  # both have them, and the CPU's build is quicker
        parts["cuda"] = []
    return {side: build.library(side, tree) for side, sources in parts.items() if sources}


def have_same_code(a: Path, b: Path) -> bool:
    """Return whether two libraries are equal, as when only a comment was changed, or what the compiler leaves out."""
    return a == b or a.read_bytes() == b.read_bytes()


def plan_of_compiled(file: Path, tree: Path, built: dict[str, Path], limit: float, covered: Map | None) -> Plan:
    """Choose the op tests of the sides that were built, those of the file's own op first."""
    module = _environment_of(built)
    near = [str(test.relative_to(tree)) for test in find_op_tests(file, tree)]
    if covered is None:
        sides = " or ".join(["fuzz", *built])
        return Plan(near, 0.0, ("-k", f"({sides}) and not triton and not reference"), module)
    tests_by_file = {
        name: [
            test
            for test in covered.of_file.get(name, ())
            if any(word in test for word in ("fuzz", *built)) and "triton" not in test and "reference" not in test
        ]
        for name in near
    }
    return _choose_tests(tests_by_file, limit, covered, module)


def _environment_of(built: dict[str, Path]) -> tuple[tuple[str, str], ...]:
    """Return the environment variables with which tests load a library that was built."""
    return (("RLHF_FAST_TEST_MODULE", str(built["cpu"])),) if "cpu" in built else ()


def _choose_tests(tests_by_file: dict[str, list[str]], limit: float, covered: Map, environment: Any = ()) -> Plan:
    """Choose as many tests as fit into `limit` seconds, file by file, the quickest of each first."""
    chosen: list[str] = []
    expected = 0.0
    for name, tests in tests_by_file.items():
        if not tests:
            continue
        expected += covered.setup(name)
        for test in sorted(tests, key=lambda test: (covered.seconds.get(test, 0.0), test)):
            if expected + covered.seconds.get(test, 0.0) <= limit or not chosen:
                chosen.append(test)
                expected += covered.seconds.get(test, 0.0)
        if expected > limit:
            break
    return Plan(chosen, expected, (), environment)


def plan_of_python(mutant: Mutant, tree: Path, limit: float, covered: Map | None) -> Plan:
    """Choose the tests that run a mutant's line, the nearest files first, as many as fit into the limit."""
    file = tree / mutant.file
    near = [str(test.relative_to(tree)) for test in find_tests(file, tree)]
    if mutant.room == "kernels":  # Triton interprets only if told before its import
        return Plan(near, 0.0, ("-k", "triton"), (("TRITON_INTERPRET", "1"),))
    lines = statement_lines(file.read_text(encoding="utf-8"), mutant.line)
    tests_by_file = covered.tests(mutant.file, lines) if covered else {}
    if not tests_by_file or covered is None:
        return Plan(near, 0.0)
    place = {name: i for i, name in enumerate(near)}
    names = sorted(tests_by_file, key=lambda name: (place.get(name, len(place)), name))
    plan = _choose_tests({name: tests_by_file[name] for name in names}, limit, covered)
    if covered.is_imported(mutant.file, lines):  # what an import does is seen by tests that do not do it themselves
        left = {name: covered.of_file.get(name, []) for name in near if name not in tests_by_file}
        more = _choose_tests(left, limit - plan.expected, covered)
        return Plan([*plan.tests, *more.tests], plan.expected + more.expected)
    return plan


def statement_lines(text: str, line: int) -> set[int]:
    """Return the lines of the smallest statement enclosing a line; for one of a function's head, all of it.

    An assignment in a module or a class runs before any test: the lines that mention its name are added.
    """
    tree = ast.parse(text)
    enclosing = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    smallest = min(enclosing, key=lambda node: (node.end_lineno or 0) - node.lineno, default=None)
    if smallest is None or isinstance(smallest, (ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try)):
        return {line}  # the head alone: statements in its body have lines of their own
    lines = set(range(smallest.lineno, (smallest.end_lineno or smallest.lineno) + 1))
    if isinstance(smallest, (ast.Assign, ast.AnnAssign)) and not any(isinstance(x, ast.FunctionDef) for x in enclosing):
        targets = smallest.targets if isinstance(smallest, ast.Assign) else [smallest.target]
        names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Name, ast.Attribute)):
                name = node.id if isinstance(node, ast.Name) else node.attr
                lines |= {node.lineno} if name in names else set()
    return lines


def _run(plan: Plan, tree: Path, limit: float) -> Verdict:
    """Run a plan's tests on the tree as it is, until one fails or the time is over."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each run compiles again what the last one had
    environment["RLHF_FAST_TEST_UNTIMED"] = "1"  # slower is not wrong
    process = subprocess.Popen(
        [*command, *plan.arguments, *plan.tests],
        cwd=tree,
        env={**environment, **dict(plan.environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    patience = 60 + 4 * plan.expected if plan.expected else limit
    try:
        output, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        if plan.expected:  # without the mistake they take less than a quarter of that
            return Verdict(True, f"did not end within {patience:.0f} s")
        return Verdict(False, f"passed for {limit:.0f} s, then stopped")
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if process.returncode in (0, 5):  # 5: no test was chosen
        return Verdict(False, f"all passed: {output.strip().splitlines()[-1]}")
    if not failed:
        return Verdict(True, f"pytest ended with {process.returncode}")
    by = failed[0].split(" - ")[0]
    return Verdict(True, by, by.partition(" ")[2])


def copy_tree(root: Path, folder: Path) -> Path:
    """Copy the files that git knows, and the compiled module, into `folder`; return that."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (root / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(os.readlink(root / name))
        elif (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    for compiled in (root / "rlhf_fast").glob("_C*.so"):
        shutil.copy2(compiled, folder / "rlhf_fast" / compiled.name)
    if (root / "build" / "simt").exists():
        shutil.copytree(root / "build" / "simt", folder / "build" / "simt")
    return folder


def run_mutants(
    mutants: Iterator[Mutant], count: int, trees: list[Path], limit: float, covered: Map | None, out: Path
) -> list[Outcome]:
    """Run the first `count` mutants that compile, one at a time in each tree; append outcomes to `out` as they come.

    Returns:
        The outcomes in the order of the mutants.
    """
    lock, outcomes, drawn = threading.Lock(), dict[int, Outcome](), 0

    def work(tree: Path) -> None:
        nonlocal drawn
        while True:
            with lock:
                mutant = next(mutants, None) if len(outcomes) < count else None
                number, drawn = drawn, drawn + 1
            if mutant is None:
                return
            outcome = attempt(mutant, tree, limit, covered)
            if outcome is not None:
                with lock:
                    outcomes[number] = outcome
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
                    text = f"killed by {outcome.by}" if outcome.killed else f"SURVIVED: {outcome.by}"
                    left = (time.monotonic() - started) / len(outcomes) * (count - len(outcomes)) / 60
                    print(
                        f"[{len(outcomes)}/{count}, {max(left, 0):.0f} min left] {outcome.file}:{outcome.line} {text} "
                        f"in {outcome.seconds:.0f} s", file=sys.stderr, flush=True,
                    )  # fmt: skip

    started = time.monotonic()
    with ThreadPoolExecutor(len(trees)) as pool:
        for future in [pool.submit(work, tree) for tree in trees]:
            future.result()
    return [outcomes[number] for number in sorted(outcomes)[:count]]


def table(outcomes: Iterable[Outcome]) -> str:
    """Write a Markdown table of killed mutants by room, and the diff of every survivor."""
    outcomes = list(outcomes)
    rows = ["| room | mutants | killed | |", "|---|---|---|---|"]
    for room in [*sorted({outcome.room for outcome in outcomes}), "all"]:
        in_room = [outcome for outcome in outcomes if room in (outcome.room, "all")]
        killed = sum(outcome.killed for outcome in in_room)
        rows.append(f"| {room} | {len(in_room)} | {killed} | {killed / max(len(in_room), 1):.0%} |")
    survivors = [outcome for outcome in outcomes if not outcome.killed]
    shown = [
        f"\n{outcome.file}:{outcome.line} {outcome.operator} ({outcome.by})\n{outcome.diff}" for outcome in survivors
    ]
    return "\n".join([*rows, *shown])


def as_json_lines(outcomes: Iterable[Outcome]) -> str:
    """Write outcomes as JSON Lines."""
    return "".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)


def read(file: Path) -> list[Outcome]:
    """Read the outcomes that `as_json_lines` has written."""
    return [Outcome(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--room", default="", help="only of files whose path begins so: rlhf_fast/trainers, csrc/cpu")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of tests for each")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--again", type=Path, help="an earlier --out of this count and seed: only try its survivors")
    parser.add_argument("--resume", action="store_true", help="go on with --out, of this seed and these sources")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.jsonl", help="one outcome a line")
    options = parser.parse_args(arguments)
    covered = Map() if (FOLDER / "tests.json").exists() else None
    if covered is None:
        print("by the tests that reach a file; python -m bench.covered finds those that run a line", file=sys.stderr)
    mutants, count, earlier = draw(options.seed, room=options.room), options.count, dict[tuple[str, str], Outcome]()
    if options.again:
        earlier = {(outcome.file, outcome.diff): outcome for outcome in read(options.again)}
        survivors = {place for place, outcome in earlier.items() if not outcome.killed}
        count = len(survivors)
        mutants = (mutant for mutant in mutants if (mutant.file, mutant.diff) in survivors)
    if options.resume and options.out.exists():
        earlier = {(outcome.file, outcome.diff): outcome for outcome in read(options.out)}
        count = max(options.count - len(earlier), 0)
        mutants = (mutant for mutant in mutants if (mutant.file, mutant.diff) not in earlier)
    with tempfile.TemporaryDirectory() as folder:
        trees = [copy_tree(ROOT, Path(folder) / str(job)) for job in range(options.jobs)]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(as_json_lines(earlier.values() if options.resume else ()), encoding="utf-8")
        outcomes = run_mutants(mutants, count, trees, options.limit, covered, options.out)
    earlier |= {(outcome.file, outcome.diff): outcome for outcome in outcomes}
    options.out.write_text(as_json_lines(earlier.values()), encoding="utf-8")
    print(table(earlier.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
