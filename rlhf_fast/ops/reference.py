"""Every op in plain PyTorch: the definition that all other backends are held against.

Written to be read beside the papers, not to be fast. Three rules hold throughout:

- float32 inputs give float32 arithmetic, float64 gives float64, bfloat16 and float16 are widened to float32 first;
- a masked position is replaced *before* anything is computed from it and its result is replaced again afterwards
  (double ``where``), so that it may hold anything, NaN included, and its gradient is exactly zero;
- no branch looks at data. (Packed inputs read their sequence lengths once, to know how wide the padded form is.)

Arguments are already checked by the public functions, whose docstrings give shapes and sources in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Stats = dict[str, Tensor]


# --- shared by the ops below ------------------------------------------------------------------------------------


def widen(x: Tensor) -> Tensor:
    """float32 and float64 as they are, narrower floats in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def keep(x: Tensor, mask: Tensor | None, fill: float = 0.0) -> Tensor:
    """x widened, with ``fill`` (and no gradient) wherever the mask is False."""
    return widen(x) if mask is None else torch.where(mask, widen(x), fill)


def divide(total: Tensor, count: Tensor | float, denominator: float | Tensor | None) -> Tensor:
    """total / (denominator, or else count); a tensor of 0 counts as 1, so that nothing at all gives 0 and not NaN."""
    divisor = torch.as_tensor(count if denominator is None else denominator, device=total.device)
    return total / torch.where(divisor == 0, 1, divisor).to(total.dtype)


def inside_sequences(cu_seqlens: Tensor) -> Tensor:
    """(B, T) bool: True where the padded form of a packed batch holds a token; T is the longest sequence."""
    lengths = cu_seqlens.diff()
    longest = max(lengths.tolist(), default=0)
    return torch.arange(longest, device=cu_seqlens.device) < lengths[:, None]  # (B, T)


def to_padded(packed: Tensor, inside: Tensor) -> Tensor:
    """(N,) -> (B, T), zeros (False) past each sequence's end."""
    return packed.new_zeros(inside.shape).masked_scatter(inside, packed)  # (B, T)


# --- log-probabilities ------------------------------------------------------------------------------------------


