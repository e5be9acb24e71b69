"""A run that was killed goes on to the bit as if it had not been: weights, metrics, samples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import models
from rlhf_fast.config import LoRAConfig, SFTConfig
from rlhf_fast.data.records import Columns, PromptRecord
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop import state as state_module
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.loop.state import Data, Interrupted, TrainState, weights_digest
from rlhf_fast.trainers.sft import SFTTrainer
from tests.processes import PROCESSES
from tests.scenarios.trainers import killed_run

METHODS = ("ppo", "grpo", "ppo-lag", "remax-lag", "dpo", "reward", "sft")
TIMED = ("seconds", "decode_roofline", "training_utilisation", "busy")  # metrics that no two runs have the same


def start(name: str, folder: Path, out: Path, pause: float = 0.0) -> Any:
    process = PROCESSES.Process(target=killed_run.train, args=(name, str(folder), str(out), pause, f"{out}.errors"))
    process.start()
    return process


def said(out: Path) -> str:
    return Path(f"{out}.errors").read_text()


def outcome(out: Path) -> dict[str, Any]:
    """All that a run has left, without its times."""
    found: dict[str, Any] = {
        str(file.relative_to(out)): file.read_bytes()
        for file in (out / "checkpoints").rglob("*")
        if file.is_file() and file.suffix == ".safetensors"
    }
    assert found
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (out / name).read_text().splitlines()] if (out / name).exists() else []
        found[name] = [{key: x for key, x in row.items() if not key.startswith(TIMED)} for row in rows]
    found["result"] = json.loads((out / "result.json").read_text())["summary"]
    return found


@pytest.mark.slow
def test_a_killed_run_ends_as_the_unbroken_one(tiny_folder: Path, tmp_path: Path) -> None:
    """All methods, two at a time: most of it is the start of processes."""
    # This one is a Python of its own, whose sets and dicts of strings have another order.
    command = [
        sys.executable,
        "-m",
        "tests.scenarios.trainers.killed_run",
        str(tiny_folder),
        str(tmp_path / "unbroken"),
        *METHODS,
    ]
    unbroken = subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: kill_and_resume(name, tiny_folder, tmp_path / name), METHODS))
    _, its_errors = unbroken.communicate(timeout=600)
    assert unbroken.returncode == 0, its_errors
    for name in METHODS:
        there, expected = outcome(tmp_path / name / "run"), outcome(tmp_path / "unbroken" / name)
        assert there.keys() == expected.keys()
        for key, value in expected.items():
            assert there[key] == value, (name, key)


def kill_and_resume(name: str, folder: Path, out: Path) -> None:
    out.mkdir()
    run, draw = out / "run", random.Random(name)
    resumed = []
    for lines in (draw.randint(2, 3), draw.randint(4, 5)):  # of metrics, that are there when it is killed
        process = start(name, folder, run, pause=0.05)
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < lines:
            assert process.is_alive() and time.monotonic() < deadline, said(run)
            time.sleep(0.002)
        time.sleep(draw.random() * 0.08)
        process.kill()
        process.join()
        kept = run / "state" / "state.json"
        resumed.append(json.loads(kept.read_text())["step"] if kept.exists() else 0)
    process = start(name, folder, run)
    process.join(120)
    assert process.exitcode == 0, said(run)
    assert max(resumed) > 0 and not (run / "state").exists()


@pytest.mark.parametrize("name", ["ppo-lag", "reward"])
def test_a_run_goes_on_from_a_step_before_that_it_was_killed_in(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: what has been adapted, sampled ahead, measured and written by then is as without a break."""

    class Killed(BaseException):
        pass

    def after(self: TrainState, step: int) -> None:
        if step == 3:
            self._keep(step)
        if step == 4:
            raise Killed

    folder = str(tiny_folder)
    killed_run.trainer(name, folder, str(tmp_path / "unbroken")).train()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainState, "after", after)
        killed_run.trainer(name, folder, str(tmp_path / "run")).train()
    killed_run.trainer(name, folder, str(tmp_path / "run")).train()
    there, expected = outcome(tmp_path / "run"), outcome(tmp_path / "unbroken")
    assert there.keys() == expected.keys()
    for key, value in expected.items():
        assert there[key] == value, key


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 1)])
def test_a_signal_ends_a_run_after_its_step_and_it_says_how_to_go_on(
    tiny_folder: Path, tmp_path: Path, number: int, name: str, code: int
) -> None:
    out = tmp_path / "run"
    process = start("sft", tiny_folder, out, pause=0.2)
    deadline = time.monotonic() + 60
    while not (out / "state" / "state.json").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code and f"by {name}; the same command goes on from there" in said(out)
    assert not (out / "result.json").exists()
    step = json.loads((out / "state" / "state.json").read_text())["step"]
    assert f"ended after step {step}" in said(out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == step
    process = start("sft", tiny_folder, out)
    process.join(60)
    assert process.exitcode == 0 and f"sft: goes on after step {step} of " in said(out)


def test_a_signal_before_the_first_step_and_a_second_one_end_it_at_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sft(tiny_folder, tmp_path / "first")
    monkeypatch.setattr(trainer, "evaluate", lambda: (os.kill(os.getpid(), signal.SIGINT), {"heldout_loss": 1.0})[1])
    with pytest.raises(Interrupted, match=r"first: ended before its first step by Ctrl-C"):
        trainer.train()
    trainer = sft(tiny_folder, tmp_path / "second")
    steps: list[int] = []

    def losses(batch: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:  # in the middle of a step
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return SFTTrainer._losses(trainer, batch)

    monkeypatch.setattr(state_module, "EVERY", 0.0)
    monkeypatch.setattr(state_module, "MOST", 1e9)
    monkeypatch.setattr(trainer, "_losses", losses)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"heldout_loss": 1.0})
    with pytest.raises(Interrupted, match=r"second: stopped at once; the same command goes on from step 2$"):
        trainer.train()
    assert json.loads((tmp_path / "second" / "state" / "state.json").read_text())["step"] == 2
    sft(tiny_folder, tmp_path / "second").train()  # let go of


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo", "ppo"])
def test_folder_trackers_and_template_are_looked_at_before_a_model_is_loaded(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of these does not even exist."""
    from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, RunConfig
    from rlhf_fast.trainers.dpo import DPOTrainer
    from rlhf_fast.trainers.ppo.trainer import PPOTrainer
    from rlhf_fast.trainers.reward import RewardTrainer

    kinds: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig}
    trainers: dict[str, Any] = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer}

    def make(out: Path, **options: Any) -> Any:
        config = kinds[verb](**options)
        if verb == "ppo":
            return PPOTrainer("no/model", "no/reward", [{"prompt": "q"}], out, config)
        return trainers[verb]("no/model", DATA if verb == "sft" else killed_run.PAIRS, out, config)

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("a: 1\n")
    with pytest.raises(FileExistsError, match=r"config\.yaml is there, and .* is no run's folder"):
        make(tmp_path / "foreign")
    with pytest.raises(ModuleNotFoundError, match="trackio is not installed"):
        make(tmp_path / "run", run=RunConfig(trackers=("trackio",)))
    with pytest.raises(ValueError, match="is neither chatml nor plain nor a file that can be read"):
        make(tmp_path / "run", chat_template="absent.jinja")
    assert not (tmp_path / "run").exists()


DATA = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(12)]


def interrupted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of SFT that ended after its second step."""
    monkeypatch.setattr(state_module, "EVERY", 0.0)
    after = TrainState.after

    def stop(self: TrainState, step: int) -> None:
        after(self, step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "after", stop)
        with pytest.raises(KeyboardInterrupt):
            sft(folder, out).train()


def sft(folder: Path, out: Path, data: Any = DATA, **options: Any) -> SFTTrainer:
    return SFTTrainer(folder, data, out, SFTConfig(**{"batch_size": 2, "lora": LoRAConfig(r=4), **options}))


def test_other_settings_data_or_weights_are_refused_and_nothing_is_lost(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    interrupted(tiny_folder, out, monkeypatch)
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"interrupted with other settings \(sft\.batch_size: 2 -> 3\); go on with"):
        sft(tiny_folder, out, batch_size=3).train()
    with pytest.raises(ValueError, match=r"the data changed since this run was interrupted; put back"):
        sft(tiny_folder, out, data=[*DATA[:-1], {"prompt": "q", "completion": "another"}]).train()
    model, tokenizer = models.load(tiny_folder)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    models.save(tiny_folder.parent / "moved", model, tokenizer)
    other = sft(tiny_folder, out)
    monkeypatch.setattr(other, "model", models.trainable(model, LoRAConfig(r=4), 0))
    with pytest.raises(ValueError, match=r"the model changed since this run was interrupted"):
        other.train()
    assert (out / "metrics.jsonl").read_text() == before
    sft(tiny_folder, out).train()
    assert (out / "result.json").exists() and not (out / "state").exists()


def test_data_are_known_by_their_fields_and_runs_of_earlier_versions_by_their_reprs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    interrupted(tiny_folder, out, monkeypatch)
    file = out / "state" / "state.json"
    kept = json.loads(file.read_text())
    trainer = sft(tiny_folder, out)
    assert kept["identity"]["data"] == Data(trainer.training + trainer.heldout).digest
    state = hashlib.blake2b(digest_size=16)
    for item in trainer.training + trainer.heldout:
        state.update(repr(item).encode())
    file.write_text(json.dumps({**kept, "identity": {**kept["identity"], "data": state.hexdigest()}}))
    with pytest.raises(ValueError, match="the data changed"):
        sft(tiny_folder, out, data=[*DATA[:-1], {"prompt": "q", "completion": "another"}]).train()
    trainer.train()


def test_a_field_that_is_new_to_a_record_changes_no_digest_and_its_value_does() -> None:
    before = dataclasses.make_dataclass("Row", [("text", str), ("ids", tuple)])
    after = dataclasses.make_dataclass(
        "Row", [("text", str), ("ids", tuple), ("tools", dict, dataclasses.field(default_factory=dict))]
    )
    plain = Data([(before("a", (1, 2)),)]).digest
    assert plain == Data([(after("a", (1, 2)),)]).digest
    others = [after("a", (1, 3)), after("b", (1, 2)), after("a", (1, 2), {"name": "x"})]
    assert len({plain, *(Data([(other,)]).digest for other in others)}) == 4
    assert Data([1, 2]).digest != Data([2, 1]).digest


def test_what_json_does_not_know_is_told_by_its_repr_without_its_address() -> None:
    class Thing:
        """Its repr says where it is."""

    def digest(keys: Any) -> str:
        return Data([PromptRecord("q", columns=Columns({"thing": Thing(), "keys": keys}))]).digest

    assert digest({}) == digest({}) and digest({(1, 2): 3}) == digest({(1, 2): 3}) != digest({})


def test_a_kill_between_the_two_renames_loses_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tiny_folder, tmp_path, monkeypatch)
    (tmp_path / "state").rename(tmp_path / ".state.old")
    (tmp_path / ".state.tmp").mkdir()
    assert RunFolder(tmp_path, "sft", (tmp_path / "config.yaml").read_text()).resumes
    assert not [*tmp_path.glob(".state.*")]


def test_the_state_is_kept_no_more_often_than_it_is_worth(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(state_module.time, "monotonic", lambda: now[0])
    model = models.trainable(tiny[0], LoRAConfig(r=2))
    state = TrainState(RunFolder(tmp_path, "sft", ""), Optimizer([model], SFTConfig().optim, 10), {}, {})
    kept: list[int] = []

    def keep(step: int) -> None:
        now[0] += 6.0  # a slow disk
        kept.append(step)

    monkeypatch.setattr(state, "_keep", keep)
    for step in range(1, 41):
        now[0] += 10.0
        state.after(step)
    # After a minute for the first time; then it has cost 6 seconds, a twentieth of two minutes.
    assert kept == [6, 18, 30]


def test_a_fingerprint_tells_weights_apart(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    before = weights_digest(model)
    assert weights_digest(model) == before
    last = list(model.parameters())[-1]
    with torch.no_grad():
        last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
    assert weights_digest(model) != before
