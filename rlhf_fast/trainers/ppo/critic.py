"""The critic: a value for the state before each response token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from rlhf_fast import models
from rlhf_fast.config import PPOConfig
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
        """List the modules that are trained."""
        return [self.head] if self.model is None else [self.head, self.model]

    def values(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Compute the value before each response token: (R,) float32.

        Args:
            states: the policy's (R, H), which a critic without layers of its own reads.
        """
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
    """Make a value head of zeros: its first values are 0, and the trunk gets no gradient from random weights.

    Args:
        like: (..., H), a tensor on the head's device.
    """
    head = nn.Linear(like.shape[-1], 1, device=like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def make_critic(kind: str, policy: Model, from_reward: Callable[[], Critic]) -> Critic:
    """Make the critic of a kind: "shared", "separate" (a copy of the policy, its frozen weights shared), or "reward",
    what `from_reward` makes of a reward model."""
    if kind == "reward":
        return from_reward()
    model = models.trainable_copy(policy) if kind == "separate" else None
    return Critic(fresh_head(models.output_head(policy).weight), model)


def critic_of_checkpoint(reward: Any, tokenizer: Any, config: PPOConfig) -> Critic:
    """Make a critic whose first values are the normalised scores of the reward model in the checkpoint `reward`.

    Raises:
        ValueError: `reward` is no reward model's checkpoint, or one that reads other tokens than the policy.
    """
    if not isinstance(reward, str | Path) or reward_models(str(reward)) != [str(reward)]:
        raise ValueError(
            f"ppo.critic: 'reward' starts from a reward model's checkpoint, but the reward is {reward!r}; "
            "choose 'shared' or 'separate'"
        )
    model, head, own = models.critic_from(reward, config.lora, config.seed, getattr(torch, config.dtype))
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"ppo.critic: the reward model {reward} reads other tokens than the policy; choose 'shared' or 'separate'"
        )
    return Critic(head, model)


def critic_of_shape(shape: PreTrainedConfig, config: PPOConfig) -> Critic:
    """Build a critic as `critic_of_checkpoint` does, from the config of a reward model alone: with random weights, or
    within `torch.device("meta")` with shapes and no memory."""
    model = models.reward_from_shape(shape, getattr(torch, config.dtype))
    model = models.trainable_scorer(model, config.lora, config.seed, head=False)
    return Critic(nn.Linear(model.config.hidden_size, 1), model)
