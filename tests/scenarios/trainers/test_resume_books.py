"""What a run counts and keeps beside its weights, when it goes on from a step before the one that it was killed in."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.config import OptimConfig, RunConfig
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.runs.files import write_folder_atomic
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.checkpoints import Checkpoints, Goal
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.loop.state import TrainState
from rlhf_fast.trainers.loop.steps import Outcome, learn, run_steps


class Killed(BaseException):
    """As SIGKILL would: nothing is kept after it."""


def run(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: Sequence[float],
    kept: int = 0,
    killed: int = 0,
    skipped: Collection[int] = (),
    samples: Collection[int] = (),
    patience: int | None = None,
    max_skipped: int = 3,
    keep_last: int = 2,
) -> Outcome:
    """A run with a step and an evaluation for each of `losses`, which keeps its state after step `kept` alone and is
    killed at the end of step `killed`, if they are given.

    Args:
        skipped: steps whose loss is not finite.
        samples: steps that write a sample.
    """
    model = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)

    def step(n: int) -> dict[str, float]:
        def loss() -> Iterator[Any]:
            yield model(torch.ones(1, 1)).sum() * (math.nan if n in skipped else n), {}

        row = learn(folder, n, [], loss, optimizer, TokenBudget(100))
        if n in samples:
            folder.samples(n, [{"text": f"said at {n}"}])
        return {**row, "weight": model.weight.item()}

    def save(path: Path) -> None:
        def fill(aside: Path) -> None:
            (aside / "weight").write_text(str(model.weight.item()))

        write_folder_atomic(path, fill)

    def after(self: TrainState, n: int) -> None:
        if n == kept:
            self._keep(n)
        if n == killed:
            raise Killed

    with monkeypatch.context() as patch, RunFolder(out, "sft", "") as folder:
        patch.setattr(TrainState, "after", after)
        optimizer = Optimizer([model], OptimConfig(lr=0.1, warmup=0.5, max_skipped=max_skipped), len(losses))
        checkpoints = Checkpoints(
            folder, RunConfig(save_every=1, keep_last=keep_last), Goal("heldout_loss", higher=False), save, patience
        )
        return run_steps(
            folder, len(losses), step, optimizer, checkpoints, {"data": "the same"}, every=1,
            evaluate=lambda n: {"heldout_loss": losses[n - 1] if n else 9.0},
        )  # fmt: skip


def left(out: Path) -> dict[str, Any]:
    """All that a run has left, without its times and its state."""
    found: dict[str, Any] = {
        str(file.relative_to(out)): file.read_text() for file in out.rglob("*") if file.is_file() and file.suffix == ""
    }
    for name in ("metrics", "samples", "skipped"):
        if (out / f"{name}.jsonl").exists():
            rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return found


LOSSES = [3.0, 1.0, 2.0, 2.5, 0.5, 0.7, 0.6, 0.9]
KINDS: dict[str, dict[str, Any]] = {
    # Steps 3 and 4 use up two thirds of it.
    "patience": {"losses": [3.0, 1.0, 2.0, 2.5, 1.5, 0.1], "patience": 3},
    "patience that is given back": {"losses": LOSSES, "patience": 3, "keep_last": 1},
    "skipped steps": {"losses": LOSSES, "skipped": {2, 3, 5}, "samples": {1, 4, 6}, "max_skipped": 2},
    "files that begin late": {"losses": LOSSES, "skipped": {5}, "samples": {4, 7}, "keep_last": 1},
}
ENDS = {"patience": (2, 5), "patience that is given back": (5, 8)}  # the outcome's step and the last; else 8 and 8
KILLS = [(kept, killed) for killed in range(1, 5) for kept in range(1, killed + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_what_it_had_counted_from_any_step(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience, skipped steps, the best step, checkpoints and files are those of the unbroken run, whichever step was
    kept, and how many were done in vain after it."""
    options = KINDS[kind]
    outcome = run(tmp_path / "unbroken", monkeypatch, **options)
    expected = left(tmp_path / "unbroken")
    assert (outcome.step, expected["metrics"][-1]["step"]) == ENDS.get(kind, (8, 8))
    for kept, killed in KILLS:
        out = tmp_path / f"{kept}-{killed}"
        with pytest.raises(Killed):
            run(out, monkeypatch, **options, kept=kept, killed=killed)
        assert run(out, monkeypatch, **options) == outcome, (kept, killed)
        assert left(out) == expected, (kept, killed)


