"""Run the steps of any trainer: the loop over them, and one optimiser step from the gradients of micro-batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from rlhf_fast.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data.batches import shuffled
from rlhf_fast.models.adapters import Model, copy_weights
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.runs.terminal import Terminal
from rlhf_fast.trainers.loop.checkpoints import Checkpoints, Goal
from rlhf_fast.trainers.loop.monitor import Monitor, Monitors
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.loop.state import Data, Stateful, TrainState, weights_digest

Item = TypeVar("Item")
Stats = dict[str, torch.Tensor]
Row = dict[str, float]


class Outcome(NamedTuple):
    """Outcome of a run: the step that was chosen, and its metrics."""

    step: int  # whose checkpoint is the run's
    row: Row  # its metrics, and what was measured after it


def run_steps(
    run: RunFolder,
    steps: int,
    step: Callable[[int], Row],
    optimizer: Optimizer,
    checkpoints: Checkpoints,
    identity: dict[str, str | Data],
    every: int,
    evaluate: Callable[[int], Row] | None = None,
    monitors: Sequence[Monitor] = (),
    stateful: dict[str, Stateful] | None = None,
) -> Outcome:
    """Run every trainer's loop: from where the run was interrupted (state.py) to its last step.

    Args:
        step: does step n and returns its metrics.
        every: steps from one evaluation to the next; there is one before the first step and one after the last, too.
        evaluate: returns the metrics after step n by which checkpoints are judged, none if nothing is held out; without
            it they are the step's own.
        monitors: are asked after every step, once it was evaluated if that was due (monitor.py).
        stateful: what must come back beside weights, optimiser and checkpoints when the run goes on.

    Raises:
        FloatingPointError: more than `optim.max_skipped` steps in a row were not finite.
    """
    watching = Monitors(monitors)
    stateful = {**(stateful or {}), "checkpoints": checkpoints, **watching.stateful}

    def evaluated(n: int, row: Row) -> Row:
        measured = evaluate(n) if evaluate else {}
        if measured:
            run.log({"step": n, **measured})
        return {**row, **measured}

    with TrainState(run, optimizer, identity, stateful) as state:
        done = state.load()
        if done == 0 and evaluate and (measured := evaluate(0)):
            run.log({"step": 0, **measured})
        with Terminal(run.phase, steps, done) as terminal:
            if run.resumes:
                terminal.say(f"{run.phase}: goes on after step {done} of {steps}, from {run.state}")
            state.end_if_told()
            for n in range(done + 1, steps + 1):
                row = step(n)
                run.log({"step": n, **row})
                if optimizer.skipped > optimizer.config.max_skipped:
                    raise FloatingPointError(
                        f"{run.phase}: loss or gradient were not finite in {optimizer.skipped} steps in a row, up to "
                        f"step {n}; their data are in {run.path / 'skipped.jsonl'}; lower optim.lr, or look at these "
                        "data"
                    )
                judged = n % every == 0 or n == steps
                if judged:
                    row = evaluated(n, row)
                told, save, why = watching.after(run, n, steps, row, checkpoints.saved)
                last = n == steps or bool(why)
                if last and not judged:
                    row, judged = evaluated(n, row), True
                if judged:
                    checkpoints.after(n, row, save or last)
                elif save:
                    checkpoints.keep(n)
                terminal.step(n, row, in_table=judged or not evaluate)
                for line in told:
                    terminal.say(line)
                if checkpoints.exhausted:
                    why = f"{checkpoints.goal.metric} has not improved for {checkpoints.worse} evaluations"
                if why:
                    terminal.say(f"{run.phase}: ended after step {n} of {steps}: {why}")
                if last or why:
                    return Outcome(*checkpoints.outcome(n, row))
                state.after(n)
    raise AssertionError("a run has steps")


def fit(
    run: RunFolder,
    model: Model,
    batches: list[list[Item]],
    losses: Callable[[list[Item]], Iterator[tuple[torch.Tensor, Stats]]],
    budget: TokenBudget,
    config: SFTConfig | RewardConfig | DPOConfig,
    goal: Goal,
    data: Sequence[Any],
    evaluate: Callable[[int], Row],
    save: Callable[[Path], None],
    load: Callable[[Path], tuple[Model, Any]],
    monitors: Sequence[Monitor] = (),
) -> Outcome:
    """Train `model` by one optimiser step for each batch; in the end it is as after the step of the outcome, whose row
    has what was measured then, and before the first step.

    Args:
        batches: those of all epochs, of which `max_steps` may leave some out.
        data: all that is trained on and held out, by which an interrupted run is known again.
        evaluate: metrics after step n, the goal's among them; each epoch, or with each checkpoint.
        save, load: a checkpoint of `model`.
        monitors: as of `run_steps`.
    """
    steps = min(len(batches), config.max_steps or len(batches))
    optimizer = Optimizer([model], config.optim, steps)

    def step(n: int) -> Row:
        batch = batches[n - 1]
        return learn(run, n, batch, lambda: losses(batch), optimizer, budget)

    outcome = run_steps(
        run,
        steps,
        step,
        optimizer,
        Checkpoints(run, config.run, goal, save, config.patience),
        identity={"data": Data(data), "model": weights_digest(model)},
        every=config.run.save_every or math.ceil(len(batches) / config.epochs),
        evaluate=evaluate,
        monitors=monitors,
    )
    if outcome.step != optimizer.steps:
        copy_weights(load(run.checkpoint(outcome.step))[0], model)
    measured = {name: value for name, value in outcome.row.items() if name.startswith("heldout_")}
    return Outcome(outcome.step, {**measured, **run.before(measured)})


def learn(
    run: RunFolder,
    step: int,
    batch: Sequence[Any],
    losses: Callable[[], Iterator[tuple[torch.Tensor, Stats]]],
    optimizer: Optimizer,
    budget: TokenBudget,
) -> Row:
    """Take one optimiser step on `batch`; return its loss and statistics.

    `losses()` yields (loss, stats) of each micro-batch, divided by the whole batch's denominator, so that their sums
    are the batch's and micro-batching changes nothing. Where loss or gradient is not finite, the step is skipped and
    the batch goes to skipped.jsonl.
    """

    def accumulate() -> Row:
        optimizer.drop_gradients()
        totals: Row = {}
        for loss, stats in losses():
            loss.backward()
            add_stats(totals, {"loss": loss.detach(), **stats})
        return totals

    totals = budget.spend(f"{run.phase}, training", accumulate)
    lr = optimizer.lr
    norm = optimizer.step(totals["loss"])
    if optimizer.skipped:
        run.skip({"step": step, "loss": totals["loss"], "grad_norm": norm, "examples": [*map(as_tokens, batch)]})
    return {**totals, "lr": lr, "grad_norm": norm}


def as_tokens(item: Any) -> list[dict[str, Any]]:
    """Write what was trained on as JSON: an example, all of a group of comparisons, or of a demonstration."""
    parts = item if isinstance(item, tuple) else getattr(item, "examples", [item])
    return [dataclasses.asdict(part) for part in parts]


def add_stats(totals: Row, stats: Stats) -> None:
    """Add one micro-batch's sums to the batch's (of a maximum, the larger). One copy to the host for all of them."""
    values = torch.stack([value.detach().float() for value in stats.values()]).tolist()
    for name, value in zip(stats, values, strict=True):
        totals[name] = (
            max(totals[name], value) if name in totals and name.endswith("_max") else totals.get(name, 0.0) + value
        )


def epoch_batches(items: Sequence[Item], size: int, epochs: int, seed: int) -> list[list[Item]]:
    """Cut items into batches of `size` (the last of an epoch may be smaller), in a new order each epoch."""
    batches = []
    for epoch in range(epochs):
        order = shuffled(items, seed + epoch)
        batches.extend([order[start : start + size] for start in range(0, len(order), size)])
    return batches


def concatenated(parts: list[torch.Tensor], rows: Iterable[int]) -> torch.Tensor:
    """The parts of some examples, packed."""
    return torch.cat([parts[row] for row in rows])
