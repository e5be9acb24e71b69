"""Build the parts of a PPO run: its prompts, its reward, and its networks (policy, reference, critic)."""

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


def read_prompt_splits(prompts: Prompts, heldout_data: Prompts | None) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Read prompts as (training, held-out), by their column `split`; all of `heldout_data` is held out.

    Raises:
        RecordError: a row that cannot be used; names the file and the line.
    """
    learned, heldout = split_prompts(read_prompts(prompts))
    heldout += [] if heldout_data is None else read_prompts(heldout_data)
    warn_of_shared(learned, heldout)
    return learned, heldout


def require_prompts(prompts: Sequence[PromptRecord], config: PPOConfig) -> None:
    """Require as many prompts as a step takes.

    Raises:
        ValueError: there are fewer.
    """
    if len(prompts) < config.prompts_per_step:
        raise ValueError(
            f"ppo.prompts_per_step: {config.prompts_per_step}, but there are only {len(prompts)} prompts to train on; "
            "lower it, or give more prompts"
        )


def make_reward(reward: Reward, config: PPOConfig) -> Rewards:
    """Resolve what a run is rewarded by, with its settings; errors as for `resolve_reward`."""
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
    """List the tokenizers of all reward models in a reward."""
    return [part.function.tokenizer for part in reward.parts if isinstance(part.function, RewardModel)]


class Models(NamedTuple):
    """Networks of a PPO run, which share their frozen weights."""

    policy: Model
    reference: Model  # the policy as it is at the start, frozen
    critic: Critic | None


def build(config: PPOConfig, shape: PreTrainedConfig, rewards: Sequence[PreTrainedConfig] = ()) -> Models:
    """Build the networks of a PPO run, from their configs alone.

    Args:
        shape: transformers' config of the policy.
        rewards: those of the reward models; a critic that starts from one starts from the first.

    Returns:
        Networks with random weights, or within `torch.device("meta")` with shapes and no memory.

    Raises:
        ValueError: `ppo.critic` is "reward", and `rewards` is empty.
    """

    def from_reward() -> Critic:
        if not rewards:
            raise ValueError(
                "ppo.critic: 'reward' starts from a reward model's checkpoint, and the run's reward has none; expected "
                "'shared' or 'separate', or a reward model in the reward"
            )
        return critic_of_shape(rewards[0], config)

    needs_critic = ADVANTAGES[config.advantage].needs_critic
    return make_models(models.from_shape(shape, getattr(torch, config.dtype)), config, needs_critic, from_reward)


def make_models(loaded: Model, config: PPOConfig, needs_critic: bool, from_reward: Callable[[], Critic]) -> Models:
    """Make policy, reference and critic from the loaded checkpoint of the policy.

    Args:
        needs_critic: the advantage takes a critic's values; without, the critic is None.
        from_reward: makes a critic from a reward model, for `ppo.critic` "reward".

    Raises:
        ValueError: the policy cannot be trained on sequences of `ppo.max_length` tokens.
    """
    policy = models.trainable(loaded, config.lora, config.seed)
    models.require_reach(policy, config.max_length)
    reference = models.frozen_copy(policy)
    critic = make_critic(config.critic, policy, from_reward) if needs_critic else None
    if config.optim.checkpointing:  # after all copies were made
        models.recompute_activations(policy)
        if critic is not None and critic.model is not None:
            models.recompute_activations(critic.model)
    return Models(policy, reference, critic)
