"""The page that sft, dpo and ppo leave: before and after, curves, samples; safe, and the same bytes each time."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.cli import errors
from rlhf_fast.data.comparisons import Comparison
from rlhf_fast.evaluation import report
from rlhf_fast.pages import plots, reward_report, run_report
from rlhf_fast.pages.run_report import write_run_report
from rlhf_fast.rewards.measures import people_figures
from rlhf_fast.runs.folder import PageError, RunFolder
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


def test_samples_of_one_step_are_shown_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "sft", "") as run:
        run.samples(0, [{"prompt": "q", "text": "only this", "finished": True}])
        run.finish({}, step=1)
    assert write_run_report(tmp_path / "run").read_text().count("only this") == 1


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


def test_a_figure_stands_in_one_table(tmp_path: Path) -> None:
    """Measured before and after, or once; notes in neither."""
    page = write_run_report(finished(tmp_path / "run")).read_text()
    before_and_after, _, besides = page.partition("What was measured before")[2].partition("Besides")
    besides = besides.partition("</table>")[0]
    assert "held-out loss" in before_and_after and "held-out" not in besides.lower()
    assert "<td>3</td>" in besides and besides.count("<tr>") == 2  # dropped, and its head


@pytest.mark.parametrize(
    ("module", "name"),
    [(run_report, "write_run_report"), (reward_report, "write_reward_report"), (report, "write_report")],
)
@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "report.html"), 1, "no space is left on the disk"),
        (KeyError("loss"), 70, "a fault of rlhf-fast itself"),
    ],
)
def test_a_run_whose_page_cannot_be_written_is_said_to_be_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    error: Exception,
    code: int,
    why: str,
) -> None:
    """Its results are kept, and the command that is told writes the page once that is possible."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(plots, "available", lambda: False)
    run = finished(tmp_path / "it's a run")
    unmeasured = {"verdict": "not measured", "notes": [], "people": people_figures([Comparison("q", "a", "b")])}
    (run / "reward_report.json").write_text(json.dumps(unmeasured))
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", fail)
        with pytest.raises(PageError) as raised:
            getattr(module, name)(run)
    message, exit_code = errors.explained(raised.value, "sft")
    start = f"{run}: the run is done and its results are kept, but its page, report.html, could not be written"
    assert message.startswith(f"{start}: ") and why in message and exit_code == code
    assert str(raised.value).startswith(f"{start} ({type(error).__name__}: ")
    assert not (run / "report.html").exists() and (run / "result.json").exists()
    python, flag, program = shlex.split(message[message.index("python -c ") :].removesuffix(" writes it"))
    assert (python, flag) == ("python", "-c")
    exec(program)
    assert "<h1>" in (run / "report.html").read_text()
