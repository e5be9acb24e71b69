"""Advantages: GAE, those of groups, and whitening."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops.reference.common import inside_sequences, keep, to_padded, widen


def gae(
    rewards: Tensor | None,
    values: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    critic_lam: float | None = None,
    scores: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  t + 1 is the next *unmasked* token."""
    if cu_seqlens is not None:
        inside = inside_sequences(cu_seqlens)
        real = inside if mask is None else to_padded(mask, inside)
        packed = (None if x is None else to_padded(x, inside) for x in (rewards, logprobs, ref_logprobs))
        rewards, logprobs, ref_logprobs = packed
        padded = gae(
            rewards, to_padded(values, inside), gamma=gamma, lam=lam, mask=real, bootstrap=bootstrap,
            critic_lam=critic_lam, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, kl_coef=kl_coef,
        )  # fmt: skip
        advantages, returns = padded[0][inside], padded[1][inside]  # (N,)
        return (advantages, returns, whitening_sums(advantages, mask)) if sums else (advantages, returns)
    values = keep(values, mask)  # (B, T)
    rewards = torch.zeros_like(values) if rewards is None else keep(rewards, mask)
    if logprobs is not None and ref_logprobs is not None:
        rewards = rewards - kl_coef * (keep(logprobs, mask) - keep(ref_logprobs, mask))
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    zero = torch.zeros_like(rewards[:, :1])  # (B, 1)
    next_value = zero if bootstrap is None else widen(bootstrap)[:, None]
    unpaid = zero if scores is None else widen(scores)[:, None]
    decays = (gamma * lam, gamma * (lam if critic_lam is None else critic_lam))
    after = [zero, zero]  # A_{t+1} of the actor and of the critic
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for r, v, real in reversed(list(zip(rewards.split(1, 1), values.split(1, 1), mask.split(1, 1), strict=True))):
        delta = r + unpaid + gamma * next_value - v  # (B, 1)
        here = [delta + decay * a for decay, a in zip(decays, after, strict=True)]
        after = [torch.where(real, new, old) for new, old in zip(here, after, strict=True)]
        next_value, unpaid = torch.where(real, v, next_value), torch.where(real, 0, unpaid)
        for column, a in zip(columns, (here[0], here[1] + v), strict=True):
            column.append(torch.where(real, a, 0))
    advantages, returns = (torch.cat([rewards[:, :0], *column[::-1]], dim=1) for column in columns)  # (B, T)
    return (advantages, returns, whitening_sums(advantages, mask)) if sums else (advantages, returns)


def whitening_sums(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(3,) float64: how many elements are unmasked, their sum and the sum of their squares."""
    exact = torch.where(mask, x, 0).double() if mask is not None else x.double()
    count = torch.tensor(x.numel(), device=x.device) if mask is None else mask.sum()
    return torch.stack((count.double(), exact.sum(), exact.square().sum()))


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) * rsqrt(var + eps) [+ mean], var = sum (x - mean)^2 / (n - 1), over the n unmasked elements."""
    if x.numel() == 0:
        return widen(x)
    # Less the least of them, so that equal ones are apart by exactly nothing, however large they are.
    least = keep(x.detach(), mask, math.inf).amin()
    x = keep(widen(x) - least, mask)
    n = torch.tensor(x.numel(), device=x.device) if mask is None else mask.sum()
    mean = x.sum() / n.clamp(min=1)
    centred = keep(x - mean, mask)
    variance = centred.square().sum() / (n - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else keep(whitened + mean + least, mask)


def whiten_by(x: Tensor, sums: Tensor) -> Tensor:
    """(x - mean) * rsqrt(var + 1e-8) with the mean and the variance of whitening_sums."""
    n, total, squares = sums.double().unbind()
    mean = total / n.clamp(min=1)
    variance = ((squares - total * mean) / (n - 1).clamp(min=1)).clamp(min=0)
    return (x - mean.to(x.dtype)) * torch.rsqrt(variance + 1e-8).to(x.dtype)


def group_advantages(
    rewards: Tensor,
    kind: str = "grpo",
    mask: Tensor | None = None,
    cu_groups: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """(r - mean) / (deviation + eps), r - mean, or r - mean of the others; 0 alone in a group."""
    if cu_groups is not None:
        inside = inside_sequences(cu_groups)
        real = inside if mask is None else to_padded(mask, inside)
        return group_advantages(to_padded(rewards, inside), kind, real, None, eps)[inside]  # (N,)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rewards = keep(rewards, mask, math.inf)  # (G, n)
    # Less the least of them, so that equal ones are apart by exactly nothing.
    rewards = keep(rewards - (rewards.amin(1, keepdim=True) if rewards.numel() else 0.0), mask)
    n = mask.sum(1, keepdim=True).to(rewards.dtype)  # (G, 1)
    total, others = rewards.sum(1, keepdim=True), (n - 1).clamp(min=1)
    apart = keep(rewards - total / n.clamp(min=1), mask)
    if kind == "grpo":
        apart = apart / ((apart.square().sum(1, keepdim=True) / others).sqrt() + eps)
    elif kind == "rloo":
        apart = rewards - (total - rewards) / others
    return keep(apart, mask & (n > 1))
