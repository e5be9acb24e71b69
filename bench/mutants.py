"""Deliberate mistakes, one at a time: does any test notice? `python -m bench.mutants --count 200 --seed 0`

A mutant is the source with one small change (an operator, a number, a branch; mutations.py). Each is tried in a copy of
the tree, until a test fails: by the tests that run its line where `python -m bench.covered` has been run on these
sources, else by those that reach its file (reach.py), the nearest first. CONTRIBUTING.md says how to read it.
"""

from __future__ import annotations

import argparse
import ast
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
from bench.reach import reaching, reaching_compiled
from tests.simt import build


@dataclass(frozen=True)
class Outcome:
    file: str
    line: int
    room: str
    operator: str
    diff: str
    killed: bool
    by: str  # the test that failed, or what was run in vain
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Tests that are run for a mutant."""

    tests: list[str]
    expected: float  # seconds that these tests took without the mistake; 0 where nobody knows
    words: tuple[str, ...] = ()  # of pytest
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a run of a plan says."""

    killed: bool
    by: str
    test: str = ""  # the one that failed, for pytest


def attempt(mutant: Mutant, tree: Path, limit: float, covered: Map | None = None) -> Outcome | None:
    """Run a mutant's tests in a copy of the tree until one fails. None if it does not compile, or to the same code."""
    file = tree / mutant.file
    whole = file.read_text(encoding="utf-8")
    started = time.monotonic()
    environment: tuple[tuple[str, str], ...] = ()  # of a test without the mistake
    if file.suffix == ".py":
        plan = plan_of_python(mutant, tree, limit, covered)
        environment = plan.environment
        file.write_text(mutant.code, encoding="utf-8")
    else:
        before = compiled_sides(file, tree)
        file.write_text(mutant.code, encoding="utf-8")
    try:
        if file.suffix != ".py":
            after = {side: build.library(side, tree) for side in before}
            if all(same(after[side], before[side]) for side in before):
                return None
            plan = plan_of_compiled(file, tree, after, limit, covered)
            environment = _module_of(before)
        verdict = _noticed(plan, environment, file, mutant.code, whole, tree, limit)
    except build.CompileError:
        return None
    finally:
        file.write_text(whole, encoding="utf-8")
    seconds = round(time.monotonic() - started, 1)
    return Outcome(
        mutant.file, mutant.line, mutant.room, mutant.operator, mutant.diff, verdict.killed, verdict.by, seconds
    )


def _noticed(
    plan: Plan, environment: tuple[tuple[str, str], ...], file: Path, code: str, whole: str, tree: Path, limit: float
) -> Verdict:
    """What the tests say of a mistake. A test that fails without it, too, is left out: it notices something else."""
    if not plan.tests:
        return Verdict(False, "no test reaches it")
    while True:
        verdict = _run(plan, tree, limit)
        if not verdict.test or verdict.test in plan.words:
            return verdict
        file.write_text(whole, encoding="utf-8")
        alone = Plan([verdict.test], 0.0, plan.words, environment)
        if not _run(alone, tree, limit).killed:
            return verdict
        print(f"{verdict.test} fails without a mistake, too: left out", file=sys.stderr, flush=True)
        plan = replace(plan, words=(*plan.words, "--deselect", verdict.test))
        file.write_text(code, encoding="utf-8")


def compiled_sides(file: Path, tree: Path) -> dict[str, Path]:
    """The modules that a C++ or CUDA file is part of, as they are without a mistake."""
    parts = {
        side: [source for source in build.sources(side, tree) if file == source or file in build.included(source, tree)]
        for side in ("cpu", "cuda")
    }
    if file.name in ("bindings.cpp", "isa.cpp"):  # where both have it, what the CPU's does is seen more quickly
        parts["cuda"] = []
    return {side: build.library(side, tree) for side, of in parts.items() if of}


