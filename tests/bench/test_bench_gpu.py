"""The run that is to be made on a GPU: whatever happens to a step, the rest runs, and what was found is kept."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as command
from bench.gpu import plan, report
from bench.gpu.plan import Results, Step
from bench.gpu.steps import STEPS

RECORD = """
import json, os
def record(**values):
    with open(os.environ["BENCH_RECORDS"], "a") as file:
        file.write(json.dumps(values) + "\\n")
"""


def step(name: str, code: str, seconds: float = 30.0) -> Step:
    return Step(name, seconds, plan.python("-c", RECORD + code))


def run(steps: list[Step], tmp_path: Path, budget: float = 60.0) -> Results:
    results = Results(tmp_path / "gpu.json")
    plan.run(steps, results, tmp_path / "gpu.log", budget)
    return Results.read(results.path)


def test_a_step_that_crashes_hangs_or_eats_the_memory_costs_one_step(tmp_path: Path) -> None:
    started = time.monotonic()
    found = run(
        [
            step("crash", 'record(op="a")\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)'),
            step("hang", 'record(op="b")\nprint("waiting", flush=True)\nimport time\ntime.sleep(600)', seconds=2.0),
            step(
                "memory",
                "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
                'record(op="c")\nx = bytearray(1 << 32)',
            ),
            step("absent", 'print("no such thing here")\nraise SystemExit(77)'),
            step("cut", 'record(op="d")\nopen(os.environ["BENCH_RECORDS"], "a").write(\'{"op": "e\')\nos._exit(3)'),
            step("fine", 'record(op="f", milliseconds=1.5)'),
        ],
        tmp_path,
    )
    states = {name: (one["state"], one["detail"]) for name, one in found.steps.items()}
    assert states == {
        "crash": ("failed", "signal 11: "),
        "hang": ("timed out", "waiting"),
        "memory": ("failed", "exit code 1: MemoryError"),
        "absent": ("skipped", "no such thing here"),
        "cut": ("failed", "exit code 3: "),
        "fine": ("done", ""),
    }
    assert [(r["step"], r["op"]) for r in found.records] == [
        ("crash", "a"), ("hang", "b"), ("memory", "c"), ("cut", "d"), ("fine", "f"),
    ]  # fmt: skip
    assert found.failed == ["crash", "hang", "memory", "cut"]
    assert time.monotonic() - started < 30
    written = report.write(found.steps, found.records, found.path)
    text = written[0].read_text()
    assert "| hang | timed out | 2 | waiting |" in text and "| fine | done |" in text


def test_a_step_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])\n'
        'record(op="child", pid=child.pid)\ntime.sleep(600)'
    )
    (child,) = run([step("parent", code, seconds=3.0)], tmp_path).records
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child['pid']}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child['pid']}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # ended, and not yet collected by its new parent
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_what_the_time_is_over_for_is_named_and_resumed(tmp_path: Path) -> None:
    steps = [step("first", 'record(op="a")'), step("second", 'record(op="b")')]
    found = run(steps, tmp_path, budget=0.0)
    assert {one["state"] for one in found.steps.values()} == {"not started"} and found.failed == ["first", "second"]
    plan.run(steps[:1], found, tmp_path / "gpu.log", 60.0)
    again = Results.read(found.path)
    plan.run([step("first", "raise SystemExit(1)"), steps[1]], again, tmp_path / "gpu.log", 60.0)
    assert [one["state"] for one in again.steps.values()] == ["done", "done"], "what is done is not run again"
    assert [r["op"] for r in again.records] == ["a", "b"]


def test_the_command_says_what_is_wrong_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "steps", lambda *_: [step("good", ""), step("bad", "raise SystemExit('broken')")])
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "bad          failed after" in out and "exit code 1: broken" in out
    assert "bench.gpu: not all is well: bad; see" in err
    monkeypatch.setattr(command, "steps", lambda *_: [step("bad", "")])
    assert command.main(["--rehearse", "--out", str(tmp_path), "--resume"]) == 0
    assert len(list(tmp_path.iterdir())) <= 8


def test_without_a_gpu_it_says_how_to_rehearse() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=plan.ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode != 0 and "--rehearse runs the same steps without one" in done.stderr


def test_every_step_has_a_name_and_a_limit() -> None:
    assert set(command.NAMES) == set(STEPS) == set(command.SECONDS)
    assert [one.name for one in command.steps(True, True, ["ops", "machine"])] == ["machine", "ops"]


def test_the_report_ranks_what_is_furthest_from_its_limit_by_the_best_of_ours(tmp_path: Path) -> None:
    def timed(op: str, provider: str, milliseconds: float) -> dict[str, object]:
        of = {"step": "ops", "op": op, "case": "<b> | x", "provider": provider, "device": "NVIDIA H100 80GB HBM3"}
        return {**of, "milliseconds": milliseconds, "limit": 1.0, "peak_mib": None}

    records = [
        timed("gae", "rlhf-fast, cuda", 4.0), timed("gae", "rlhf-fast, triton", 2.0), timed("gae", "eager", 8.0),
        timed("gae", "rlhf-fast, packed", 1.0), timed("sample", "rlhf-fast, cuda", 5.0),
    ]  # fmt: skip
    path = tmp_path / "card.json"
    text = report.write({}, records, path)[0].read_text()
    assert "| `gae` &lt;b> \\| x | cuda 4, triton 2 | 50% | eager 4.00, rlhf-fast, packed 0.50 |" in text
    assert text.index("1. `sample`") < text.index("2. `gae`")
    assert "## Predicted and measured" not in text
    case = "8192 x 2048 float32 forward (batch)"
    text = report.write({}, [{**timed("gae", "rlhf-fast, cuda", 0.178), "case": case}], path)[0].read_text()
    assert f"| `gae` {case}, cuda | 0.089 | bytes | 0.178 | 2.00 |" in text
    case = "Qwen3-8B, 256 prompts of 512, 256 new"
    expected = next(
        r
        for r in json.loads(report.PREDICTED.read_text())["rollouts"]
        if (r["card"], r["case"], r["graphs"]) == ("H100", case, True)
    )
    rollout = {
        "op": f"rollout: {case}", "case": "256 prompts of 512, 256 new", "provider": "rlhf-fast, CUDA graphs",
        "tokens": 65536, "seconds": 2 * expected["seconds"], "limit_seconds": 5.0, "speedup": 1.0,
        "device": "NVIDIA H100 80GB HBM3",
    }  # fmt: skip
    text = report.write({}, [rollout], path)[0].read_text()
    assert f"| rollout: {case} | " in text and f"| {expected['binds']} | " in text and " | 2.00 |" in text


def test_tables_of_all_runs_go_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{report.MARKS[0]}\n\nold\n\n{report.MARKS[1]}\n\nafter\n")
    (tmp_path / "predicted.json").write_text('{"predictions": []}')
    Results(tmp_path / "rehearsal-1.json").write()
    assert report.merge(tmp_path, page) == []
    assert page.read_text() == f"before\n\n{report.MARKS[0]}\n\n{report.NONE}\n\n{report.MARKS[1]}\n\nafter\n"
    Results(tmp_path / "card-1.json", {"ops": {"state": "done", "seconds": 1.0, "detail": ""}}).write()
    for _ in range(2):  # again and again the same
        assert report.merge(tmp_path, page) == [tmp_path / "card-1.json"]
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\n\nafter\n") and "old" not in text
        assert text.count("## card-1") == 1 and "| ops | done | 1 |  |" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="around where the tables go"):
        report.merge(tmp_path, page)


def test_a_rehearsal_of_some_steps(tmp_path: Path) -> None:
    """The whole of it takes minutes: `python -m bench.gpu --rehearse`."""
    words = ["--rehearse", "--short", "--only", "machine", "--only", "ppo", "--out", str(tmp_path)]
    assert command.main(words) == 0
    (file,) = tmp_path.glob("rehearsal-*.json")
    found = Results.read(file)
    assert {name: one["state"] for name, one in found.steps.items()} == {"machine": "done", "ppo": "done"}
    machine = next(r for r in found.records if r["op"] == "machine")
    assert machine["rates"]["read"] > 1e8 and machine["rates"]["product_bf16"] > 1e6
    assert [r["op"] for r in found.records if r["step"] == "ppo"] == ["ppo: tiny"] * 2
    assert "## PPO" in file.with_suffix(".md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_the_call_with_graphs_is_the_second_one_and_is_held_against_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench.gpu import training

    calls: list[str] = []

    def ours(case: Any, model: Any, cuda_graphs: bool) -> Any:
        return lambda: calls.append("called") or time.sleep(0.01)

    monkeypatch.setattr(training.rollout, "ours", ours)
    case = training.rollout.Case("some", [[1, 2]], [3])
    rates = training.harness.Rates(1.0, 1.0, 1.0)
    record = training._with_graphs(case, None, 0.005, {}, rates, plain=0.02)
    assert len(calls) == 2 and record["provider"] == "rlhf-fast, CUDA graphs" and record["tokens"] == 3
    assert record["speedup"] == pytest.approx(record["seconds"] / 0.02)
