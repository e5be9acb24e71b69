"""A method of your own on PPO's loop: an advantage and a loss, nothing else.

    python examples/custom_method.py runs/mine --steps 20

The loss is GSPO's (arXiv 2507.18071): one probability ratio for a whole response, the geometric mean of its tokens'.
The advantage is +1 for the better half of a prompt's responses and -1 for the rest, whatever the unit of the scores.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import PPOConfig, PPOTrainer, ops
from rlhf_fast.trainers.ppo.advantages import Advantages, Scored


def better_half(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    penalties = kl_coef * ops.sequence_sum(scored.kl, cu_seqlens=scored.cu_seqlens)
    rewards = (scored.scores - penalties).view(-1, config.samples_per_prompt)  # (prompts, n)
    better = rewards > rewards.median(dim=1, keepdim=True).values
    signs = better.float().flatten() * 2 - 1  # (B,)
    lengths = scored.cu_seqlens.diff().long()
    return Advantages(signs.repeat_interleave(lengths), returns=None, sums=None)


def gspo(
    states: Tensor,  # (R, H), from which the response tokens of B responses are predicted
    weight: Tensor,  # (V, H)
    tokens: Tensor,  # (R,)
    old_logprobs: Tensor,  # (R,)
    advantages: Tensor,  # (R,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    clip_low: float,
    clip_high: float,
    denominator: int,  # tokens of the whole minibatch, of which this is a part
    advantage_sums: Tensor | None = None,
    **head: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs, _ = ops.linear_token_logprobs(states, weight, tokens, **head)
    lengths = cu_seqlens.diff()  # (B,)
    ratio = torch.exp(ops.sequence_sum(logprobs - old_logprobs, cu_seqlens=cu_seqlens) / lengths)
    advantage = advantages[cu_seqlens[:-1].long()]  # the same for all tokens of a response
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(advantage * ratio, advantage * clipped) * lengths
    share = lengths / denominator
    return losses.sum() / denominator, {
        "ratio_mean": (ratio.detach() * share).sum(),
        "clip_fraction": ((ratio != clipped) * share).sum(),
    }


def by_length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the run")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48, help="of a response")
    arguments = parser.parse_args(words)

    # Any advantage but "gae" trains without a critic. The KL penalty is in the reward, above: as a term of the loss it
    # would come with ref_logprobs, kl_coef and kl, as ops.linear_ppo_loss has them.
    config = PPOConfig(
        advantage="grpo",
        kl_in="reward",
        steps=arguments.steps,
        max_new_tokens=arguments.tokens,
        clip_low=3e-4,
        clip_high=4e-4,
    )
    prompts = [{"prompt": f"Tell me about the number {i}."} for i in range(64)]
    trainer = PPOTrainer(arguments.model, by_length, prompts, arguments.out, config, advantage=better_half, loss=gspo)
    print(trainer.train()["summary"])


if __name__ == "__main__":
    main()