def same(a: Path, b: Path) -> bool:
    """Return whether two modules have the same code: a comment was changed, or what the compiler leaves out."""
    return a == b or a.read_bytes() == b.read_bytes()


def plan_of_compiled(file: Path, tree: Path, built: dict[str, Path], limit: float, covered: Map | None) -> Plan:
    """The op tests of the sides that were built, those of the file's own op first."""
    module = _module_of(built)
    near = [str(test.relative_to(tree)) for test in reaching_compiled(file, tree)]
    if covered is None:
        sides = " or ".join(["fuzz", *built])
        return Plan(near, 0.0, ("-k", f"({sides}) and not triton and not reference"), module)
    known = {
        name: [
            test
            for test in covered.of_file.get(name, ())
            if any(word in test for word in ("fuzz", *built)) and "triton" not in test and "reference" not in test
        ]
        for name in near
    }
    return _fitting(known, limit, covered, module)


def _module_of(built: dict[str, Path]) -> tuple[tuple[str, str], ...]:
    """The environment in which the tests take a module that was built."""
    return (("RLHF_FAST_TEST_MODULE", str(built["cpu"])),) if "cpu" in built else ()


def _fitting(known: dict[str, list[str]], limit: float, covered: Map, environment: Any = ()) -> Plan:
    """Choose as many tests as take no longer than the limit, file by file, of each the quickest first."""
    chosen: list[str] = []
    expected = 0.0
    for name, tests in known.items():
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
    near = [str(test.relative_to(tree)) for test in reaching(file, tree)]
    if mutant.room == "kernels":  # the tests of Triton, which has to be told before it is imported
        return Plan(near, 0.0, ("-k", "triton"), (("TRITON_INTERPRET", "1"),))
    lines = statement(file.read_text(encoding="utf-8"), mutant.line)
    known = covered.tests(mutant.file, lines) if covered else {}
    if not known or covered is None:
        return Plan(near, 0.0)
    place = {name: i for i, name in enumerate(near)}
    names = sorted(known, key=lambda name: (place.get(name, len(place)), name))
    plan = _fitting({name: known[name] for name in names}, limit, covered)
    if covered.is_imported(mutant.file, lines):  # what an import does is seen by tests that do not do it themselves
        left = {name: covered.of_file.get(name, []) for name in near if name not in known}
        more = _fitting(left, limit - plan.expected, covered)
        return Plan([*plan.tests, *more.tests], plan.expected + more.expected)
    return plan


def statement(text: str, line: int) -> set[int]:
    """The lines of the smallest statement around one; of a whole function for those of its head.

    What a module or a class assigns is run by nobody's test: with it come the lines that mention its name.
    """
    tree = ast.parse(text)
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    inner = min(around, key=lambda node: (node.end_lineno or 0) - node.lineno, default=None)
    if inner is None or isinstance(inner, (ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try)):
        return {line}  # its head: what is in it has lines of its own
    lines = set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    if isinstance(inner, (ast.Assign, ast.AnnAssign)) and not any(isinstance(x, ast.FunctionDef) for x in around):
        targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
        names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Name, ast.Attribute)):
                name = node.id if isinstance(node, ast.Name) else node.attr
                lines |= {node.lineno} if name in names else set()
    return lines


