"""The critic: a value for the state before each response token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_fast import models
from rlhf_fast.data.batches import Batch
from rlhf_fast.models.adapters import Model
from rlhf_fast.rewards.names import reward_models


class Critic:
    """A linear head, on the policy's states or on those of a model of its own.

    Args:
        head: from states (R, H) in float32 to values (R, 1).
        model: whose states they are; None: the policy's.
    """

    def __init__(self, head: nn.Linear, model: Model | None = None) -> None:
        self.head, self.model = head, model

    @property
    def modules(self) -> list[nn.Module]:
        """List what is trained."""
        return [self.head] if self.model is None else [self.head, self.model]

    def values(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """(R,), from the policy's states (R, H) if it has none of its own."""
        if self.model is not None:
            states = models.response_states(self.model, batch)
        values: torch.Tensor = self.head(states.float()).squeeze(-1)
        return values

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what was trained, by name: `weight` and `bias` of the head, and of an own model `model.*`."""
        return {**self.head.state_dict(), **dict(self._own())}

    def _own(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.model is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    yield f"model.{name}", parameter.detach()


def fresh_head(like: torch.Tensor) -> nn.Linear:
    """Zero: its first values are no worse than none, and a trunk gets no gradient from a random head.

    `like`: (..., H), on the device.
    """
    head = nn.Linear(like.shape[-1], 1, device=like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def make_critic(kind: str, policy: Model, reward: Any, tokenizer: Any, **options: Any) -> Critic:
    """Make the critic of a kind: "shared", "separate" (a copy of the policy, its frozen weights shared), or "reward"
    (the reward model of the checkpoint `reward`, its normalised score as the first value).

    `options` are those of `models.critic_from`.

    Raises:
        ValueError: "reward" without a reward model's checkpoint, or one that reads other tokens than the policy.
    """
    weight = models.output_head(policy).weight
    if kind == "shared":
        return Critic(fresh_head(weight))
    if kind == "separate":
        return Critic(fresh_head(weight), models.trainable_copy(policy))
    if not isinstance(reward, str | Path) or reward_models(str(reward)) != [str(reward)]:
        raise ValueError(
            f"ppo.critic: 'reward' starts from a reward model's checkpoint, but the reward is {reward!r}; "
            "choose 'shared' or 'separate'"
        )
    model, head, own = models.critic_from(reward, **options)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"ppo.critic: the reward model {reward} reads other tokens than the policy; choose 'shared' or 'separate'"
        )
    return Critic(head, model)