def test_patience_that_was_half_used_ends_the_run_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        run(tmp_path, monkeypatch, **KINDS["patience"], kept=3, killed=4)
    outcome = run(tmp_path, monkeypatch, **KINDS["patience"])
    assert outcome.step == 2 and outcome.row["heldout_loss"] == 1.0
    steps = [row["step"] for row in left(tmp_path)["metrics"] if "loss" in row]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kept", [3, 4])
def test_skipped_steps_of_before_count_towards_too_many_in_a_row(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"losses": LOSSES, "skipped": {3, 4, 5, 6}, "max_skipped": 2}
    with pytest.raises(Killed):
        run(tmp_path, monkeypatch, **options, kept=kept, killed=4)
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row, up to step 5;"):
        run(tmp_path, monkeypatch, **options)
    assert [row["step"] for row in left(tmp_path)["skipped"]] == [3, 4, 5]


@pytest.mark.parametrize(("option", "name"), [("skipped", "skipped.jsonl"), ("samples", "samples.jsonl")])
def test_a_file_that_began_after_the_kept_step_is_gone_unless_it_begins_again(
    option: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that went wrong for a reason that is over leaves nothing."""
    options: dict[str, Any] = {option: {3, 4}}
    with pytest.raises(Killed):
        run(tmp_path, monkeypatch, losses=LOSSES, kept=2, killed=4, **options)
    assert (tmp_path / name).exists()
    run(tmp_path, monkeypatch, losses=LOSSES)
    assert not (tmp_path / name).exists()


def test_checkpoints_of_steps_that_are_not_done_again_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where patience ends this time, as on a device whose sums come in any order."""

    def there() -> set[str]:
        return {folder.name for folder in (tmp_path / "checkpoints").iterdir()}

    options: dict[str, Any] = {"patience": 1, "keep_last": 4}
    with pytest.raises(Killed):
        run(tmp_path, monkeypatch, [3.0, 1.0, 0.9, 0.8, 0.7, 0.6], kept=2, killed=5, **options)
    assert there() == {"step-2", "step-3", "step-4", "step-5"}
    outcome = run(tmp_path, monkeypatch, [3.0, 1.0, 1.1, 0.8, 0.7, 0.6], **options)
    assert outcome.step == 2 and there() == {"step-2", "step-3"}


def test_the_best_checkpoint_of_the_kept_step_is_there_whatever_was_done_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better steps came after it, twice, which are not as good at the third time."""
    options: dict[str, Any] = {"patience": 3, "keep_last": 1}
    for kept in (2, 0):
        with pytest.raises(Killed):
            run(tmp_path, monkeypatch, [3.0, 1.0, 0.9, 0.8, 0.7, 0.6], kept=kept, killed=5, **options)
    outcome = run(tmp_path, monkeypatch, [3.0, 1.0, 1.1, 1.2, 1.3, 1.4], **options)
    assert outcome.step == 2
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"step-2", "step-5"}


def test_the_seconds_of_before_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not those in which nothing ran."""
    now = [1000.0]
    monkeypatch.setattr("rlhf_fast.runs.folder.time.monotonic", lambda: now[0])
    with RunFolder(tmp_path, "sft", "") as folder:
        now[0] += 30.0
        folder.rewind({}, 100.0)
        now[0] += 5.0
        folder.log({"step": 1})
        assert folder.seconds() == 105.0
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "seconds": 105.0}
        assert folder.finish({})["seconds"] == 105.0
