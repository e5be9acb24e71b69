"""The page that sft, dpo and ppo leave: before and after, curves, samples; safe, and the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.pages import plots
from rlhf_fast.pages.run_report import write_run_report
from rlhf_fast.runs.folder import RunFolder
from tests.scenarios.evaluation.test_report import HOSTILE, with_plots


def finished(path: Path, phase: str = "sft", **summary: Any) -> Path:
    with RunFolder(path, phase, json.dumps({"sft": {"note": HOSTILE}})) as run:
        run.log({"step": 0, "heldout_loss": 3.0, "heldout_accuracy": 0.5})
        for step in range(1, 9):
            run.log({"step": step, "loss": 3.0 - step / 8, "accuracy": step / 10, "lr": 1e-4, "reward": None})
        run.log({"step": 8, "heldout_loss": 2.25, "heldout_accuracy": 0.75,
                 "heldout_accuracy_low": 0.6, "heldout_accuracy_high": 0.9})  # fmt: skip
        for step in (0, 8):
            run.samples(step, [{"prompt": f"q {HOSTILE}", "text": f"answer {step} {HOSTILE}", "finished": step > 0}])
        summary = {"heldout_loss": 2.25, **run.before(["heldout_loss"]), "dropped": 3, "notes": [HOSTILE], **summary}
        run.finish(summary, step=8)
    return path


def test_before_and_after_samples_and_settings_are_there_and_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    page = write_run_report(finished(tmp_path / "a run")).read_text()
    assert "Supervised fine-tuning: held-out loss <em>3 → 2.25</em>" in page
    assert "<td>3</td><td>2.25</td>" in page and "after step 0" in page and "after step 8" in page
    assert "8 steps in" in page and "its outcome is checkpoints/step-8" in page and "dropped" in page
    assert HOSTILE not in page and "<img src=x" not in page and page.count("<script") == 1
    assert "matplotlib" in page


@with_plots
def test_every_metric_has_its_curve_beside_its_held_out_one(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", heldout_accuracy=0.75)
    page = write_run_report(run).read_text()
    for title in ("Loss, nats", "Accuracy", "Learning rate"):
        assert f'<span class="title">{title}' in page, title
    assert page.count("held out</span>") == 2 and "Heldout" not in page and "Score less KL" not in page  # all null
    assert write_run_report(run).read_text() == page


def test_a_run_that_measured_nothing_before_has_a_page_too(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "ppo", "") as run:
        run.log({"step": 1, "score": 1.0})
        run.log({"step": 2, "score": 2.5})
        run.finish({"score": 2.5, **run.before(["score"])}, step=2)
    page = write_run_report(tmp_path / "run").read_text()
    assert "PPO: score <em>1 → 2.5</em>" in page and "the first and the last step, each of its own prompts" in page
    with RunFolder(tmp_path / "bare", "sft", "") as run:
        run.finish({})
    assert "finished" in write_run_report(tmp_path / "bare").read_text()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        write_run_report(tmp_path)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["summary"]["score_before"] == 1.0
