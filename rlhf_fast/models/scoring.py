"""Scoring without gradients: any function of a batch, over examples of any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rlhf_fast.data.batches import Batch, Example, microbatches_of_examples, pad
from rlhf_fast.models.token_budget import TokenBudget


@torch.no_grad()
def per_example(
    examples: Sequence[Example],
    function: Callable[[Batch], Sequence[torch.Tensor]],
    max_tokens: int,
    device: torch.device | str,
    longest_shared: int = 0,
) -> list[list[torch.Tensor]]:
    """Run `function` on micro-batches of `examples` without gradients; `longest_shared` as in `pad`.

    `function` returns tensors packed over response tokens (R,) or one value a sequence (B,). The result has for each
    of them a list with each example's part, in the order of `examples`.
    """
    budget = TokenBudget(max_tokens)

    def score() -> list[list[torch.Tensor]]:
        parts: list[list[torch.Tensor]] = []
        for group in microbatches_of_examples(examples, budget.tokens, longest_shared):
            batch = pad([examples[i] for i in group], device, longest_shared)
            outputs = function(batch)
            counts = batch.cu_seqlens.diff().tolist()
            if not parts:
                parts = [[torch.empty(0)] * len(examples) for _ in outputs]
            for output, part in zip(outputs, parts, strict=True):
                sizes = [1] * len(group) if len(output) == len(group) else counts
                for i, piece in zip(group, output.split(sizes), strict=True):
                    part[i] = piece
        return parts

    return budget.spend("scoring", score)
