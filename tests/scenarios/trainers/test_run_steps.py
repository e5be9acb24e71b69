"""The loop that all trainers share: checkpoints, early ends, bad numbers, too little memory, narrow weights."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, RunConfig, SFTConfig
from rlhf_fast.models.scoring import per_example
from rlhf_fast.models.token_budget import LEAST, TokenBudget
from rlhf_fast.runs import trackers
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.runs.terminal import Terminal
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.loop.checkpoints import Checkpoints, Goal
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.loop.steps import run_steps
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer, batch_loss

DEMONSTRATIONS = [{"prompt": f"q{i}", "completion": f"answer {i % 3}"} for i in range(16)]
COMPARISONS = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(8)]
OPTIM = OptimConfig(lr=1e-3)


def sft(folder: Path, out: Path, monitors: Any = (), **options: Any) -> SFTTrainer:
    config = SFTConfig(**{"batch_size": 4, "sample_tokens": 4, "optim": OPTIM, **options})
    return SFTTrainer(folder, DEMONSTRATIONS, out, config, monitors=monitors)


def make(name: str, folder: Path, out: Path, monitors: Any = (), **options: Any) -> Any:
    options = {"lora": LoRAConfig(r=4), "optim": OPTIM, **options}
    if name == "sft":
        return sft(folder, out, monitors, **options)
    if name == "reward":
        return RewardTrainer(folder, COMPARISONS, out, RewardConfig(heldout=0.3, **options), monitors=monitors)
    if name == "dpo":
        return DPOTrainer(folder, COMPARISONS, out, DPOConfig(heldout=0.3, **options), monitors=monitors)
    config = PPOConfig(
        steps=2,
        prompts_per_step=4,
        samples_per_prompt=2,
        minibatches=2,
        max_new_tokens=8,
        critic=options.pop("critic", "shared"),
        **options,
    )
    prompts = [{"prompt": f"q{i}"} for i in range(4)]

    def by_length(prompts: list[Any], texts: list[str]) -> list[float]:
        return [float(len(text)) for text in texts]

    return PPOTrainer(folder, by_length, prompts, out, config, monitors=monitors)


def rows(out: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def drive(out: Path, losses: list[float], patience: int | None = None, **run: Any) -> tuple[Any, list[int], list[str]]:
    """A run whose evaluations give these losses: its outcome, the steps that it did, and the checkpoints it left."""
    folder = RunFolder(out, "sft", "")
    optimizer = Optimizer([torch.nn.Linear(1, 1)], OPTIM, len(losses))
    done: list[int] = []

    def step(n: int) -> dict[str, float]:
        done.append(n)
        return {"loss": 0.0}

    def save(path: Path) -> None:
        path.mkdir(parents=True)

    outcome = run_steps(
        folder, len(losses), step, optimizer,
        Checkpoints(folder, RunConfig(**run), Goal("heldout_loss", higher=False), save, patience),
        {}, every=run.get("save_every") or 1,
        evaluate=lambda _: {"heldout_loss": losses[done[-1] - 1] if done else 9.0},
    )  # fmt: skip
    return outcome, done, sorted(folder.name for folder in (out / "checkpoints").iterdir())


def test_without_being_asked_for_more_a_run_leaves_its_last_checkpoint(tmp_path: Path) -> None:
    outcome, done, left = drive(tmp_path, [3.0, 1.0, 2.0])
    assert (outcome.step, outcome.row, done, left) == (3, {"loss": 0.0, "heldout_loss": 2.0}, [1, 2, 3], ["step-3"])


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    outcome, _, left = drive(tmp_path, [3.0, 1.0, 2.0, 5.0, 4.0, 6.0], save_every=1, keep_last=2)
    assert left == ["step-2", "step-5", "step-6"] and outcome.step == 6
    outcome, _, left = drive(tmp_path / "b", [3.0, 1.0, 2.0, 5.0, math.nan], save_every=2, keep_last=1)
    assert left == ["step-2", "step-5"]


def test_patience_ends_a_run_whose_outcome_is_its_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, done, left = drive(tmp_path, [3.0, 1.0, 1.0, 2.0, 0.5], patience=2, keep_last=1)
    assert (outcome.step, outcome.row, done) == (2, {"loss": 0.0, "heldout_loss": 1.0}, [1, 2, 3, 4])
    assert left == ["step-2", "step-4"]
    assert "ended after step 4 of 5: heldout_loss has not improved for 2 evaluations" in capsys.readouterr().err


def test_a_run_means_its_outcome(tiny_folder: Path, tmp_path: Path) -> None:
    """A finished one the checkpoint that it names; one of an older version its newest."""
    trainer = sft(tiny_folder, tmp_path / "run", epochs=8, patience=1, optim=OptimConfig(lr=0.3, schedule="constant"))
    result = trainer.train()
    evaluated = {row["step"]: row["heldout_loss"] for row in rows(tmp_path / "run") if "heldout_loss" in row}
    best = min((step for step in evaluated if step), key=lambda step: evaluated[step])
    assert result["checkpoint"] == f"step-{best}" and best < max(evaluated) < 32
    assert models.resolve(tmp_path / "run").endswith(f"step-{best}")
    assert result["summary"]["heldout_loss"] == evaluated[best]
    result.pop("checkpoint")
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    assert models.resolve(tmp_path / "run").endswith(f"step-{max(evaluated)}")


# Bad numbers ----------------------------------------------------------------------------------------------------------


def broken(trainer: Any, steps: set[int]) -> None:
    """Make the losses of some steps not a number."""
    original, count = trainer._losses, [0]

    def losses(batch: Any) -> Iterator[Any]:
        training = torch.is_grad_enabled()
        count[0] += training
        for loss, stats in original(batch):
            yield loss * (math.nan if training and count[0] in steps else 1.0), stats

    trainer._losses = losses


def test_a_step_whose_loss_is_not_finite_is_skipped_and_its_batch_kept(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = sft(tiny_folder, tmp_path, epochs=2)
    broken(trainer, {2, 3})
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    skipped = rows(tmp_path, "skipped")
    assert [row["step"] for row in skipped] == [2, 3] and skipped[0]["loss"] is None
    found = {tuple(part["input_ids"]) for row in skipped for item in row["examples"] for part in item}
    assert found <= {part.input_ids for of in trainer.training for part in of} and len(skipped[0]["examples"]) == 4
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(p, old) for p, old in zip(after, before, strict=True))
    steps = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["loss"] is None for row in steps] == [False, True, True, *[False] * (len(steps) - 3)]


def test_too_many_of_them_in_a_row_end_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = sft(tiny_folder, tmp_path, epochs=3, optim=OptimConfig(max_skipped=2))
    broken(trainer, set(range(3, 99)))
    with pytest.raises(
        FloatingPointError, match=r"not finite in 3 steps in a row, up to step 5; their data are in .*skipped"
    ):
        trainer.train()
    assert not (tmp_path / "result.json").exists()


# Too little memory ----------------------------------------------------------------------------------------------------


def test_with_too_little_memory_a_step_is_done_again_in_smaller_parts(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And comes to the same."""
    outcomes = []
    for name, room in (("a", 10**9), ("b", 40)):
        trainer = sft(tiny_folder, tmp_path / name, epochs=1)

        def loss(model: Any, batch: Any, denominator: int, room: int = room) -> torch.Tensor:
            if batch.input_ids.numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")
            return batch_loss(model, batch, denominator)

        monkeypatch.setattr("rlhf_fast.trainers.sft.batch_loss", loss)
        trainer.train()
        outcomes.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*outcomes, rtol=0, atol=1e-4)
    assert trainer.budget.tokens == 32
    said = capsys.readouterr().err
    assert "sft, training: out of memory; going on with optim.max_tokens_per_microbatch = 512" in said


