"""gae: generalised advantage estimation over padded or packed token sequences."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Decays, GAEInputs, Sequences, TokenRewards
from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op, flattened, places
from rlhf_fast.ops._rows import plain

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")


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
    """Advantages and returns (Schulman et al., arXiv:1506.02438, equation 16), from the last token to the first:

        delta_t = r_t + gamma * V_next - V_t,    A_t = delta_t + gamma * lam * A_next,    return_t = A_t + V_t,

    where "next" is the next *unmasked* token of the sequence: masked tokens (padding, tool output inside a response)
    are stepped over as if they were not there, without an extra factor of gamma or lam. After the last unmasked token
    V is ``bootstrap``, or 0 (the sequence ended), and A is 0.

    The token rewards may be put together on the way, as RLHF has them:

        r_t = rewards_t - kl_coef * (logprobs_t - ref_logprobs_t) + (score, on the last unmasked token)

    Position t of every input is of the same predicted token: its log-probability, the value of the state that it is
    predicted from, its reward.

    One sweep over the tokens. A sequence gives the same bits in any batch, packed or padded behind.

    Args:
        rewards: (B, T) padded, or (N,) packed with ``cu_seqlens``; float32, bfloat16, float16 or float64; None for 0. A
            reward at a masked position is ignored, not moved to a neighbour: put the score on an unmasked token.
        values: same shape.
        gamma, lam: in [0, 1].
        mask: same shape, bool, or None for all. Where False, both outputs are exactly 0 and the inputs may hold
            anything.
        cu_seqlens: (B + 1,), int32 or int64: sequence b is [cu_seqlens[b], cu_seqlens[b + 1]).
        bootstrap: (B,): the value after each sequence's last unmasked token, for responses that were cut off.
        critic_lam: lambda of the returns alone, in [0, 1]; None: lam (VC-PPO, arXiv:2503.01491, has 1 here).
        scores: (B,): what each sequence is worth. A sequence without an unmasked token leaves it unpaid.
        logprobs, ref_logprobs: same shape as values, of the policy that sampled and of the reference.
        kl_coef: >= 0.
        sums: also return what whitening needs.

    Returns:
        advantages and returns, the shape of values, float32 (float64 if an input is), not whitened. Both are targets:
        no gradient flows through them. With ``sums`` also a tensor (3,) of float64: the number of unmasked tokens, and
        the sum and the sum of squares of their advantages; over several ranks they add up.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, a number is out of range, there is nothing that pays, or
            cu_seqlens does not run from 0 to N without falling (its values: on a CPU always, elsewhere under
            ``RLHF_FAST_DEBUG=1``).
    """
    per_token = {"rewards": rewards, "logprobs": logprobs, "ref_logprobs": ref_logprobs}
    _checks.floats(values=values, bootstrap=bootstrap, scores=scores, **per_token)
    _checks.devices(values=values, mask=mask, cu_seqlens=cu_seqlens, bootstrap=bootstrap, scores=scores, **per_token)
    sequences = _checks.sequences("values", values, cu_seqlens)
    _checks.shapes(values.shape, "values", **per_token)
    _checks.masks(values.shape, "values", mask)
    _checks.shapes((sequences,), "the number of sequences", bootstrap=bootstrap, scores=scores)
    _checks.number("gamma", gamma, least=0, most=1)
    _checks.number("lam", lam, least=0, most=1)
    if critic_lam is not None:
        _checks.number("critic_lam", critic_lam, least=0, most=1)
    _checks.number("kl_coef", kl_coef, least=0)
    if (logprobs is None) != (ref_logprobs is None):
        raise ValueError(
            f"{'logprobs' if logprobs is None else 'ref_logprobs'}: None, expected a tensor like the other"
        )
    if kl_coef != 0 and logprobs is None:
        raise ValueError("logprobs: None, expected a tensor because kl_coef is not 0")
    if rewards is None and scores is None and logprobs is None:
        raise ValueError("rewards: None, expected a tensor, or scores")

    dtype = functools.reduce(torch.promote_types, {x.dtype for x in (values, *per_token.values()) if x is not None})
    exact = [x for x in (values, scores, bootstrap, *per_token.values()) if x is not None and x.dtype == torch.float64]
    backend = dispatch.choose("gae", BACKENDS, exact[0] if exact else values)
    with torch.no_grad():
        if backend == "reference":
            return reference.gae(
                rewards, values, gamma=gamma, lam=lam, mask=mask, cu_seqlens=cu_seqlens, bootstrap=bootstrap,
                critic_lam=critic_lam, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, kl_coef=kl_coef,
                sums=sums,
            )  # fmt: skip
        where = Sequences(cu_seqlens=cu_seqlens, number=sequences, length=values.shape[-1])
        paid = TokenRewards(
            rewards=rewards, logprobs=logprobs, ref_logprobs=ref_logprobs, scores=scores, kl_coef=float(kl_coef)
        )
        critic_lam = lam if critic_lam is None else critic_lam
        decays = Decays(gamma=float(gamma), lam=float(lam), critic_lam=float(critic_lam))
        advantages, returns, per_sequence = _op(*where, *paid, values, mask, bootstrap, *decays, sums, dtype, backend)
        return (advantages, returns, per_sequence.sum(0)) if sums else (advantages, returns)


@functools.cache
def kernels(backend: str) -> Any:
    """The kernel of a backend: forward (see csrc/common/gae.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import gae

        return gae
    return compiled.GAE(backend)


@flattened
def gae_forward(
    where: Sequences,
    paid: TokenRewards,
    values: Tensor,
    mask: Optional[Tensor],
    bootstrap: Optional[Tensor],
    decays: Decays,
    sums: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, returns, and (B, 3) sums of each sequence's advantages, or (0, 3) if not asked for."""
    advantages, returns = compiled.new_like(values, torch.float32), compiled.new_like(values, torch.float32)
    per_sequence = values.new_empty(where.number if sums else 0, 3, dtype=torch.float64)
    if where.number:
        if where.cu_seqlens is not None:
            where = where._replace(cu_seqlens=where.cu_seqlens.contiguous())
        inputs = GAEInputs(
            sequences=where,
            paid=TokenRewards(
                rewards=plain(paid.rewards, dtype),
                logprobs=plain(paid.logprobs, dtype),
                ref_logprobs=plain(paid.ref_logprobs, dtype),
                scores=plain(paid.scores, torch.float32),
                kl_coef=paid.kl_coef,
            ),
            values=plain(values, dtype),
            mask=plain(mask, torch.bool),
            bootstrap=plain(bootstrap, torch.float32),
            decays=decays,
        )
        kernels(backend).forward(inputs, advantages, returns, per_sequence if sums else None)
    return advantages, returns, per_sequence


_PLACES = places(gae_forward)


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    values, sequences, sums = (args[_PLACES[name]] for name in ("values", "number", "sums"))
    advantages = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    return advantages, torch.empty_like(advantages), values.new_empty(sequences if sums else 0, 3, dtype=torch.float64)


_op = Op(gae_forward, _fake_forward)