def _run(plan: Plan, tree: Path, limit: float) -> Verdict:
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["RLHF_FAST_TEST_UNTIMED"] = "1"  # slower is not wrong
    process = subprocess.Popen(
        [*words, *plan.words, *plan.tests],
        cwd=tree,
        env={**environment, **dict(plan.environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    patience = 60 + 4 * plan.expected if plan.expected else limit
    try:
        said, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        if plan.expected:  # they would have ended long since
            return Verdict(True, f"did not end within {patience:.0f} s")
        return Verdict(False, f"passed for {limit:.0f} s, then stopped")
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if process.returncode in (0, 5):  # 5: no test was chosen
        return Verdict(False, f"all passed: {said.strip().splitlines()[-1]}")
    if not failed:
        return Verdict(True, f"pytest ended with {process.returncode}")
    by = failed[0].split(" - ")[0]
    return Verdict(True, by, by.partition(" ")[2])


def copy_of(root: Path, folder: Path) -> Path:
    """The tree as git knows it, with what is compiled."""
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


def tried(
    mutants: Iterator[Mutant], count: int, trees: list[Path], limit: float, covered: Map | None, out: Path
) -> list[Outcome]:
    """The outcomes of the first `count` mutants that can be compiled, in their order; a process for each tree."""
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
                    said = f"killed by {outcome.by}" if outcome.killed else f"SURVIVED: {outcome.by}"
                    left = (time.monotonic() - started) / len(outcomes) * (count - len(outcomes)) / 60
                    print(
                        f"[{len(outcomes)}/{count}, {max(left, 0):.0f} min left] {outcome.file}:{outcome.line} {said} "
                        f"in {outcome.seconds:.0f} s", file=sys.stderr, flush=True,
                    )  # fmt: skip

    started = time.monotonic()
    with ThreadPoolExecutor(len(trees)) as pool:
        for done in [pool.submit(work, tree) for tree in trees]:
            done.result()
    return [outcomes[number] for number in sorted(outcomes)[:count]]


def table(outcomes: Iterable[Outcome]) -> str:
    """Killed and survived by room, and every survivor."""
    outcomes = list(outcomes)
    rows = ["| room | mutants | killed | |", "|---|---|---|---|"]
    for room in [*sorted({one.room for one in outcomes}), "all"]:
        of = [one for one in outcomes if room in (one.room, "all")]
        killed = sum(one.killed for one in of)
        rows.append(f"| {room} | {len(of)} | {killed} | {killed / max(len(of), 1):.0%} |")
    survivors = [one for one in outcomes if not one.killed]
    shown = [f"\n{one.file}:{one.line} {one.operator} ({one.by})\n{one.diff}" for one in survivors]
    return "\n".join([*rows, *shown])


def lines_of(outcomes: Iterable[Outcome]) -> str:
    return "".join(json.dumps(asdict(one)) + "\n" for one in outcomes)


def read(file: Path) -> list[Outcome]:
    return [Outcome(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--room", default="", help="only of files whose path begins so: rlhf_fast/trainers, csrc/cpu")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of tests for each")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--again", type=Path, help="an earlier --out of this count and seed: only try its survivors")
    parser.add_argument("--resume", action="store_true", help="go on with --out, of this seed and these sources")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.jsonl", help="one outcome a line")
    given = parser.parse_args(words)
    covered = Map() if (FOLDER / "tests.json").exists() else None
    if covered is None:
        print("by the tests that reach a file; python -m bench.covered finds those that run a line", file=sys.stderr)
    mutants, count, before = draw(given.seed, room=given.room), given.count, dict[tuple[str, str], Outcome]()
    if given.again:
        before = {(one.file, one.diff): one for one in read(given.again)}
        survivors = {place for place, one in before.items() if not one.killed}
        count = len(survivors)
        mutants = (mutant for mutant in mutants if (mutant.file, mutant.diff) in survivors)
    if given.resume and given.out.exists():
        before = {(one.file, one.diff): one for one in read(given.out)}
        count = max(given.count - len(before), 0)
        mutants = (mutant for mutant in mutants if (mutant.file, mutant.diff) not in before)
    with tempfile.TemporaryDirectory() as folder:
        trees = [copy_of(ROOT, Path(folder) / str(job)) for job in range(given.jobs)]
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(lines_of(before.values() if given.resume else ()), encoding="utf-8")
        outcomes = tried(mutants, count, trees, given.limit, covered, given.out)
    before |= {(one.file, one.diff): one for one in outcomes}
    given.out.write_text(lines_of(before.values()), encoding="utf-8")
    print(table(before.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
