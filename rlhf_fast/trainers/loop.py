"""What all trainers share: passes over the data, and scoring without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from rlhf_fast.data.batches import Batch, Example, microbatches_of_examples, pad, shuffled
from rlhf_fast.run_folder import RunFolder, progress_bar
from rlhf_fast.trainers.optimizer import Optimizer
from rlhf_fast.trainers.state import TrainState

Item = TypeVar("Item")
Stats = dict[str, torch.Tensor]


def fit(
    run: RunFolder,
    batches: list[list[Item]],
    losses: Callable[[list[Item]], Iterator[tuple[torch.Tensor, Stats]]],
    optimizer: Optimizer,
    evaluate: Callable[[], dict[str, float]],
    evaluate_every: int,
    identity: dict[str, str],
    sample: Callable[[int], None] = lambda step: None,
) -> dict[str, float]:
    """One optimiser step for each batch; evaluate before the first, every so often, and after the last, and `sample`
    when that is logged. An interrupted run goes on where it was (state.py).

    `losses(batch)` yields (loss, stats) of each micro-batch, divided by the whole batch's denominator, so that their
    sums are the batch's and micro-batching changes nothing.
    """
    with TrainState(run, optimizer, identity) as state:
        done = state.load()
        evaluated = evaluate()
        if done == 0:
            run.log({"step": 0, **evaluated})
            sample(0)
        with progress_bar(len(batches), run.phase, "step", done) as bar:
            for step, batch in enumerate(batches[done:], start=done + 1):
                totals: dict[str, float] = {}
                for loss, stats in losses(batch):
                    loss.backward()
                    add_stats(totals, {"loss": loss.detach(), **stats})
                lr = optimizer.lr
                norm = optimizer.step()
                run.log({"step": step, **totals, "lr": lr, "grad_norm": norm})
                bar.set_postfix({"loss": f"{totals['loss']:.3f}"}, refresh=False)
                bar.update()
                if step % evaluate_every == 0 or step == len(batches):
                    evaluated = evaluate()
                    run.log({"step": step, **evaluated})
                    sample(step)
                state.after(step)
    return evaluated


def add_stats(totals: dict[str, float], stats: Stats) -> None:
    """Add one micro-batch's sums to the batch's. One copy to the host for all of them."""
    values = torch.stack([value.detach().float() for value in stats.values()]).tolist()
    for name, value in zip(stats, values, strict=True):
        totals[name] = totals.get(name, 0.0) + value


@torch.no_grad()
def per_example(
    examples: Sequence[Example],
    function: Callable[[Batch], Sequence[torch.Tensor]],
    max_tokens: int,
    device: torch.device | str,
    shared: int = 0,
) -> list[list[torch.Tensor]]:
    """Run `function` on micro-batches of `examples` without gradients; `shared` as in `pad`.

    `function` returns tensors packed over response tokens (R,) or one value a sequence (B,). The result has for each
    of them a list with each example's part, in the order of `examples`.
    """
    parts: list[list[torch.Tensor]] = []
    for group in microbatches_of_examples(examples, max_tokens, shared):
        batch = pad([examples[i] for i in group], device, shared)
        outputs = function(batch)
        counts = batch.cu_seqlens.diff().tolist()
        if not parts:
            parts = [[torch.empty(0)] * len(examples) for _ in outputs]
        for output, part in zip(outputs, parts, strict=True):
            sizes = [1] * len(group) if len(output) == len(group) else counts
            for i, piece in zip(group, output.split(sizes), strict=True):
                part[i] = piece
    return parts


def split_heldout(items: Sequence[Item], share: float, seed: int, least: int = 1) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items: at least one to train on, and at least `least` held out.

    Raises:
        ValueError: too few items for that, or a share that is not between 0 and 1.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"heldout: {share}; expected a share between 0 and 1, such as 0.1")
    if len(items) < least + 1:
        raise ValueError(f"heldout: {len(items)} in all, of which {least} are to be held out and 1 to train on")
    order = shuffled(items, seed)
    count = min(len(items) - 1, max(least, round(share * len(items))))
    return order[count:], order[:count]


def epoch_batches(items: Sequence[Item], size: int, epochs: int, seed: int) -> list[list[Item]]:
    """Batches of `size` items (the last of an epoch may be smaller), in a fresh order each epoch."""
    batches = []
    for epoch in range(epochs):
        order = shuffled(items, seed + epoch)
        batches.extend([order[start : start + size] for start in range(0, len(order), size)])
    return batches


def concatenated(parts: list[torch.Tensor], rows: Iterable[int]) -> torch.Tensor:
    """The parts of some examples, packed."""
    return torch.cat([parts[row] for row in rows])
