"""The PPO loss: its policy, value, entropy and KL terms, and its statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.kernels.arguments import PPOTensors
from rlhf_fast.ops.options import PPOOptions
from rlhf_fast.ops.reference.advantages import whiten_by
from rlhf_fast.ops.reference.common import Stats, divide, keep, sequence_sum
from rlhf_fast.ops.reference.kl import kl_estimate


def aggregate(
    x: Tensor, mask: Tensor, cu_seqlens: Tensor | None, aggregation: str, denominator: float | Tensor | None
) -> Tensor:
    """Reduce per-token x to one number: over all tokens, or over sequences (with an unmasked token) of mean or sum."""
    if aggregation == "token_mean":
        return divide(keep(x, mask).sum(), mask.sum(), denominator)
    per_sequence = sequence_sum(x, mask, cu_seqlens)  # (B,)
    lengths = sequence_sum(mask.to(x.dtype), None, cu_seqlens)  # (B,)
    if aggregation == "sequence_mean":
        per_sequence = per_sequence / lengths.clamp(min=1)
    return divide(per_sequence.sum(), (lengths > 0).sum(), denominator)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Give each token the mean over its sequence's unmasked tokens as value, and its own gradient (GSPO-token)."""
    lengths = sequence_sum(mask.to(log_ratio.dtype), None, cu_seqlens)  # (B,)
    means = sequence_sum(log_ratio.detach(), mask, cu_seqlens) / lengths.clamp(min=1)
    if cu_seqlens is None:
        means = means[:, None].expand(log_ratio.shape)  # (B, T)
    else:
        means = means.repeat_interleave(cu_seqlens.diff())  # (N,)
    return means + (log_ratio - log_ratio.detach())


def ppo_policy(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), at most -A c where A < 0; 1 where the clipped side is larger, and 1
    where the bound holds."""
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = torch.maximum(plain, clipped)
    held = torch.zeros_like(policy, dtype=torch.bool)
    if dual_clip is not None:
        most = -advantages * dual_clip
        held = (advantages < 0) & (policy > most)
        policy = torch.where(held, most, policy)
    return policy, (clipped > plain).to(ratio.dtype), held.to(ratio.dtype)


def cispo_policy(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-A clip(r, 1 - low, 1 + high) log p, the clipped ratio a constant; and 1 where it was clipped."""
    ratio = log_ratio.detach().exp()
    near = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -advantages * near * logprobs, (near != ratio).to(ratio.dtype)


def sapo_policy(log_ratio: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A."""
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_pos), advantages.new_tensor(tau_neg))
    return -advantages * (4 / tau) * torch.sigmoid(tau * (log_ratio.exp() - 1))


RATIO_EDGES = (*(-(2.0**-i) for i in range(1, 8)), 0.0, *(2.0**-i for i in range(7, 0, -1)))


def extremes(log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest, within +-20 as they are clamped; 20 and -20 without any."""
    least, most = (F.pad(keep(log_ratio, mask, end).flatten(), (0, 1), value=end) for end in (20.0, -20.0))
    return least.amin(), most.amax()


def ratio_quantile(log_ratio: Tensor, mask: Tensor, share: float) -> Tensor:
    """exp of the log-ratio below which a share of the unmasked tokens lies; 0 without one.

    Between two of RATIO_EDGES, beyond them between the last and the largest (smallest) there is, by linear
    interpolation of how many tokens lie at most there.
    """
    n = mask.sum()
    least, most = extremes(log_ratio, mask)
    edges = log_ratio.new_tensor(RATIO_EDGES)
    at_most = torch.stack([(mask & ~(log_ratio > edge)).sum() for edge in edges])
    x = torch.cat([least[None], torch.minimum(torch.maximum(edges, least), most), most[None]]).double()  # (17,)
    counts = torch.cat([torch.zeros_like(n)[None], at_most, n[None]]).double()
    wanted = share * n.double()
    i = (counts < wanted).sum().clamp(1, len(RATIO_EDGES) + 1)
    part = (wanted - counts[i - 1]) / (counts[i] - counts[i - 1]).clamp(min=1)
    return torch.where(n > 0, (x[i - 1] + (x[i] - x[i - 1]) * part).exp(), 0).to(log_ratio.dtype)


def ppo_value(
    values: Tensor, old_values: Tensor | None, returns: Tensor, value_clip: float | None
) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (V_clip - R)^2), V_clip within value_clip of V_old; and 1 where the clipped side is larger."""
    plain = (values - returns).square()
    if value_clip is None or old_values is None:
        return 0.5 * plain, torch.zeros_like(plain)
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    clipped = (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), (clipped > plain).to(plain.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - var(R - V) / var(R) over the unmasked tokens; 0 when var(R) is 0."""
    n = mask.sum().clamp(min=1)

    def variance(x: Tensor) -> Tensor:
        return keep(x - keep(x, mask).sum() / n, mask).square().sum() / n

    total = variance(returns)
    return torch.where(total == 0, 0, 1 - variance(returns - values) / torch.where(total == 0, 1, total))