@pytest.mark.parametrize(
    "error, reason",
    [
        (torch.OutOfMemoryError("x\nmore"), r"\(x\)"),
        (MemoryError(), r"\(\)"),
        (RuntimeError("can't allocate memory: y"), r"\(can't allocate memory: y\)"),
    ],
)
def test_what_fits_in_no_part_names_the_part_and_what_to_do(error: BaseException, reason: str) -> None:
    budget = TokenBudget(200)

    def fail() -> None:
        raise error

    with pytest.raises(torch.OutOfMemoryError, match=rf"scoring: out of memory with 50 tokens .* {reason}; shorten"):
        budget.spend("scoring", fail)
    assert budget.tokens == 50 and budget.tokens // 2 < LEAST


def test_other_errors_are_not_taken_for_it() -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        TokenBudget(200).spend("scoring", fail)


def test_scoring_goes_on_in_smaller_parts_too(tiny: tuple[Any, Any]) -> None:
    from rlhf_fast.data.batches import Batch, Example

    def lengths(batch: Batch) -> list[torch.Tensor]:
        if batch.input_ids.numel() > 70:
            raise torch.OutOfMemoryError
        return [batch.cu_seqlens.diff()]

    examples = [Example((5,) * 9, (6,) * n) for n in (3, 9, 1, 7)]
    (parts,) = per_example(examples, lengths, 1000, "cpu")
    assert [int(part) for part in parts] == [3, 9, 1, 7]


