"""gae in Triton: a program a sequence, from its last tile of tokens to its first, one associative scan a tile.

What a run of tokens does to the recurrence is an affine function, and functions compose: csrc/cuda/gae.cu says how.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.arguments import GAEInputs
from rlhf_fast.kernels.launch_sizes import sizes


@triton.jit
def _then(
    first_decay, first_weight, first_constant, first_next, first_any,
    second_decay, second_weight, second_constant, second_next, second_any,
):  # fmt: skip
    """``first`` (of later tokens), then ``second`` (of earlier ones): advantage -> decay * advantage + weight * next +
    constant, next -> next; any: whether a token counts, else nothing happens."""
    constant = second_decay * first_constant + (second_weight * first_next + second_constant)
    both = first_any & second_any
    return (
        tl.where(both, second_decay * first_decay, tl.where(first_any, first_decay, second_decay)),
        tl.where(both, second_decay * first_weight, tl.where(first_any, first_weight, second_weight)),
        tl.where(both, constant, tl.where(first_any, first_constant, second_constant)),
        tl.where(second_any, second_next, first_next),
        first_any | second_any,
    )


@triton.jit
def _scan(decay, rest, following, counts, advantage, next_delta):
    """The advantage at each token of a tile (at one that does not count, that of the next), and what follows it."""
    zero = tl.zeros_like(rest)
    decays, weights, constants, nexts, any = tl.associative_scan(
        (zero + decay, zero + 1.0, rest, following, counts), 0, _then, reverse=True
    )
    advantages = decays * advantage + (weights * next_delta + constants)
    return tl.where(any, advantages, advantage), tl.where(any, nexts, next_delta)


@triton.jit
def _forward(
    rewards, logprobs, ref_logprobs, scores, kl_coef, values, mask, bootstrap, cu_seqlens, length,
    gamma, lam, critic_lam, advantages, returns, sums,
    HAS_REWARDS: tl.constexpr, HAS_KL: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr, PACKED: tl.constexpr, TWO: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + b).to(tl.int64)
        size = tl.load(cu_seqlens + b + 1).to(tl.int64) - begin
    else:
        begin = b * length
        size = tl.zeros_like(begin) + length
    # What the next token adds to delta: gamma V_next; after the last one that counts, the score comes on top.
    next_delta = 0.0
    if HAS_BOOTSTRAP:
        next_delta = gamma * tl.load(bootstrap + b)
    if HAS_SCORES:
        next_delta += tl.load(scores + b)
    advantage = 0.0
    critic_advantage = 0.0
    position = tl.arange(0, BLOCK)
    counted = tl.sum(tl.zeros((BLOCK,), tl.float64))
    total = counted
    squares = counted

    for tile in range(tl.cdiv(size, BLOCK)):
        token = (tl.cdiv(size, BLOCK) - 1 - tile) * BLOCK + position
        inside = token < size
        at = begin + token
        counts = inside
        if HAS_MASK:
            counts = counts & (tl.load(mask + at, mask=inside, other=0) != 0)
        value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        reward = tl.zeros((BLOCK,), tl.float32)
        if HAS_REWARDS:
            reward = tl.load(rewards + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_KL:
            k1 = tl.load(logprobs + at, mask=inside, other=0.0).to(tl.float32)
            k1 = k1 - tl.load(ref_logprobs + at, mask=inside, other=0.0).to(tl.float32)
            reward = reward - kl_coef * k1
        rest, following = reward - value, gamma * value
        tile_advantages, nexts = _scan(gamma * lam, rest, following, counts, advantage, next_delta)
        tile_returns = value + tile_advantages
        if TWO:
            of_critic, _ = _scan(gamma * critic_lam, rest, following, counts, critic_advantage, next_delta)
            tile_returns = value + of_critic
            critic_advantage = tl.sum(tl.where(position == 0, of_critic, 0.0))
        advantage = tl.sum(tl.where(position == 0, tile_advantages, 0.0))
        next_delta = tl.sum(tl.where(position == 0, nexts, 0.0))
        tl.store(advantages + at, tl.where(counts, tile_advantages, 0.0), mask=inside)
        tl.store(returns + at, tl.where(counts, tile_returns, 0.0), mask=inside)
        if HAS_SUMS:
            exact = tl.where(counts, tile_advantages, 0.0).to(tl.float64)
            counted += tl.sum(counts.to(tl.float64))
            total += tl.sum(exact)
            squares += tl.sum(exact * exact)
    if HAS_SUMS:
        tl.store(sums + 3 * b, counted)
        tl.store(sums + 3 * b + 1, total)
        tl.store(sums + 3 * b + 2, squares)


def forward(x: GAEInputs, advantages: Tensor, returns: Tensor, sums: Tensor | None) -> None:
    """Write advantages, returns and (if asked for) each sequence's sums, as csrc/common/gae.h has them."""
    size, where, paid = sizes("gae", advantages.device), x.sequences, x.paid
    _forward[(where.number,)](
        **paid._asdict(), values=x.values, mask=x.mask, bootstrap=x.bootstrap, cu_seqlens=where.cu_seqlens,
        length=where.length, **x.decays._asdict(), advantages=advantages, returns=returns, sums=sums,
        HAS_REWARDS=paid.rewards is not None, HAS_KL=paid.logprobs is not None,
        HAS_SCORES=paid.scores is not None, HAS_MASK=x.mask is not None, HAS_BOOTSTRAP=x.bootstrap is not None,
        PACKED=where.cu_seqlens is not None, TWO=x.decays.critic_lam != x.decays.lam, HAS_SUMS=sums is not None,
        BLOCK=size["BLOCK"], num_warps=size["WARPS"],
    )  # fmt: skip
