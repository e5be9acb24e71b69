"""The benchmark harness: what is wrong is not timed, everyone takes turns, records say what a figure depends on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness
from bench.__main__ import main
from bench.harness import BOTH, FORWARD, Bench, Call, Case, Work
from rlhf_fast import cli

CPU = torch.device("cpu")
LOSSES = (  # timed with gradients alone
    "cross_entropy", "dpo_loss", "linear_cross_entropy", "linear_ppo_loss", "ppo_loss", "reward_loss", "sequence_sum",
)  # fmt: skip
CASE = Case("tiny", (4, 8), torch.float32, FORWARD)


def bench(**others: Call) -> Bench:
    x = torch.ones(4, 8)
    every = {"rlhf-fast": lambda: [x * 2], "eager": lambda: [x + x], **others}
    return Bench("double", [CASE], [CASE], lambda case, device: dict(every), "eager", lambda case: Work(read=x.nbytes))


def fails() -> list[torch.Tensor]:
    raise RuntimeError("no such kernel\nand more")


NO_GRADIENTS = ("gae", "group_advantages", "linear", "paged_attention", "sample")


def test_peers_that_are_wrong_or_fail_are_told_of_and_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    peers = bench(wrong=lambda: [torch.ones(4, 8)], nan=lambda: [torch.full((4, 8), torch.nan)], broken=fails)
    results = harness.run_case(peers, CASE, CPU, harness.Rates(1e9, 1e9, 1e9), seconds=0.0)
    assert [one.provider for one in results] == ["rlhf-fast", "eager"]
    told = capsys.readouterr().err
    assert "wrong: left out, result 0 is 5.0e-01 off" in told
    assert "nan: left out" in told and "broken: left out, RuntimeError: no such kernel" in told


def test_nothing_is_timed_if_ours_is_wrong() -> None:
    with pytest.raises(RuntimeError, match="'rlhf-fast' does not give the right result for 4 x 8 float32 forward"):
        wrong = bench(**{"rlhf-fast": lambda: [torch.ones(4, 8)]})
        harness.run_case(wrong, CASE, CPU, harness.Rates(1e9, 1e9, 1e9), seconds=0.0)


def test_every_provider_takes_each_place_in_turn() -> None:
    order: list[str] = []
    calls: dict[str, Call] = {name: (lambda name=name: order.append(name) or []) for name in "abc"}  # type: ignore[func-returns-value, misc]
    times = harness.interleaved(calls, CPU, seconds=0.0, short=False)
    assert {name: len(its) for name, its in times.items()} == {"a": 5, "b": 5, "c": 5}
    assert "".join(order[6:]) == "abcbcacababcbca"  # after two calls each to warm up


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is ten times slower for a while does not change them."""
    times = {"rlhf-fast": [1.0, 10.0, 1.0, 1.0, 10.0], "eager": [3.0, 30.0, 3.0, 3.0, 30.0]}
    monkeypatch.setattr(harness, "interleaved", lambda *_: times)
    ours, eager = harness.run_case(bench(), CASE, CPU, harness.Rates(128.0, 1.0, 1.0), seconds=1.0)
    assert (ours.speedup, eager.speedup) == (1.0, 3.0)
    assert (ours.milliseconds, ours.limit, ours.fraction) == (1000.0, 1000.0, 1.0)  # 128 bytes at 128 a second


def test_limits_are_of_bytes_or_of_operations() -> None:
    rates = harness.Rates(read=10.0, copy=5.0, product=100.0)
    assert rates.seconds(Work(read=20, copied=10)) == 4.0
    assert rates.seconds(Work(read=20, operations=1000)) == 10.0


def test_memory_that_a_call_holds_for_a_moment_is_seen() -> None:
    def call() -> list[torch.Tensor]:
        torch.ones(40 << 20)
        return [torch.ones(10 << 20)]

    peak = harness.peak_bytes(call, CPU)
    assert peak is None or 150 << 20 < peak < 230 << 20


