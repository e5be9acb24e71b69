"""The benchmark beside TRL: its processes, its own side, and its table. TRL itself is no dependency."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import harness, training

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")

FAKE = """
import sys
for i, line in enumerate(sys.stdin):
    print('{"seconds": %d, "tokens": 4, "peak_mib": %d}' % (10 * i, 100 - i), flush=True)
    if i == 2:
        sys.exit(3)
"""
SIDE = "ours = lambda name, out, wait, tell: [(print('a library talks'), tell(1.5, 7.0)) for _ in iter(wait, False)]"


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> training.Side:
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: popen([sys.executable, "-c", FAKE], **how))
    return training.Side("PPO, ours", open("/dev/null", "w"))  # closed with the process


def test_the_first_step_of_a_side_is_not_counted_and_an_end_is_told(side: training.Side) -> None:
    assert side.steps == []
    assert [side.step()["seconds"] for _ in range(2)] == [10, 20]
    with pytest.raises(RuntimeError, match="PPO, ours ended with 3"):
        side.step()
    assert len(side.steps) == 2


def test_a_round_is_compared_with_itself(side: training.Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", type("TRL", (), {"__version__": "1.0"}))
    side.steps = [{"seconds": s, "tokens": 40.0, "peak_mib": 100.0 + s} for s in (10.0, 20.0, 10.0)]
    other = training.Side.__new__(training.Side)
    other.name, other.steps = "RLOO, TRL", [{**step, "seconds": 3 * step["seconds"]} for step in side.steps]
    records = [training.record(one, side) for one in (side, other)]
    assert [(r["seconds"], r["speedup"], r["peak_mib"]) for r in records] == [(10.0, 1.0, 120.0), (30.0, 3.0, 120.0)]
    lines = training.table(records).splitlines()
    assert lines[2].startswith("| PPO, ours | 10.0 | 360 | 1.00 | 40.0 | 120 MiB |")
    assert lines[3].startswith("| RLOO, TRL | 30.0 | 120 | 3.00 |") and "TRL 1.0" in lines[-1]


@pytest.mark.parametrize("name", training.OURS)
def test_our_side_makes_a_step_whenever_it_may(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MODEL", str(tiny_folder))
    answers, told = [True, True, False], []
    training.ours(name, tmp_path, lambda: answers.pop(0), lambda *step: told.append(step))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and len(told) == 2
    assert all(seconds > 0 and 1 <= tokens <= training.NEW_TOKENS for seconds, tokens in told)
    assert ("value_loss" in rows[0]) == name.startswith("PPO")


def test_a_side_answers_on_what_was_its_output_and_libraries_do_not() -> None:
    code = f"import sys; from bench import training; {SIDE}; training.ours = ours; training.side('PPO, ours')"
    done = subprocess.run([sys.executable, "-c", code], input="\n\n", capture_output=True, text=True, cwd=harness.ROOT)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(a["seconds"], a["tokens"]) for a in answers] == [(1.5, 7.0)] * 2 and answers[0]["peak_mib"] > 10
    assert done.returncode == 0 and "a library talks" in done.stderr


def test_the_page_and_the_records_say_the_same() -> None:
    found = harness.ROOT / "bench" / "results" / "training-cpu.jsonl"
    records = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    order = {name: i for i, name in enumerate(training.OURS)}
    records.sort(key=lambda r: order.get(r["provider"], len(order)))
    assert training.table(records) in training.DOCS.read_text(encoding="utf-8")
