"""Process logits before they are sampled from, as a request asks."""

from __future__ import annotations

import math

import torch

from rlhf_fast.rollout.sequence import Sequence


def process(logits: torch.Tensor, sequence: Sequence) -> None:
    """Change a row of logits (V,) in place as the sequence's settings say."""
    params, device = sequence.params, logits.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt, *sequence.response}), device=device)
        raw, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(raw > 0, raw / penalty, raw * penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.response:
        said, times = torch.tensor(sequence.response, device=device).unique(return_counts=True)
        logits[said] -= (params.presence_penalty + params.frequency_penalty * times).to(logits.dtype)
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=device)
        logits[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=device)
    banned = [
        word[-1] for word in sequence.bad_words if len(word) == 1 or sequence.response[1 - len(word) :] == [*word[:-1]]
    ]
    if len(sequence.response) < params.min_new_tokens:
        banned += sequence.stop_token_ids
    if banned:
        logits[torch.tensor(banned, device=device)] = -math.inf
