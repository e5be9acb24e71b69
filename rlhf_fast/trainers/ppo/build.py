"""What PPO is made of, made in order: prompts and names are looked at before a model is loaded, which takes longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from rlhf_fast import models
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.records import PromptRecord, Source, read_prompts
from rlhf_fast.data.splits import split_prompts, warn_of_shared
from rlhf_fast.models.adapters import Model
from rlhf_fast.rewards.model import Reward, RewardModel, Rewards, resolve_reward
from rlhf_fast.trainers.ppo.advantages import ADVANTAGES
from rlhf_fast.trainers.ppo.critic import Critic, critic_of_shape, make_critic

Prompts = Source | Sequence[PromptRecord]


def read_both(prompts: Prompts, heldout_data: Prompts | None) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """The prompts to learn from, and those that are only measured on."""
    learned, heldout = split_prompts(read_prompts(prompts))
    heldout += [] if heldout_data is None else read_prompts(heldout_data)
    warn_of_shared(learned, heldout)
    return learned, heldout


def require_prompts(prompts: Sequence[PromptRecord], config: PPOConfig) -> None:
    """Raise ValueError where there are too few for a step."""
    if len(prompts) < config.prompts_per_step:
        raise ValueError(f"ppo.prompts_per_step: {config.prompts_per_step}, but there are only {len(prompts)} prompts")


def make_reward(reward: Reward, config: PPOConfig) -> Rewards:
    return resolve_reward(
        reward,
        config.min_reward_agreement,
        config.max_length,
        config.reward_timeout,
        config.reward_retries,
        getattr(torch, config.dtype),
        config.reward_batch,
    )


def reward_tokenizers(reward: Rewards) -> list[Any]:
    return [part.function.tokenizer for part in reward.parts if isinstance(part.function, RewardModel)]


class Models(NamedTuple):
    """The networks of PPO, which share the weights that nobody trains."""

    policy: Model
    reference: Model  # the policy as it is at the start, frozen
    critic: Critic | None


def build(config: PPOConfig, shape: PreTrainedConfig, rewards: Sequence[PreTrainedConfig] = ()) -> Models:
    """The networks of a run of these settings, of random weights: on the meta device of none.

    Args:
        rewards: of the reward models, from the first of which a critic may start.

    Raises:
        ValueError: a critic is to start from a reward model, and there is none.
    """

    def from_reward() -> Critic:
        if not rewards:
            raise ValueError("ppo.critic: 'reward' starts from a reward model's checkpoint, and there is none")
        return critic_of_shape(rewards[0], config)

    needs_critic = ADVANTAGES[config.advantage].needs_critic
    return make_models(models.from_shape(shape, getattr(torch, config.dtype)), config, needs_critic, from_reward)


def make_models(loaded: Model, config: PPOConfig, needs_critic: bool, from_reward: Callable[[], Critic]) -> Models:
    """Policy, reference and, if the advantage needs one, critic, from the loaded checkpoint of the policy."""
    policy = models.trainable(loaded, config.lora, config.seed)
    models.require_reach(policy, config.max_length)
    reference = models.frozen_copy(policy)
    critic = make_critic(config.critic, policy, from_reward) if needs_critic else None
    if config.optim.checkpointing:  # after all copies were made
        models.recompute_activations(policy)
        if critic is not None and critic.model is not None:
            models.recompute_activations(critic.model)
    return Models(policy, reference, critic)