def ppo_loss(
    tensors: PPOTensors, options: PPOOptions, cu_seqlens: Tensor | None, denominator: float | Tensor | None
) -> tuple[Tensor, Stats]:
    """policy + value_coef * value - entropy_coef * entropy + kl_coef * kl; r = exp(clamp(log p - log p_old, +-20))."""
    t, o = tensors, options
    assert t.logprobs is not None
    mask = torch.ones_like(t.logprobs, dtype=torch.bool) if t.mask is None else t.mask

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, mask, cu_seqlens, o.aggregation, denominator)

    def token_mean(x: Tensor) -> Tensor:
        return aggregate(x, mask, None, "token_mean", denominator if o.aggregation == "token_mean" else None).detach()

    logprobs, old, A = keep(t.logprobs, mask), keep(t.old_logprobs.detach(), mask), keep(t.advantages.detach(), mask)
    if t.advantage_sums is not None:
        A = whiten_by(A, t.advantage_sums.detach())
    own_log_ratio = (logprobs - old).clamp(-20, 20)
    log_ratio = own_log_ratio
    if o.ratio == "sequence":
        log_ratio = sequence_log_ratio(logprobs - old, mask, cu_seqlens).clamp(-20, 20)
    nothing = torch.zeros_like(A)
    clipped = dual_clipped = nothing
    if o.objective == "clip":
        policy, clipped, dual_clipped = ppo_policy(log_ratio, A, o.clip_low, o.clip_high, o.dual_clip)
    elif o.objective == "cispo":
        policy, clipped = cispo_policy(log_ratio, logprobs, A, o.clip_low, o.clip_high)
    else:
        policy = sapo_policy(log_ratio, A, o.tau_pos, o.tau_neg)
    value = value_clipped = H = KL = rollout_weight = rollout_clipped = nothing
    explained = nothing.sum()
    if t.rollout_logprobs is not None:
        apart = (old - keep(t.rollout_logprobs.detach(), mask)).clamp(-20, 20).exp()
        rollout_weight, rollout_clipped = apart.clamp(max=o.rollout_cap), (apart > o.rollout_cap).to(apart.dtype)
        policy = policy * rollout_weight
    if t.values is not None and t.returns is not None:
        V, R = keep(t.values, mask), keep(t.returns.detach(), mask)
        V_old = None if t.old_values is None else keep(t.old_values.detach(), mask)
        value, value_clipped = ppo_value(V, V_old, R, o.value_clip)
        explained = explained_variance(V.detach(), R, mask)
    if t.entropy is not None:
        H = keep(t.entropy, mask)
    if t.ref_logprobs is not None:
        KL = kl_estimate(logprobs, keep(t.ref_logprobs.detach(), mask), o.kl)

    terms = {"policy_loss": mean(policy), "value_loss": mean(value), "entropy": mean(H), "kl": mean(KL)}
    loss = terms["policy_loss"]
    for coef, name in ((o.value_coef, "value_loss"), (-o.entropy_coef, "entropy"), (o.kl_coef, "kl")):
        loss = loss + coef * terms[name] if coef != 0 else loss  # an infinite kl that has no weight is no NaN
    log_ratio, d = log_ratio.detach(), own_log_ratio.detach()
    least, most = extremes(log_ratio, mask)
    return loss, {
        **{name: term.detach() for name, term in terms.items()},
        "ratio_mean": token_mean(log_ratio.exp()),
        "ratio_max": torch.where(mask.any(), most.exp(), 0),
        "ratio_min": torch.where(mask.any(), least.exp(), 0),
        "ratio_p05": ratio_quantile(log_ratio, mask, 0.05),
        "ratio_p95": ratio_quantile(log_ratio, mask, 0.95),
        "clip_fraction": token_mean(clipped),
        "dual_clip_fraction": token_mean(dual_clipped),
        "value_clip_fraction": token_mean(value_clipped),
        "approx_kl": token_mean(old - logprobs),
        "approx_kl_k3": token_mean(torch.expm1(d) - d),
        "rollout_weight": token_mean(rollout_weight),
        "rollout_clip_fraction": token_mean(rollout_clipped),
        "explained_variance": explained,
    }
