"""Estimate the seconds of a run by counting: matrix products at a share of the device's peak rate, and in generation
the reading of weights, keys and values at a share of its bandwidth. Loading, evaluation and saving are left out.

The models are those that the trainers build, and PPO's own code says which of them score the samples of a step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig
from rlhf_fast.planning import memory
from rlhf_fast.planning.memory import TrainerConfig
from rlhf_fast.rollout.generator import MAX_SEQUENCES
from rlhf_fast.trainers.ppo.advantages import ADVANTAGES
from rlhf_fast.trainers.ppo.experience import computed_again


@dataclass(frozen=True)
class Machine:
    """Peak rates of a device, and the share of them that a run reaches."""

    tflops: float  # 10^12 operations a second
    bandwidth: float  # 10^12 bytes a second
    utilisation: float  # share of both


@dataclass(frozen=True)
class Data:
    """Sizes of the training data, in sequences and tokens a sequence; PPO's settings say its sequences."""

    sequences: int  # demonstrations, or comparisons
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Counts:
    """Sizes of a model that its operations and its reading depend on."""

    trunk: int  # weights of the layers' matrices
    head: int  # weights that a token's logits take
    trained: int  # weights
    attention: int  # layers * heads * dim
    weight_bytes: int  # read in each step of generation
    kv_bytes: int  # of a token in all layers
    max_sequences: int  # that the generator computes in one step
    separate_critic: bool  # the critic has layers of its own, as many weights as the policy


def count(config: TrainerConfig, shape: PreTrainedConfig, rewards: Sequence[PreTrainedConfig] = ()) -> Counts:
    """Count the weights and bytes of the model that `config` trains, without loading it.

    Args:
        shape: transformers' config of the model.
        rewards: those of PPO's reward models.
    """
    with torch.device("meta"):
        model, _, critic = memory.build(config, shape, rewards)
    text = shape.get_text_config()
    embedding = model.get_input_embeddings().weight
    head = None if isinstance(config, RewardConfig) else model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() > 1 and p is not embedding and p is not head]
    trunk = sum(p.numel() for p in matrices)
    of_head = 0 if head is None else head.numel()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = next(model.parameters()).dtype
    return Counts(
        trunk=trunk,
        head=of_head,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        attention=text.num_hidden_layers * text.num_attention_heads * dim,
        weight_bytes=(trunk + of_head) * dtype.itemsize,
        kv_bytes=memory.kv_bytes_per_token(shape, dtype),
        max_sequences=MAX_SEQUENCES,
        separate_critic=critic is not None and critic.model is not None,
    )


def seconds(config: TrainerConfig, counts: Counts, data: Data, machine: Machine) -> dict[str, float]:
    """Estimate the seconds of each phase over the whole run, by its name.

    Args:
        counts: of the trained model; reward models are taken to be as large.
    """
    rate = machine.tflops * 1e12 * machine.utilisation
    prompt, response = data.prompt_tokens, data.response_tokens
    recomputes = config.optim.checkpointing
    if not isinstance(config, PPOConfig):
        pair = isinstance(config, RewardConfig | DPOConfig)
        responses = 2 if pair else 1
        head_tokens = 0 if isinstance(config, RewardConfig) else responses * response  # with logits
        tokens = prompt + responses * response
        positions = prompt + response  # that the last token attends to
        trained_on = min(data.sequences * config.epochs, (config.max_steps or sys.maxsize) * config.batch_size)
        trained = training_operations(counts, tokens, head_tokens, positions, recomputes)
        phases = {"training": trained_on * trained / rate}
        if isinstance(config, DPOConfig):
            once = forward_operations(counts, tokens, head_tokens, positions)
            phases = {"reference": data.sequences * once / rate, **phases}
        return phases
    samples, prompts = config.samples_per_prompt, config.steps * config.prompts_per_step
    positions = prompt + response
    tokens, head_tokens = prompt + samples * response, samples * response  # of a prompt with all its responses
    once = forward_operations(counts, tokens, head_tokens, positions)
    trained = training_operations(counts, tokens, head_tokens, positions, recomputes)
    # Reference, reward, and the policy where the sampler's numbers are not its own.
    scoring = (3 if computed_again(getattr(torch, config.dtype), config.lag) else 2) * once
    rollouts = _rollout_seconds(config, counts, prompt, response, machine, samples)
    if counts.separate_critic:
        scoring += forward_operations(counts, tokens, 0, positions)
        trained += training_operations(counts, tokens, 0, positions, recomputes)
    if ADVANTAGES[config.advantage].needs_greedy:  # one more response, which is rewarded
        scoring += forward_operations(counts, prompt + response, response, positions)
        rollouts += _rollout_seconds(config, counts, prompt, response, machine, 1)
    return {
        "rollouts": config.steps * rollouts,
        "scoring": prompts * scoring / rate,
        "training": prompts * config.epochs * trained / rate,
    }


def _rollout_seconds(
    config: PPOConfig, counts: Counts, prompt: int, response: int, machine: Machine, samples: int
) -> float:
    """Estimate the seconds of one step's rollouts: products for prompts, and for new tokens products or reading,
    whichever takes longer."""
    sequences = config.prompts_per_step * samples
    rate, bytes_a_second = (1e12 * machine.utilisation * x for x in (machine.tflops, machine.bandwidth))
    prefill = config.prompts_per_step * forward_operations(counts, prompt, 1, prompt) / rate
    waves = -(-sequences // counts.max_sequences)
    running = sequences / waves
    products = running * forward_operations(counts, 1, 1, prompt + response) / rate
    reading = (counts.weight_bytes + running * (prompt + response / 2) * counts.kv_bytes) / bytes_a_second
    return prefill + waves * response * max(products, reading)


def forward_operations(counts: Counts, tokens: float, head_tokens: float, positions: float) -> float:
    """Count the operations of a forward pass, a multiply-add as two.

    Args:
        tokens: that pass through the layers.
        head_tokens: those among them whose logits are computed.
        positions: length of a sequence; causal attention computes half of its pairs.
    """
    return 2 * counts.trunk * tokens + 2 * counts.head * head_tokens + 2 * counts.attention * positions * tokens


def training_operations(counts: Counts, tokens: float, head_tokens: float, positions: float, recomputes: bool) -> float:
    """Count the operations of a forward and backward pass; arguments as for `forward_operations`.

    The backward pass takes as many again for the activations (attention twice as many), and as many as the trained
    weights took forward for their gradients. With `recomputes` (activation checkpointing) the layers run once more.
    """
    once = forward_operations(counts, tokens, head_tokens, positions)
    layers = forward_operations(counts, tokens, 0, positions)
    attention = 2 * counts.attention * positions * tokens
    weight_gradients = 2 * counts.trained * tokens
    return 2 * once + attention + weight_gradients + (layers if recomputes else 0)
