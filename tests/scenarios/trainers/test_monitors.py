"""Monitors: what they see of a run, what each answer does to it, and that looking on changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig, RunConfig, SFTConfig
from rlhf_fast.trainers.loop.monitor import Monitor, Save, Step, Stop, Warn
from rlhf_fast.trainers.loop.state import TrainState
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.sft import SFTTrainer
from tests.scenarios.trainers.test_resume import outcome
from tests.scenarios.trainers.test_run_steps import DEMONSTRATIONS, make, rows

TRAINERS = ("sft", "reward", "dpo", "ppo")
DOCS = Path(__file__).resolve().parents[3] / "docs" / "training.md"


def train(name: str, folder: Path, out: Path, *monitors: Monitor, **options: Any) -> dict[str, Any]:
    epochs = {"sft": 1, "ppo": 1}.get(name, 2)
    trainer = make(name, folder, out, monitors, **{"epochs": epochs, **options})
    result: dict[str, Any] = trainer.train()
    return result


def at(n: int, answer: Warn) -> Monitor:
    """Gives that answer after step `n`, and none after others."""

    def monitor(step: Step) -> Warn | None:
        return answer if step.step == n else None

    return monitor


def checkpoints(out: Path) -> list[str]:
    return sorted(folder.name for folder in (out / "checkpoints").iterdir())


# What each answer does, in each trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
def test_a_monitor_sees_what_a_step_wrote(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    seen: list[Step] = []
    train(name, tiny_folder, tmp_path, seen.append, run=RunConfig(save_every=1, keep_last=9))
    written = [row for row in rows(tmp_path) if row["step"] > 0]
    assert [step.step for step in seen] == list(range(1, len(seen) + 1)) and len(seen) > 1
    for step in seen:
        merged: dict[str, Any] = {}
        for row in written:
            merged |= row if row["step"] == step.step else {}
        assert step.metrics == {key: value for key, value in merged.items() if key not in ("step", "seconds")}
        assert (step.phase, step.steps, step.folder) == (name, len(seen), tmp_path)
        assert step.checkpoints == tuple(range(1, step.step))  # its own is saved once nobody objects
    if name in ("sft", "ppo"):
        said = rows(tmp_path, "samples")
        for step in seen:
            own = [{k: v for k, v in row.items() if k != "step"} for row in said if row["step"] == step.step]
            assert step.samples == own
        assert any(step.samples for step in seen)
    assert not (tmp_path / "monitors.jsonl").exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_warning_is_shown_and_kept(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(name, tiny_folder, tmp_path, at(1, Warn("replies are all alike")))
    assert f"{name}: monitor after step 1: replies are all alike" in capsys.readouterr().err
    line = {"step": 1, "monitor": "monitor", "answer": "warn", "words": "replies are all alike"}
    assert rows(tmp_path, "monitors") == [line]
    assert rows(tmp_path)[-1]["step"] > 1 and len(checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("name", TRAINERS)
def test_a_checkpoint_is_saved_where_one_is_wished_for(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    train(name, tiny_folder, tmp_path, at(1, Save("look at this one")))
    last = rows(tmp_path)[-1]["step"]
    assert checkpoints(tmp_path) == ["step-1", f"step-{last}"] and last > 1
    assert rows(tmp_path, "monitors")[0]["answer"] == "save"
    assert [row["step"] for row in rows(tmp_path, "checkpoints") if "files" in row] == [1, last]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_ends_with_a_reason(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After that step, which is measured and saved as the last one is."""
    result = train(name, tiny_folder, tmp_path, at(1, Stop("the score is too good")))
    said = capsys.readouterr().err
    assert re.search(rf"{name}: ended after step 1 of \d+: the score is too good", said)
    found = rows(tmp_path)
    assert {row["step"] for row in found} <= {0, 1} and result["checkpoint"] == "step-1"
    assert name == "ppo" or any("heldout" in key for row in found if row["step"] == 1 for key in row)
    assert rows(tmp_path, "monitors")[0]["answer"] == "stop" and checkpoints(tmp_path) == ["step-1"]


def test_a_limit_of_the_kl_is_such_a_monitor(tiny_folder: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup=0.0)
    train("ppo", tiny_folder, tmp_path, max_kl=1e-6, kl_coef=0.0, optim=optim)
    ((said,), last) = rows(tmp_path, "monitors"), rows(tmp_path)[-1]
    assert (said["step"], said["monitor"], said["answer"]) == (last["step"], "KLLimit", "stop")
    assert said["words"] == f"kl {last['kl']:.3f} is above ppo.max_kl = 1e-06"


# Several of them ------------------------------------------------------------------------------------------------------


