"""`python -m bench.rollout.host`: milliseconds that a step takes beside the model: scheduling, places, drawing.

256 sequences draw 200 tokens each from states that are there already, of a model so small that its output layer and
sampling take next to nothing. On a GPU the device waits for this where a step's layers are launched at once.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import LlamaConfig

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.rollout.batch import Placed

SEQUENCES, TOKENS = 256, 200
CONFIG = LlamaConfig(
    vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=2048,
)  # fmt: skip


def milliseconds(n: int) -> float:
    """A step's, with n samples of each prompt; the median of those in which every sequence has one token."""
    generator = Generator(models.load(CONFIG)[0])
    states, times, started = torch.randn(generator.max_batch_tokens, 16), [], 0.0

    def forward(step: Placed) -> torch.Tensor:
        nonlocal started
        now = time.perf_counter()
        if len(step.ids) == SEQUENCES:
            times.append(now - started)
        started = now
        return states[: len(step.ids)]

    generator.runner._forward = forward  # type: ignore[method-assign]
    prompts = [[3 + i % 200] * (200 + i) for i in range(SEQUENCES // n)]
    generator.generate(prompts, SamplingParams(n=n, max_new_tokens=TOKENS, ignore_eos=True))
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for n in (1, 8):
        milliseconds(n)  # the first call loads and compiles
        print(f"{SEQUENCES // n} prompts, {n} samples each: {milliseconds(n):.2f} ms a step")
