"""How a response is sampled, and the sampling itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rlhf_fast import ops


@dataclass(frozen=True)
class SamplingParams:
    """What to sample. Same seed, same prompt at the same place, same samples: whatever else is in the batch.

    Args:
        n: responses for each prompt.
        temperature: divides the logits; 0.0 takes the likeliest token.
        top_k: keep only the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; 1.0 keeps all.
        max_new_tokens: a response that has not ended by then is cut, with finish reason "length".
        stop_token_ids: tokens that end a response, besides the tokenizer's end token.
        ignore_eos: go on to `max_new_tokens` whatever is sampled.
        seed: of the random numbers.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: {self.n} responses were asked for; expected at least 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}; expected at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature}; expected 0.0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p}; expected more than 0.0 and at most 1.0")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}; expected 0 or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}; expected 0 (all tokens) or a positive number")


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), one for each position of one response: a counter-based stream (Philox).

    Every response has a key of its own, so its numbers do not depend on the batch that it is sampled in.
    """
    key = np.random.SeedSequence(entropy=(seed, prompt, sample)).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def sample_tokens(
    logits: torch.Tensor, uniform: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row by inverting the cumulative distribution.

    Args:
        logits: (B, V), any float dtype.
        uniform: (B,) float64 in [0, 1).

    Returns:
        tokens (B,) int64, and logprobs (B,) float32: under softmax(logits / temperature) over the whole vocabulary,
        that is, before top_k and top_p (and at temperature 1 when greedy), as training computes them.
    """
    if params.temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        probabilities = _filtered(torch.softmax(logits.float() / params.temperature, dim=-1), params)  # (B, V)
        cumulative = probabilities.double().cumsum(dim=-1)  # in float64: 50,000 small terms lose bits in float32
        threshold = (uniform * cumulative[:, -1]).unsqueeze(-1)
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    logprobs, _ = ops.token_logprobs(logits, tokens, temperature=params.temperature or 1.0)
    return tokens, logprobs.float()


def _filtered(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probabilities (B, V) with what top_k and top_p cut set to zero, not renormalised."""
    if params.top_k == 0 and params.top_p == 1.0:
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
    keep = before < params.top_p
    if params.top_k:
        keep[:, params.top_k :] = False
    keep[:, 0] = True
    return torch.zeros_like(probabilities).scatter(-1, index, torch.where(keep, ordered, 0.0))
