"""Reinforcement learning from answers that can be checked: sums, without a reward model or a critic (GRPO).

    python examples/verifiable.py runs/sums --steps 20

A rule pays for the right number, a function for brevity. The rule asks for the column `answer` of the prompts.
"""

from __future__ import annotations

import argparse
import random

from rlhf_fast import PPOConfig, PPOTrainer


def brief(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward brevity, from 1 for nothing to 0 for 200 characters and more."""
    return [max(0.0, 1.0 - len(response) / 200) for response in responses]


def sums(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 50), draw.randint(1, 50)) for _ in range(count)]
    return [{"prompt": f"What is {a} + {b}? Answer with a number.", "answer": str(a + b)} for a, b in pairs]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the run")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48, help="of a response")
    arguments = parser.parse_args(words)

    config = PPOConfig(
        advantage="grpo",
        steps=arguments.steps,
        samples_per_prompt=8,
        prompts_per_step=8,
        max_new_tokens=arguments.tokens,
    )
    reward = [(1.0, "rule:math"), (0.1, brief)]
    result = PPOTrainer(arguments.model, reward, sums(256), arguments.out, config).train()
    print(result["summary"], f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