def log_softmax(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """log softmax(z), z = logit_scale * logits, softcap * tanh(z / softcap), z / temperature. Masked rows: uniform."""
    z = keep(logits, None if mask is None else mask[..., None]) * logit_scale  # (..., V)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = keep(temperature.detach(), mask, fill=1.0).to(z.dtype)[..., None]
    return torch.log_softmax(z / temperature, dim=-1)  # (..., V)


def pick(logp: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """log p[token] per row, 0 in masked rows."""
    tokens = tokens.long() if mask is None else torch.where(mask, tokens.long(), 0)
    return keep(logp.gather(-1, tokens[..., None])[..., 0], mask)  # (...)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p[token] and H = -sum_v p_v log p_v.

    A term with p = 0 counts as 0. Through exp, dH/dz is p * (E[log p] - log p), which is 0 there and not 0 * inf.
    """
    logp = log_softmax(logits, temperature, softcap, logit_scale, mask)  # (..., V)
    p = logp.exp()
    entropy = -(p * torch.where(p == 0, 0, logp)).sum(-1)  # (...)
    return pick(logp, tokens, mask), keep(entropy, mask)


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """hidden @ weight.T + bias + scaling * (hidden @ a.T) @ b.T, in float32 at least, whatever autocast says.

    Masked rows are rows of zeros first.
    """
    hidden = keep(hidden, None if mask is None else mask[..., None])  # (..., H)
    dtype = torch.promote_types(hidden.dtype, widen(weight).dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))  # (..., V)
        if lora is not None:
            a, b, scaling = lora
            logits = logits + scaling * F.linear(F.linear(hidden.to(dtype), a.to(dtype)), b.to(dtype))
    return logits


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """token_logprobs of logits = hidden @ weight.T + bias + scaling * (hidden @ a.T) @ b.T."""
    logits = linear_logits(hidden, weight, bias, lora, mask)
    return token_logprobs(logits, tokens, temperature, softcap, logit_scale, mask)


def cross_entropy(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean of -(1 - e) log p[token] - e mean log p + z_loss (log sum exp z)^2 over the rows that are unmasked and whose
    token is not ignore_index."""
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    z = keep(logits, counted[..., None]) * logit_scale  # (..., V)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = -(1 - label_smoothing) * pick(torch.log_softmax(z, -1), tokens, counted)
    log_sum = torch.logsumexp(z, -1)
    if label_smoothing != 0:
        losses = losses + label_smoothing * keep(log_sum - z.mean(-1), counted)
    if z_loss != 0:
        losses = losses + z_loss * keep(log_sum.square(), counted)
    return divide(losses.sum(), counted.sum(), denominator)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy of logits = hidden @ weight.T + bias, with an adapter as in linear_token_logprobs."""
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    logits = linear_logits(hidden, weight, bias, lora, counted)
    return cross_entropy(
        logits, tokens, counted, ignore_index, denominator, softcap, logit_scale, label_smoothing, z_loss
    )


# --- divergences ------------------------------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1", mask: Tensor | None = None) -> Tensor:
    """d = log p - log q per sampled token; k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d; with "+", the gradient of k2."""
    d = keep(logprobs, mask) - keep(ref_logprobs, mask)
    k2 = d.square() / 2
    value = {"k1": d, "k2": k2, "k3": torch.expm1(-d) + d}[kind[:2]]
    if not kind.endswith("+"):
        return value
    straight = torch.where(d.isinf(), 0, d).square() / 2  # infinity less itself would hide the value
    return value.detach() + (straight - straight.detach())


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    kind: str = "kl",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) per row, or KL(q || p), or half of KL(p || m) + KL(q || m), m = (p +
    q) / 2.

    A term with p = 0 counts as 0. In the last, log p - log m = log 2 - log(1 + q / p) = log 2 - softplus(log q - log
    p).
    """
    logp = log_softmax(logits, temperature, softcap, logit_scale, mask)  # (..., V)
    logq = log_softmax(ref_logits, temperature, softcap, logit_scale, mask)
    p, q = logp.exp(), logq.exp()
    if kind == "kl":
        terms = p * torch.where(p == 0, 0, logp - logq)
    elif kind == "reverse_kl":
        terms = q * torch.where(q == 0, 0, logq - logp)
    else:
        apart = logq.clamp(min=-1e4) - logp.clamp(min=-1e4)  # where p is 0 already, and -inf - -inf would be nan
        terms = (p * (math.log(2) - F.softplus(apart)) + q * (math.log(2) - F.softplus(-apart))) / 2
    return keep(terms.sum(-1), mask)  # (...)


# --- advantages -------------------------------------------------------------------------------------------------


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
            rewards, to_padded(values, inside), gamma, lam, real, None, bootstrap, critic_lam, scores, logprobs,
            ref_logprobs, kl_coef,
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


def sequence_sum(x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum over each sequence's unmasked tokens."""
    x = keep(x, mask)
    return (x if cu_seqlens is None else to_padded(x, inside_sequences(cu_seqlens))).sum(1)  # (B,)


# --- losses -----------------------------------------------------------------------------------------------------


def aggregate(
    x: Tensor, mask: Tensor, cu_seqlens: Tensor | None, aggregation: str, denominator: float | Tensor | None
) -> Tensor:
    """One number from per-token x: over all tokens, or over sequences (those with an unmasked token) of mean or sum."""
    if aggregation == "token_mean":
        return divide(keep(x, mask).sum(), mask.sum(), denominator)
    per_sequence = sequence_sum(x, mask, cu_seqlens)  # (B,)
    lengths = sequence_sum(mask.to(x.dtype), None, cu_seqlens)  # (B,)
    if aggregation == "sequence_mean":
        per_sequence = per_sequence / lengths.clamp(min=1)
    return divide(per_sequence.sum(), (lengths > 0).sum(), denominator)


def whiten_by(x: Tensor, sums: Tensor) -> Tensor:
    """(x - mean) * rsqrt(var + 1e-8) with the mean and the variance of whitening_sums."""
    n, total, squares = sums.double().unbind()
    mean = total / n.clamp(min=1)
    variance = ((squares - total * mean) / (n - 1).clamp(min=1)).clamp(min=0)
    return (x - mean.to(x.dtype)) * torch.rsqrt(variance + 1e-8).to(x.dtype)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's value is the mean over its sequence's unmasked tokens, its gradient its own (GSPO-token)."""
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
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "token_mean",
    denominator: float | Tensor | None = None,
    objective: str = "clip",
    ratio: str = "token",
    rollout_logprobs: Tensor | None = None,
    rollout_cap: float = 2.0,
    advantage_sums: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """policy + value_coef * value - entropy_coef * entropy + kl_coef * kl; r = exp(clamp(log p - log p_old, +-20))."""
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, mask, cu_seqlens, aggregation, denominator)

    def token_mean(x: Tensor) -> Tensor:
        return aggregate(x, mask, None, "token_mean", denominator if aggregation == "token_mean" else None).detach()

    logprobs, old, A = keep(logprobs, mask), keep(old_logprobs.detach(), mask), keep(advantages.detach(), mask)
    if advantage_sums is not None:
        A = whiten_by(A, advantage_sums.detach())
    own_log_ratio = (logprobs - old).clamp(-20, 20)
    log_ratio = own_log_ratio
    if ratio == "sequence":
        log_ratio = sequence_log_ratio(logprobs - old, mask, cu_seqlens).clamp(-20, 20)
    nothing = torch.zeros_like(A)
    if objective == "clip":
        policy, clipped, dual_clipped = ppo_policy(log_ratio, A, clip_low, clip_high, dual_clip)
    else:
        policy, clipped = cispo_policy(log_ratio, logprobs, A, clip_low, clip_high)
        dual_clipped = nothing
    value = value_clipped = H = KL = rollout_weight = rollout_clipped = nothing
    explained = nothing.sum()
    if rollout_logprobs is not None:
        apart = (old - keep(rollout_logprobs.detach(), mask)).clamp(-20, 20).exp()
        rollout_weight, rollout_clipped = apart.clamp(max=rollout_cap), (apart > rollout_cap).to(apart.dtype)
        policy = policy * rollout_weight
    if values is not None and returns is not None:
        V, R = keep(values, mask), keep(returns.detach(), mask)
        V_old = None if old_values is None else keep(old_values.detach(), mask)
        value, value_clipped = ppo_value(V, V_old, R, value_clip)
        explained = explained_variance(V.detach(), R, mask)
    if entropy is not None:
        H = keep(entropy, mask)
    if ref_logprobs is not None:
        KL = kl_estimate(logprobs, keep(ref_logprobs.detach(), mask), kl)

    terms = {"policy_loss": mean(policy), "value_loss": mean(value), "entropy": mean(H), "kl": mean(KL)}
    loss = terms["policy_loss"]
    for coef, name in ((value_coef, "value_loss"), (-entropy_coef, "entropy"), (kl_coef, "kl")):
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


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "token_mean",
    denominator: float | Tensor | None = None,
    objective: str = "clip",
    ratio: str = "token",
    rollout_logprobs: Tensor | None = None,
    rollout_cap: float = 2.0,
    advantage_sums: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """ppo_loss of the log-probabilities and the entropy of logits = hidden @ weight.T + bias."""
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, tokens, bias, lora, temperature, softcap, logit_scale, mask
    )
    return ppo_loss(
        logprobs, old_logprobs, advantages, values, old_values, returns, mask, cu_seqlens, clip_low, clip_high,
        dual_clip, value_clip, value_coef, entropy, entropy_coef, ref_logprobs, kl_coef, kl, aggregation, denominator,
        objective, ratio, rollout_logprobs, rollout_cap, advantage_sums,
    )  # fmt: skip


def weighted_mean(weights: Tensor | None, count: int, denominator: float | Tensor | None) -> Callable[[Tensor], Tensor]:
    """Means over pairs: by the sum of the weights, or the denominator."""

    def mean(x: Tensor) -> Tensor:
        if weights is None:
            return divide(x.sum(), count, denominator)
        w = widen(weights.detach()).to(x.dtype)
        return divide((x * w).sum(), w.sum(), denominator)

    return mean


def logistic(difference: Tensor, agree: float, differ: float) -> Tensor:
    """-agree log sigmoid(x) - differ log sigmoid(-x)."""
    return -agree * F.logsigmoid(difference) - differ * F.logsigmoid(-difference)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    loss: str = "sigmoid",
    weights: Tensor | None = None,
    kl: float | Tensor = 0.0,
) -> tuple[Tensor, Stats]:
    """The loss of beta log(pi/ref)(chosen) and beta log(pi/ref)(rejected); x their difference."""
    mean = weighted_mean(weights, chosen.numel(), denominator)
    counts = None if weights is None else weights != 0
    chosen_reward = beta * (keep(chosen, counts) - keep(ref_chosen.detach(), counts))  # (P,)
    rejected_reward = beta * (keep(rejected, counts) - keep(ref_rejected.detach(), counts))
    x, e = chosen_reward - rejected_reward, label_smoothing
    if loss == "sigmoid":
        terms = logistic(x, 1 - e, e)
    elif loss == "robust":
        terms = logistic(x, (1 - e) / (1 - 2 * e), -e / (1 - 2 * e))
    elif loss == "hinge":
        terms = F.relu(1 - x)
    elif loss == "ipo":
        terms = ((x - 0.5) / beta).square()
    else:
        far = beta * (kl.detach() if isinstance(kl, Tensor) else kl)
        terms = (torch.sigmoid(far - chosen_reward) + torch.sigmoid(rejected_reward - far)) / 2
    return mean(terms), {
        "accuracy": mean((x.detach().sign() + 1) / 2),
        "margin": mean(x.detach()),
        "chosen_reward": mean(chosen_reward.detach()),
        "rejected_reward": mean(rejected_reward.detach()),
    }


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    loss: str = "sigmoid",
    weights: Tensor | None = None,
    kl: float | Tensor = 0.0,
    average: bool = False,
) -> tuple[Tensor, Stats]:
    """dpo_loss of the summed (or mean) log-probabilities of 2P sequences, chosen ones first."""
    logprobs, _ = linear_token_logprobs(hidden, weight, tokens, bias, lora, 1.0, softcap, logit_scale, mask)
    sums = sequence_sum(logprobs, mask, cu_seqlens)  # (2P,)
    if average:
        sums = sums / sequence_sum(torch.ones_like(logprobs), mask, cu_seqlens).clamp(min=1)
    chosen, rejected = sums[: sums.numel() // 2], sums[sums.numel() // 2 :]
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing, denominator, loss, weights, kl)


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Bradley-Terry: logistic(chosen - rejected - margin) + center_coef * (chosen + rejected)^2."""
    mean = weighted_mean(weights, chosen.numel(), denominator)
    counts = None if weights is None else weights != 0
    chosen, rejected = keep(chosen, counts), keep(rejected, counts)  # (P,)
    difference = chosen - rejected
    wanted = keep(margin.detach(), counts) if isinstance(margin, Tensor) else (margin or 0.0)
    terms = logistic(difference - wanted, 1 - label_smoothing, label_smoothing)
    if center_coef != 0:
        terms = terms + center_coef * (chosen + rejected).square()
    return mean(terms), {
        "accuracy": mean((difference.detach().sign() + 1) / 2),
        "margin": mean(difference.detach()),
    }


# --- rollouts ---------------------------------------------------------------------------------------------------


def paged_attention(
    query: Tensor,
    cache: Any,
    batch: Any,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One sequence at a time: its blocks side by side, then softmax over all that each query may see."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = torch.empty_like(query, memory_format=torch.contiguous_format)  # (N, heads, dim)
    block_size, dim = cache.block_size, cache.dim
    repeats = query.shape[1] // cache.keys.shape[1]
    for b, context in enumerate(batch.contexts.tolist()):
        begin, end = batch.cu_queries[b : b + 2].tolist()
        blocks = batch.tables[b, : -(-context // block_size)].long()
        keys = cache.keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :context, :dim]  # (kv heads, context, dim)
        values = cache.values[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :context, :dim]
        keys, values = (widen(x).repeat_interleave(repeats, 0) for x in (keys, values))  # (heads, context, dim)
        scores = scale * torch.einsum("qhd,hkd->hqk", widen(query[begin:end]), keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(context - (end - begin), context, device=query.device)[:, None]  # positions of the queries
        key = torch.arange(context, device=query.device)
        seen = (key <= at) & ((key > at - window) if window else True)  # (queries, context)
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(-1, end - begin, 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :context]
        out[begin:end] = torch.einsum("hqk,hkd->qhd", weights, values).to(query.dtype)
    return out


def write_kv(
    cache: Any,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    def rotated(x: Tensor) -> Tensor:
        assert cos is not None and sin is not None
        a, b = widen(x).chunk(2, dim=-1)
        return (widen(x) * widen(cos)[:, None] + torch.cat([-b, a], dim=-1) * widen(sin)[:, None]).to(x.dtype)

    if cos is not None:
        key = rotated(key)
        if query is not None:
            query.copy_(rotated(query))
    block, at = slots // cache.block_size, slots % cache.block_size
    cache.keys[block, :, : cache.dim, at] = key
    cache.values[block, :, at, : cache.dim] = value


def sample(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Likeliest first (a stable sort), cut, back in the order of the vocabulary, and the cumulative sum inverted. In
    float64, for sums over a vocabulary lose digits in float32."""
    logits = logits.double()  # (B, V)
    columns = logits.shape[1]
    greedy = temperature == 0
    below = logits - logits.amax(-1, keepdim=True)  # first, for a quotient may leave the range
    logprobs = torch.log_softmax(below / torch.where(greedy, 1, temperature)[:, None].to(logits.dtype), dim=-1)
    probabilities = logprobs.exp()
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(columns, device=logits.device)
    most = torch.where(greedy, 1, torch.where(top_k > 0, top_k, columns))[:, None]
    ordered = torch.where(rank < most, ordered, 0)
    mass = ordered.sum(-1, keepdim=True)
    cut_mass = (top_p < 1)[:, None]
    stays = ~cut_mass | (ordered.cumsum(-1) - ordered < top_p[:, None].double() * mass)
    stays &= ordered >= min_p[:, None] * ordered[:, :1]
    stays[:, 0] = True
    ordered = torch.where(stays, ordered, 0)
    kept = torch.zeros_like(probabilities).scatter(-1, index, ordered)  # (B, V)
    cumulative = kept.cumsum(-1)
    target = (uniform * cumulative[:, -1]).unsqueeze(-1)
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)  # (B,)
    last = columns - 1 - (kept > 0).flip(-1).int().argmax(-1)
    tokens = torch.where(greedy, logits.argmax(-1), torch.minimum(tokens, last))
    broken = ~torch.isfinite(logits.amax(-1)) | logits.isnan().any(-1)
    found = logprobs.gather(-1, tokens.clamp(0, columns - 1)[:, None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
    nan = torch.full_like(found, math.nan, dtype=torch.float32)
    return (
        torch.where(broken, -1, tokens),
        torch.where(broken, nan, found.float()),
        torch.where(broken, nan, cumulative[:, -1].float()),
        torch.where(broken, nan, entropy.float()),
    )


def linear(x: Tensor, weights: Sequence[Any], gate: str = "none") -> list[Tensor]:
    found = []
    for weight, bias, lora in weights:
        y = F.linear(x, weight, bias)
        if lora is not None:
            a, b, scaling = lora
            y = y + scaling * F.linear(F.linear(x, a), b)
        found.append(y)
    if gate == "none":
        return found
    gated = F.silu(found[0]) if gate == "silu" else F.gelu(found[0], approximate="tanh")
    return [gated * found[1]]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (offset + widen(weight))).to(x.dtype)
