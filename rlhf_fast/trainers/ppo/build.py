"""What PPO is made of, made in order: prompts and names are looked at before a model is loaded, which takes longest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rlhf_fast import models
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.records import PromptRecord, Source, read_prompts
from rlhf_fast.data.splits import split_prompts, warn_of_shared
from rlhf_fast.models.adapters import Model
from rlhf_fast.rewards.model import Reward, RewardModel, Rewards, resolve_reward
from rlhf_fast.trainers.ppo.critic import Critic, make_critic

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
    shared: int  # as in `pad`: how long samples may be that share a row with their prompt


def make_models(loaded: Model, tokenizer: Any, reward: Reward, config: PPOConfig, needs_critic: bool) -> Models:
    """Policy, reference and, if the advantage needs one, critic, from the loaded checkpoint of the policy."""
    policy = models.trainable(loaded, config.lora, config.seed)
    models.require_reach(policy, config.max_length)
    reference = models.frozen_copy(policy)
    shared = models.longest_shared(policy)
    critic = None
    if needs_critic:
        options = {"lora": config.lora, "seed": config.seed, "dtype": getattr(torch, config.dtype)}
        critic = make_critic(config.critic, policy, reward, tokenizer, **options)
    if config.optim.checkpointing:  # after all copies were made
        models.recompute_activations(policy)
        if critic is not None and critic.model is not None:
            models.recompute_activations(critic.model)
    return Models(policy, reference, critic, shared)