# Narrow weights and recomputed activations ----------------------------------------------------------------------------


def test_narrow_weights_learn_from_updates_below_their_rounding() -> None:
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    optimizer = Optimizer([layer], OptimConfig(lr=1e-4, schedule="constant", warmup=0.0), 100)
    for _ in range(100):  # each update is a fortieth of what bfloat16 tells from 1
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert float(layer.weight.detach()) == pytest.approx(0.99, abs=2e-3)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("r", [0, 4])
def test_every_trainer_runs_in_bfloat16(name: str, r: int, tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(name, tiny_folder, tmp_path, dtype="bfloat16", lora=LoRAConfig(r=r))
    kinds = {p.dtype for p in trainer.model.parameters() if not p.requires_grad or r == 0}
    assert kinds == {torch.bfloat16}
    trainer.train()
    assert all(math.isfinite(row.get("loss", 0.0)) for row in rows(tmp_path))
    assert (tmp_path / "result.json").exists() and not (tmp_path / "skipped.jsonl").exists()
    saved = models.load_reward(tmp_path) if name == "reward" else models.load(tmp_path)
    assert saved[0].dtype == torch.float32  # as it is loaded, whatever it is stored as


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_recomputed_activations_give_the_same_run(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        more = {"critic": "separate"} if name == "ppo" else {}
        trainer = make(name, tiny_folder, tmp_path / str(on), optim=OptimConfig(lr=1e-3, checkpointing=on), **more)
        trainer.train()
        found.append([row.get("loss") for row in rows(tmp_path / str(on))])
    assert found[0] == pytest.approx(found[1], abs=1e-6, nan_ok=True)


def test_recomputing_keeps_less(tiny_folder: Path) -> None:
    kept = []
    for on in (False, True):
        model, _ = models.load(tiny_folder)
        model = models.trainable(model, LoRAConfig(r=4))
        if on:
            models.recompute_activations(model)
        sizes = [0]

        def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            models.hidden_states(model, torch.arange(5, 37).view(1, -1))
        kept.append(sizes[0])
    assert kept[1] < kept[0] / 4


# Shown elsewhere ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_metrics_samples_and_the_same_run_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    module = types.SimpleNamespace(
        init=lambda **given: calls.append(("init", given)),
        log=lambda row, step: calls.append(("log", (step, row))),
        finish=lambda: calls.append(("finish", None)),
        Table=lambda columns, data: (columns, data),
    )
    monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    RunFolder(tmp_path / "run", "ppo", "a: 1\n", (name,)).close()
    run = RunFolder(tmp_path / "run", "ppo", "a: 1\n", (name,))
    run.log({"step": 3, "loss": 0.5})
    run.samples(3, [{"text": "x", "score": 1.0}, {"text": "y"}])
    run.finish({})
    inits = [given for kind, given in calls if kind == "init"]
    assert inits[0]["project"] == "rlhf-fast" and inits[0]["config"] == {"a": 1} and inits[0]["resume"] == "allow"
    assert name == "trackio" or len(inits[0]["id"]) == 32
    assert ("log", (3, {"loss": 0.5})) in calls
    assert ("log", (3, {"samples": (["text", "score"], [["x", 1.0], ["y", None]])})) in calls and calls[-1][
        0
    ] == "finish"


def test_tensorboard_gets_metrics_and_samples(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = RunFolder(tmp_path, "ppo", "a: 1\n", ("tensorboard",))
    run.log({"step": 3, "loss": 0.5})
    run.samples(3, [{"text": "<b>x</b>"}])
    run.finish({})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    assert "samples/text_summary" in events.Tags()["tensors"]


def test_a_tracker_that_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match="wandb is not installed; pip install wandb"):
        trackers.open_trackers(("wandb",), tmp_path, "")


def test_a_terminal_shows_a_table_and_a_file_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tty in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda tty=tty: tty)
        with Terminal("ppo", 2, 0) as terminal:
            terminal.step(1, {"score": 0.25, "kl": 1.5, "other": 1.0}, in_table=True)
            terminal.step(2, {"score": math.nan, "kl": 2.0}, in_table=True)
        said = capsys.readouterr().err
        table = [line.split() for line in said.replace("\r", "\n").splitlines() if "step" in line and "%" not in line]
        assert (["step", "score", "kl"] in table) == tty
        assert ("    0.250     1.500" in said) == ("      nan     2.000" in said) == tty
