"""The forward pass of a loss of an output layer that takes the gradients too: a block of whole rows at a time, logits,
log-probabilities, the loss's gradient in those, the gradient in the logits over the logits, and its products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.ops._rows import matrix
from rlhf_fast.ops.linear_token_logprobs import Problem
from rlhf_fast.ops.lm_head import HeadGradients

# Of a block: its rows, what the kernel found of each (logprobs, entropies, largest z, sums below it), and its logits.
# Returns the loss's gradients in logprobs, entropies, logs of the sums, and each z of a row; None for 0.
Upstream = Callable[[slice, list[Tensor], Tensor], "tuple[Tensor | None, ...]"]


def sweep(problem: Problem, needs: list[bool], upstream: Upstream) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """logprobs and entropy, both (rows,), and the gradients in hidden (..., H), weight, bias, a and b.

    Args:
        needs: for each of the five gradients, which are float32, and empty where not needed.
        upstream: as above.
    """
    logprobs, entropy, *state = (torch.zeros(problem.rows, device=problem.device) for _ in range(4))
    gradients = HeadGradients(problem.head, needs, torch.float32)
    for block in problem.whole_rows(frozen=not needs[1]):
        part, logits = problem.part(block.rows), matrix(block.logits)
        results = [x[block.rows] for x in (logprobs, entropy, *state)]
        problem.head.fill(block)
        problem.kernels.forward(logits, *part, results)
        in_logprobs, in_entropy, *others = upstream(block.rows, results, block.logits)
        if not any(needs):
            continue
        problem.kernels.gradient(
            logits, *part, first_column=0, results=results, grad_logprobs=in_logprobs, grad_entropy=in_entropy,
            out=block.logits, **dict(zip(("grad_log_sum", "grad_each"), others, strict=False)),
        )  # fmt: skip
        gradients.add(block)
    in_hidden, *of_head = gradients.finish()
    if in_hidden is not None:
        in_hidden = problem.spread(in_hidden).view(problem.shape)
    nothing = logprobs.new_empty(0)
    return logprobs, entropy, tuple(nothing.clone() if x is None else x for x in (in_hidden, *of_head))
