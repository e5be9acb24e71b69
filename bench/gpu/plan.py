"""Runs steps one after the other, each in a process of its own with a time limit, and keeps what each has found.

Whatever happens to a step, the others still run, and what it had written until then counts. Imports nothing but the
standard library, so that no broken installation can keep it from telling what is broken.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77  # a step's exit code that says: what it needs is not here
LEAST = 5.0  # seconds that a step is worth starting for


@dataclass(frozen=True)
class Step:
    """Command of one step, which appends its records, JSON Lines, to the file named in BENCH_RECORDS."""

    name: str
    seconds: float  # most that it may take
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Results:
    """Records of a run so far; written aside and renamed after each step."""

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)  # each with the step it came from

    @staticmethod
    def read(path: Path) -> Results:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Results(path, kept["steps"], kept["records"])

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(self.path.name + ".new")
        content = {"steps": self.steps, "records": self.records}
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)

    @property
    def failed(self) -> list[str]:
        return [name for name, step in self.steps.items() if step["state"] not in ("done", "skipped")]


def run(steps: Sequence[Step], results: Results, log: Path, budget: float) -> None:
    """Run those that `results` does not hold as done, in their order, within so many seconds in all."""
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as shown:
        for step in steps:
            if results.steps.get(step.name, {}).get("state") == "done":
                print(f"{step.name:12} done earlier", flush=True)
                continue
            left = budget - (time.monotonic() - started)
            results.records = [record for record in results.records if record["step"] != step.name]
            if left < LEAST:
                results.steps[step.name] = {"state": "not started", "seconds": 0.0, "detail": "the time was over"}
            else:
                print(f"{step.name:12} at most {min(step.seconds, left):.0f} s ...", flush=True)
                shown.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
                shown.flush()
                outcome, records = _run_one(step, min(step.seconds, left), shown)
                results.steps[step.name] = outcome
                results.records += [{"step": step.name, **record} for record in records]
            about = results.steps[step.name]
            print(f"{step.name:12} {about['state']} after {about['seconds']:.0f} s  {about['detail']}", flush=True)
            results.write()


def _run_one(step: Step, seconds: float, shown: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        environment = {**os.environ, **step.environment, "BENCH_RECORDS": str(records)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        begun, where = time.monotonic(), shown.tell()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=shown, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            state = {0: "done", SKIPPED: "skipped"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            code, state = None, "timed out"
        except BaseException:
            _end(process)
            raise
        _end(process)  # also what it has left behind
        detail = "" if state == "done" else _last_line(Path(shown.name), where)
        if state == "failed":
            detail = (f"signal {-code}" if code is not None and code < 0 else f"exit code {code}") + f": {detail}"
        about = {"state": state, "seconds": round(time.monotonic() - begun, 1), "detail": detail[:300]}
        return about, list(_whole_lines(records))


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path, where: int) -> str:
    """Return the last line that a step printed."""
    with log.open("rb") as file:
        file.seek(where)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file whose last line may have been cut off by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
