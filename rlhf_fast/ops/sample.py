"""sample: a token for each row of logits, and what is known of the distribution that it was drawn from."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import SampleOptions
from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._rows import plain

BACKENDS = ("cpu", "cuda", "triton", "reference")


_DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)  # of SampleOptions


class Samples(NamedTuple):
    """Tokens drawn by `sample`, one a row, and figures of the distribution of each row."""

    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) float32: under softmax(logits / temperature), nothing cut
    kept: Tensor  # (B,) float32: the probability of all that top_k, top_p and min_p left; 1 for all
    entropy: Tensor  # (B,) float32: of softmax(logits / temperature), in nats


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Samples:
    """Draw a token for each row by inverting the cumulative distribution. No row depends on another.

    Of softmax(logits / temperature) the `top_k` likeliest tokens stay; of those, the likeliest that together reach
    `top_p` of their probability; and those at least `min_p` times as likely as the likeliest. Equally likely tokens
    rank by their number. The log-probability under what was sampled from is `logprobs - log(kept)`.

    Args:
        logits: (B, V), float32, bfloat16, float16 or float64. -inf bans a token.
        uniform: (B,) float64 in [0, 1).
        temperature: (B,) float32; 0 takes the likeliest token (of equals the first), of softmax(logits). Kernels take
            one below 2^-126, whose inverse is no float32, as that.
        top_k: (B,) int32; 0 for all.
        top_p: (B,) float32 in (0, 1].
        min_p: (B,) float32 in [0, 1).

    Returns:
        `Samples`. Where a row is no distribution (nan, inf, or nothing but -inf) the token is -1 and the rest nan.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.floats(logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected (B, V)")
    options = SampleOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
    by_name = options._asdict()
    _checks.devices(logits=logits, **by_name)
    _checks.shapes(logits.shape[:1], "the rows of logits", **by_name)
    backend = dispatch.choose("sample", BACKENDS, logits)
    if backend == "reference":
        return Samples(*reference.sample(logits, options))
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    options = SampleOptions._make(map(plain, options, _DTYPES))
    like, new = options.temperature, torch.empty_like  # (B,) float32
    results = Samples(tokens=new(like, dtype=torch.int64), logprobs=new(like), kept=new(like), entropy=new(like))
    kernels(backend).forward(logits, options, results)
    return results


@functools.cache
def kernels(backend: str) -> Any:
    """The kernel of a backend: forward (see csrc/common/sample.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import sample as in_triton

        return in_triton
    return compiled.Sample(backend)