def test_the_command_writes_a_line_for_each_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(harness, "benches", lambda suite, op: [bench()] if (suite, op) == ("ops", "double") else [])
    out = tmp_path / "new" / "records.jsonl"
    assert main(["ops", "--op", "double", "--seconds", "0", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "double  4 x 8 float32 forward (tiny), limit" in shown and f"2 results written to {out}" in shown
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["provider"], one["rounds"]) for one in records] == [("rlhf-fast", 5), ("eager", 5)]
    expected = "commit changed device threads isa compiler backend torch python cuda date rates peak_mib limit speedup"
    assert set(expected.split()) <= set(records[0])
    assert [path.name for path in out.parent.iterdir()] == ["records.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training"], "bench: no suite 'training'; there is ops"),
        (
            ["ops", "--op", "gea"],
            "op: no benchmark of 'gea'; there are cross_entropy, dpo_loss, full_kl, gae, ",
        ),
        (["../ops"], "bench: no suite '../ops'; there is ops"),
    ],
)
def test_an_unknown_suite_or_op_is_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_fault_of_a_benchmark_shows_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "benches", lambda *_: {}["no such op"])
    assert main(["ops", "--out", str(tmp_path / "out.jsonl")]) == 70
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told and "a fault of rlhf-fast itself" in told


def test_the_verb_runs_a_process_of_its_own_and_passes_its_code_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wherever it is called, and whatever is called bench there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise RuntimeError('not this one')")
    assert cli.main(["bench", "ops", "--op", "gea", "--out", "out.jsonl"]) == 1
    told = capfd.readouterr().err
    assert told.startswith("rlhf-fast: op: no benchmark of 'gea'; there are ") and told.count("\n") == 1
    asked: list[list[str]] = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: asked.append(words) or subprocess.CompletedProcess(words, 70)
    )
    assert cli.main(["bench", "rollout", "--seconds", "2.5", "--out", "out.jsonl"]) == 70
    assert asked == [
        [sys.executable, "-m", "bench", "rollout", "--op=", "--seconds=2.5", f"--out={tmp_path / 'out.jsonl'}"]
    ]


def test_an_installed_package_says_what_to_install(tmp_path: Path) -> None:
    """Without bench/ beside it, as a wheel unpacks it."""
    shutil.copytree(
        harness.ROOT / "rlhf_fast", tmp_path / "rlhf_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_fast.cli", "bench", "ops"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the benchmarks come with a checkout" in done.stderr and "pip install -e ." in done.stderr


def test_every_op_of_the_suite_has_cases_for_both_devices() -> None:
    found: dict[str, Any] = {one.op: one for one in harness.benches("ops")}
    assert list(found) == [
        "cross_entropy",
        "dpo_loss",
        "full_kl",
        "gae",
        "group_advantages",
        "kl_estimate",
        "linear",
        "linear_cross_entropy",
        "linear_ppo_loss",
        "linear_token_logprobs",
        "paged_attention",
        "ppo_loss",
        "reward_loss",
        "sample",
        "sequence_sum",
        "token_logprobs",
    ]
    for one in found.values():
        modes = {FORWARD} if one.op in NO_GRADIENTS else {BOTH} if one.op in LOSSES else {FORWARD, BOTH}
        assert {case.mode for case in one.cases} == {case.mode for case in one.gpu_cases} == modes


def test_a_run_of_one_op_keeps_the_records_of_the_others(tmp_path: Path) -> None:
    out = tmp_path / "ops.jsonl"
    harness.write_records([{"op": "gae", "milliseconds": 1}, {"op": "full_kl", "milliseconds": 2}], out)
    harness.write_records([{"op": "gae", "milliseconds": 3}, {"op": "gae", "milliseconds": 4}], out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["op"], r["milliseconds"]) for r in found] == [("full_kl", 2), ("gae", 3), ("gae", 4)]
    assert [file.name for file in tmp_path.iterdir()] == ["ops.jsonl"]
