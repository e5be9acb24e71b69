"""How long a run takes, by count: products at a share of what the device can do, and in generation the reading of
weights, keys and values at a share of its bandwidth. An estimate: loading, evaluation and saving are left out.

The models are those that the trainers build; which of them read the samples of a PPO step is asked of the trainer.
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
    """What a device can do, and how much of that a run reaches."""

    tflops: float  # 10^12 operations a second
    bandwidth: float  # 10^12 bytes a second
    utilisation: float  # share of both


@dataclass(frozen=True)
class Data:
    """What is learned from; of PPO the settings say how many sequences there are."""

    sequences: int  # demonstrations, or comparisons
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Counts:
    """What a model's work depends on."""

    trunk: int  # weights of the layers' matrices
    head: int  # weights that a token's logits take
    trained: int  # weights
    attention: int  # layers * heads * dim
    weight_bytes: int  # read in each step of generation
    kv_bytes: int  # of a token in all layers
    at_once: int  # sequences that the generator steps together
    own_critic: bool  # a critic has a model of its own, of as many weights


def count(config: TrainerConfig, shape: PreTrainedConfig, rewards: Sequence[PreTrainedConfig] = ()) -> Counts:
    """Of the model that `config` trains; `rewards` as in `memory.predict`."""
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
        at_once=MAX_SEQUENCES,
        own_critic=critic is not None and critic.model is not None,
    )


def seconds(config: TrainerConfig, counts: Counts, data: Data, machine: Machine) -> dict[str, float]:
    """Of each phase, over the whole run.

    Args:
        counts: of the model's weights; a reward model has as many.
    """
    rate = machine.tflops * 1e12 * machine.utilisation
    prompt, response = data.prompt_tokens, data.response_tokens
    recomputes = config.optim.checkpointing
    if not isinstance(config, PPOConfig):
        pair = isinstance(config, RewardConfig | DPOConfig)
        responses = 2 if pair else 1
        scored = 0 if isinstance(config, RewardConfig) else responses * response  # tokens that meet the head
        tokens = prompt + responses * response
        mean = prompt + response  # positions that attention looks back on, at most
        learned = min(data.sequences * config.epochs, (config.max_steps or sys.maxsize) * config.batch_size)
        found = {"training": learned * training(counts, tokens, scored, mean, recomputes) / rate}
        if isinstance(config, DPOConfig):
            found = {"reference": data.sequences * forward(counts, tokens, scored, mean) / rate, **found}
        return found
    samples, prompts = config.samples_per_prompt, config.steps * config.prompts_per_step
    mean = prompt + response
    tokens, scored = prompt + samples * response, samples * response  # of a prompt with all its responses
    once, trained = forward(counts, tokens, scored, mean), training(counts, tokens, scored, mean, recomputes)
    # Reference, reward, and the policy where the sampler's numbers are not its own.
    scoring = (3 if computed_again(getattr(torch, config.dtype), config.lag) else 2) * once
    rollouts = _rollout_seconds(config, counts, prompt, response, machine, samples)
    if counts.own_critic:
        scoring += forward(counts, tokens, 0, mean)
        trained += training(counts, tokens, 0, mean, recomputes)
    if ADVANTAGES[config.advantage].needs_greedy:  # one more response, which is rewarded
        scoring += forward(counts, prompt + response, response, mean)
        rollouts += _rollout_seconds(config, counts, prompt, response, machine, 1)
    return {
        "rollouts": config.steps * rollouts,
        "scoring": prompts * scoring / rate,
        "training": prompts * config.epochs * trained / rate,
    }


def _rollout_seconds(
    config: PPOConfig, counts: Counts, prompt: int, response: int, machine: Machine, samples: int
) -> float:
    """Of a step: prompts are bound by products; new tokens by whichever takes longer, products or reading."""
    sequences = config.prompts_per_step * samples
    rate, bytes_a_second = (1e12 * machine.utilisation * x for x in (machine.tflops, machine.bandwidth))
    of_prompts = config.prompts_per_step * forward(counts, prompt, 1, prompt) / rate
    waves = -(-sequences // counts.at_once)
    at_once = sequences / waves
    products = at_once * forward(counts, 1, 1, prompt + response) / rate
    reading = (counts.weight_bytes + at_once * (prompt + response / 2) * counts.kv_bytes) / bytes_a_second
    return of_prompts + waves * response * max(products, reading)


def forward(counts: Counts, tokens: float, scored: float, positions: float) -> float:
    """Operations of one pass: two a weight and token in the layers, two a weight of the head and token that meets it,
    and attention, half of whose pairs are in the future."""
    return 2 * counts.trunk * tokens + 2 * counts.head * scored + 2 * counts.attention * positions * tokens


def training(counts: Counts, tokens: float, scored: float, positions: float, recomputes: bool) -> float:
    """Operations of a pass with its gradient: as many again for the activations, and for the weights that are trained;
    attention twice more; layers whose activations were not kept once more."""
    once = forward(counts, tokens, scored, positions)
    of_layers = forward(counts, tokens, 0, positions)
    of_attention = 2 * counts.attention * positions * tokens
    of_weights = 2 * counts.trained * tokens
    return 2 * once + of_attention + of_weights + (of_layers if recomputes else 0)
