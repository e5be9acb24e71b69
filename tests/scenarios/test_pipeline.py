"""The whole loop on a tiny random model: what it leaves, how it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast import models, pipeline
from rlhf_fast.config import DemoConfig, tiny_demo
from rlhf_fast.data.records import read_comparisons
from rlhf_fast.models.checkpoint import resolve
from rlhf_fast.pipeline import PHASES, run_demo
from tests.processes import verb


def smallest(out: Path) -> DemoConfig:
    """The tiny demo with as little of everything as its phases accept."""
    config = tiny_demo()
    return dataclasses.replace(
        config,
        out=str(out),
        sft=dataclasses.replace(config.sft, epochs=1),
        comparisons=dataclasses.replace(config.comparisons, prompts=12),
        ppo=dataclasses.replace(config.ppo, steps=2, max_new_tokens=16, prompts_per_step=4, samples_per_prompt=2),
        evaluation=dataclasses.replace(config.evaluation, max_new_tokens=8),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    run_demo(smallest(out), say=lambda line: None)
    return out


def result(run: Path, phase: str) -> dict:
    return json.loads((run / phase / "result.json").read_text())


def test_every_phase_leaves_its_result_and_what_it_cost(run: Path) -> None:
    for phase in PHASES:
        found = result(run, phase)
        assert found["phase"] == phase and found["seconds"] > 0 and found["peak_rss_gb"] > 0
    assert result(run, "reward")["summary"]["heldout_accuracy"].keys() == {"mean", "low", "high"}
    assert "held-out comparisons" in (run / "reward" / "report.html").read_text()
    assert result(run, "evaluation")["summary"]["win_rate"]["mean"] == pytest.approx(0.5, abs=0.5)


def test_the_report_shows_the_run(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "simulated" in page and "<svg" in page and "kl_coef" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<link" not in page


def test_comparisons_say_that_they_are_simulated(run: Path) -> None:
    comparisons = read_comparisons(run / "comparisons" / "comparisons.jsonl")
    assert len(comparisons) == result(run, "comparisons")["summary"]["comparisons"] > 0
    assert all(comparison.annotator.startswith("simulated (") for comparison in comparisons)
    assert all(comparison.ratings.keys() == {"chosen", "rejected"} for comparison in comparisons)


def test_the_first_ppo_update_is_exact(run: Path) -> None:
    first = json.loads((run / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-5
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert evaluation["prompts"] == 50 and evaluation["wins"] + evaluation["ties"] + evaluation["losses"] == 50


def test_each_checkpoint_loads_in_plain_libraries_with_the_same_logits(run: Path) -> None:
    ids = torch.arange(4, 80)[None]
    with torch.no_grad():
        for phase, plain in (("sft", AutoModelForCausalLM), ("ppo", AutoPeftModelForCausalLM)):
            ours, _ = models.load(run / phase)
            theirs = plain.from_pretrained(resolve(run / phase)).eval()
            assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
        ours, _ = models.load_reward(run / "reward")
        base = AutoModelForSequenceClassification.from_pretrained(resolve(run / "sft"), num_labels=1)
        theirs = PeftModel.from_pretrained(base, resolve(run / "reward")).eval()
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_a_finished_run_is_not_run_again(run: Path) -> None:
    before = {phase: (run / phase / "result.json").stat().st_mtime_ns for phase in PHASES}
    said: list[str] = []
    run_demo(smallest(run), say=said.append)
    assert [line for line in said if "finished earlier" in line].__len__() == len(PHASES)
    assert before == {phase: (run / phase / "result.json").stat().st_mtime_ns for phase in PHASES}


def test_other_settings_need_another_folder(run: Path) -> None:
    config = dataclasses.replace(smallest(run), tiny=False)
    with pytest.raises(ValueError, match=r"started with other settings \(tiny: True -> False\); choose another --out"):
        run_demo(config, say=lambda line: None)


def test_a_full_disk_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"the demo needs about 0\.1 GB in .*, where 0\.0 GB are free"):
        run_demo(smallest(tmp_path / "run"), say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_killed_run_goes_on_after_its_last_finished_phase(tmp_path: Path) -> None:
    """SIGKILL in one phase after another: no half-written file is ever left, and the end is that of an unbroken run."""
    out = tmp_path / "run"
    words, said = ["demo", "--tiny", *SHORT, "--out"], tmp_path / "said"
    for phase in ("sft", "reward", "ppo"):
        process = verb([*words, str(out)], str(said))
        process.start()
        deadline = time.monotonic() + 120
        while not (out / phase / "metrics.jsonl").exists():
            assert process.is_alive() and time.monotonic() < deadline, f"{phase} never began: {said.read_text()}"
            time.sleep(0.002)
        process.kill()
        process.join()
        assert not (out / phase / "result.json").exists()
        for file in out.rglob("*.jsonl"):
            assert all(json.loads(line) is not None for line in file.read_text().splitlines())
        for file in out.rglob("*.json"):
            if ".tmp" not in str(file):
                json.loads(file.read_text())
    whole = tmp_path / "whole"
    told = []
    for folder in (out, whole):
        process = verb([*words, str(folder)], str(said))
        process.start()
        process.join(120)
        assert process.exitcode == 0, said.read_text()
        told.append(said.read_text())
    assert told[0].count("finished earlier") == 3  # sft, comparisons, reward
    assert (out / "report.html").exists() and not list(out.rglob("*.tmp"))
    assert "this reward model is worth nothing; PPO is trained on it all the same" in told[1]
    for name in ("comparisons/comparisons.jsonl", "evaluation/samples.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text()


SHORT = (
    "--sft.epochs 1 --comparisons.prompts 12 --ppo.steps 2 --ppo.max_new_tokens 16 "
    "--ppo.prompts_per_step 4 --ppo.samples_per_prompt 2 --evaluation.max_new_tokens 8"
).split()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_fast.cli", "demo", "--tiny", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them ignore interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "sft" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = errors.splitlines()[-1]
    assert re.search(
        r"sft: ended (after step \d+|before its first step) by Ctrl-C; the same command goes on from there$", said
    ), said
    assert "Traceback" not in errors


@pytest.mark.parametrize("tiny", [True, False])
def test_evaluation_prompts_are_in_no_training_data(tiny: bool, tmp_path: Path) -> None:
    from rlhf_fast.pipeline import _Demo

    config = tiny_demo() if tiny else DemoConfig()
    demo = _Demo(config, tmp_path)
    asked = {str(record.prompt) for record in demo.evaluation_prompts}
    assert len(asked) == 50
    assert not asked & {str(record.prompt) for record in demo.training_prompts}
    assert not asked & {str(row["prompt"]) for row in demo.demonstrations}


def test_a_phase_is_told_in_one_line_of_figures() -> None:
    summary = {
        "notes": ["a sentence"], "judge_note": "another", "loss": 2.25, "loss_before": 3.0, "steps": 12,
        "share": {"mean": 0.5, "low": 0.25, "high": 0.75},
    }  # fmt: skip
    assert pipeline._brief(summary) == "loss 3.000 -> 2.250, steps 12, share 0.500 [0.250, 0.750]"