def test_all_are_asked_in_order_and_the_first_that_ends_it_says_why(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def named(name: str, answer: Warn | None) -> Monitor:
        def monitor(step: Step) -> Warn | None:
            asked.append(name)
            return answer

        return monitor

    monitors = [named("a", None), named("b", Stop("first")), named("c", Warn("hm")), named("d", Stop("second"))]
    train("sft", tiny_folder, tmp_path, *monitors)
    assert asked == ["a", "b", "c", "d"]
    answers = [(row["monitor"], row["answer"], row["words"]) for row in rows(tmp_path, "monitors")]
    assert answers == [("monitor 2", "stop", "first"), ("monitor 3", "warn", "hm"), ("monitor 4", "stop", "second")]
    said = capsys.readouterr().err
    assert "step 1 of 4: first" in said and "monitor 3 after step 1: hm" in said and "4: second" not in said


def test_what_fails_in_a_monitor_is_told_with_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    def divides(step: Step) -> None:
        raise ZeroDivisionError(f"nothing in {len(step.samples)} samples")

    with pytest.raises(RuntimeError, match=r"monitor divides failed after step 1: ZeroDivisionError: nothing in 0"):
        train("dpo", tiny_folder, tmp_path, divides)


def test_another_answer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    def says_yes(step: Step) -> Any:
        return "yes"

    with pytest.raises(TypeError, match="monitor says_yes returned 'yes' after step 1; expected Warn, Save, Stop or"):
        train("reward", tiny_folder, tmp_path, says_yes)


class KeepsOnly:
    def __call__(self, step: Step) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("monitors", "words"),
    [
        ((3,), r"monitors: 3 \(int\) cannot be called; expected a function of a Step"),
        (KeepsOnly(), "expected a list of monitors"),
        ((KeepsOnly(),), "KeepsOnly has one of state_dict and load_state_dict; expected both or neither"),
    ],
)
@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_no_monitor_is_refused_before_anything_is_loaded(
    name: str, monitors: Any, words: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=words):
        make(name, tmp_path / "no such model", tmp_path / "run", monitors=monitors)
    assert not (tmp_path / "run").exists()


# Looking on changes nothing; a run that goes on -----------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
def test_one_that_only_looks_changes_no_bit(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    def spoils(step: Step) -> None:
        """What it was given, which is a copy."""
        step.metrics.clear()
        for row in step.samples:
            row.clear()
        step.samples.clear()

    train(name, tiny_folder, tmp_path / "alone")
    train(name, tiny_folder, tmp_path / "watched", spoils)
    assert outcome(tmp_path / "alone") == outcome(tmp_path / "watched")
    config = [(tmp_path / each / "config.yaml").read_text().replace(each, "") for each in ("alone", "watched")]
    assert config[0] == config[1]


class Falling:
    """Warns when the loss has fallen for the second time, and ends the run when it has for the fifth."""

    def __init__(self) -> None:
        self.last, self.falls = 9.0, 0

    def __call__(self, step: Step) -> Warn | None:
        self.falls += step.metrics["loss"] < self.last
        self.last = step.metrics["loss"]
        words = f"the loss fell {self.falls} times, to {self.last:.6f} in step {step.step}"
        return Stop(words) if self.falls == 5 else Warn(words)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "falls": self.falls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.falls = state["last"], state["falls"]


class Killed(BaseException):
    pass


def kill_after(step: int, keep: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    """Run, keep the state after one step, and be killed after another."""

    def after(self: TrainState, n: int) -> None:
        if n == keep:
            self._keep(n)
        if n == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainState, "after", after)
        run()


def watched_sft(folder: Path, out: Path, *monitors: Any) -> SFTTrainer:
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup=0.0)
    config = SFTConfig(batch_size=2, epochs=3, lora=LoRAConfig(r=4), optim=optim)
    return SFTTrainer(folder, DEMONSTRATIONS, out, config, monitors=monitors)


def test_one_with_a_state_goes_on_to_the_bit(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched_sft(tiny_folder, tmp_path / "unbroken", Falling()).train()
    run = tmp_path / "run"
    kill_after(4, 2, monkeypatch, watched_sft(tiny_folder, run, Falling()).train)
    assert len(rows(run, "monitors")) == 4  # of which two come again
    watched_sft(tiny_folder, run, Falling()).train()
    assert outcome(run) == outcome(tmp_path / "unbroken")
    answers = rows(run, "monitors")
    assert answers == rows(tmp_path / "unbroken", "monitors") and answers[-1]["answer"] == "stop"
    assert answers[-1]["step"] > 4


def test_a_run_does_not_go_on_without_the_monitor_whose_state_it_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(2, 1, monkeypatch, watched_sft(tiny_folder, tmp_path, Falling()).train)
    with pytest.raises(ValueError, match="was interrupted with monitor Falling; put back what it was to go on, or"):
        watched_sft(tiny_folder, tmp_path).train()
    more = watched_sft(tiny_folder, tmp_path, Falling(), at(5, Warn("new"))).train()  # one more may look on
    assert more["phase"] == "sft"


def test_a_state_that_json_cannot_hold_is_refused_by_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Falling):
        def state_dict(self) -> dict[str, Any]:
            return {"self": self}

    with pytest.raises(TypeError, match=r"monitor Odd: state_dict\(\) returned what JSON cannot hold: Object of type"):
        kill_after(2, 1, monkeypatch, watched_sft(tiny_folder, tmp_path, Odd()).train)


def test_the_example_of_the_docs(tiny_folder: Path, tmp_path: Path) -> None:
    """As it is written there, with a tiny model."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "Step" in block]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(4)))
    small = PPOConfig(
        steps=3, prompts_per_step=2, samples_per_prompt=2, minibatches=1, max_new_tokens=4, lora=LoRAConfig(r=2)
    )
    found: list[Any] = []

    def trainer(policy: str, reward: str, data: str, **words: Any) -> Any:
        scores = iter([1.0, 4.0, -1.0])

        def falling(prompts: list[Any], texts: list[str]) -> list[float]:
            return [next(scores)] * len(texts)

        found.append(PPOTrainer(tiny_folder, falling, prompts, tmp_path / "run", small, **words))
        return found[0]

    exec(code.replace("from rlhf_fast import PPOTrainer\n", ""), {"PPOTrainer": trainer})
    assert [(row["step"], row["answer"]) for row in rows(tmp_path / "run", "monitors")] == [(2, "save"), (3, "stop")]
