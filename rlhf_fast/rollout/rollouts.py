"""What a generator returns: packed tokens with their log-probabilities, and the texts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from rlhf_fast.data.batches import Example


@dataclass(frozen=True)
class Rollouts:
    """B sequences (prompt and response), packed into N tokens, in the order of the prompts, n in a row for each."""

    input_ids: torch.Tensor  # (N,) int64
    response_mask: torch.Tensor  # (N,) bool: true on response tokens, the end token included
    logprobs: torch.Tensor  # (N,) float32: of each response token when it was sampled; 0 on the prompt
    cu_seqlens: torch.Tensor  # (B + 1,) int32: where each sequence starts
    prompt_index: torch.Tensor  # (B,) int64: which prompt each sequence answers
    texts: list[str]  # the responses, without special tokens
    finish_reasons: list[str]  # "stop" (ended by itself) or "length" (cut by max_new_tokens)

    def __len__(self) -> int:
        return len(self.texts)

    def examples(self) -> list[Example]:
        """The sequences as examples for training."""
        ids, masks = self.input_ids.tolist(), self.response_mask.tolist()
        bounds = self.cu_seqlens.tolist()
        examples = []
        for start, end in itertools.pairwise(bounds):
            split = start + masks[start:end].index(True)
            examples.append(Example(tuple(ids[start:split]), tuple(ids[split:end])))
        return examples

    def to_padded(self, padding_value: int = 0) -> dict[str, torch.Tensor]:
        """input_ids, response_mask, logprobs and attention_mask as (B, T), padded on the right."""
        lengths = self.cu_seqlens.diff().long()
        width = int(lengths.max()) if len(self) else 0
        attention = torch.arange(width, device=lengths.device) < lengths.unsqueeze(-1)  # (B, T)
        padded: dict[str, torch.Tensor] = {"attention_mask": attention}
        for name, fill in (("input_ids", padding_value), ("response_mask", False), ("logprobs", 0.0)):
            packed = getattr(self, name)
            padded[name] = torch.full(attention.shape, fill, dtype=packed.dtype, device=packed.device)
            padded[name][attention] = packed
        return padded
