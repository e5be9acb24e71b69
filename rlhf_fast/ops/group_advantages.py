"""group_advantages: the rewards of a prompt's responses beside each other, for training without a critic."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Sequences
from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op
from rlhf_fast.ops._rows import plain

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")
KINDS = ("grpo", "dr_grpo", "rloo")  # as csrc/common/group_advantages.h numbers them


def group_advantages(
    rewards: Tensor,
    kind: str = "grpo",
    mask: Tensor | None = None,
    cu_groups: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each response, from the rewards of the same prompt's responses. With n of them:

        "grpo"      (r - mean) / (deviation + eps), the deviation Bessel's, as TRL and verl have it (Shao et al.,
                    arXiv:2402.03300)
        "dr_grpo"   r - mean: no prompt weighs more for being easy (Liu et al., arXiv:2503.20783)
        "rloo"      r - mean of the other n - 1 (Ahmadian et al., arXiv:2402.14740)

    REINFORCE++ (arXiv:2501.03262) is the rewards themselves, or "dr_grpo" of them for its form with a baseline, then
    whitened over all tokens of the batch: hand :func:`ppo_loss` their sums as ``advantage_sums``. ReMax
    (arXiv:2310.10505) is rewards less those of the greedy responses.

    Args:
        rewards: (G, n): G prompts with n responses each, or (N,) with ``cu_groups``; float32, bfloat16, float16 or
            float64.
        kind: which of the three.
        mask: same shape, bool, or None for all. Where False, a response is left out: its advantage is 0, and its
            reward may be anything.
        cu_groups: (G + 1,), int32 or int64: the responses of prompt g are [cu_groups[g], cu_groups[g + 1]).
        eps: > 0, for "grpo".

    Returns:
        The shape of rewards, float32 (float64 for float64). A target: no gradient flows through it. A response alone
        in its group says nothing about its prompt: 0.

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit, a name is unknown, eps is not > 0, or cu_groups does
            not run from 0 to N without falling (its values: on a CPU always, elsewhere under ``RLHF_FAST_DEBUG=1``).
    """
    _checks.floats(rewards=rewards)
    _checks.devices(rewards=rewards, mask=mask, cu_groups=cu_groups)
    groups = _checks.sequences("rewards", rewards, cu_groups, "cu_groups", "(G, n)")
    _checks.masks(rewards.shape, "rewards", mask)
    _checks.option("kind", kind, KINDS)
    _checks.number("eps", eps, above=0)
    backend = dispatch.choose("group_advantages", BACKENDS, rewards)
    with torch.no_grad():
        if backend == "reference":
            return reference.group_advantages(rewards, kind, mask, cu_groups, eps)
        advantages: Tensor = _op(rewards, kind, mask, cu_groups, float(eps), groups, backend)
        return advantages


@functools.cache
def kernels(backend: str) -> Any:
    """The kernel of a backend: forward (see csrc/common/group_advantages.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import group_advantages

        return group_advantages
    return compiled.GroupAdvantages(backend)


def group_advantages_forward(
    rewards: Tensor,
    kind: str,
    mask: Optional[Tensor],
    cu_groups: Optional[Tensor],
    eps: float,
    groups: int,
    backend: str,
) -> Tensor:
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    if groups:
        where = Sequences(None if cu_groups is None else cu_groups.contiguous(), groups, rewards.shape[-1])
        kernels(backend).forward(
            where, rewards.contiguous(), plain(mask, torch.bool), kind=KINDS.index(kind), eps=eps, out=advantages
        )
    return advantages


def _fake_forward(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)


_op = Op(group_advantages_forward, _fake_forward)
