"""Results of a generator: packed tokens with their log-probabilities, and the texts."""

from __future__ import annotations

import itertools
from collections import Counter, abc
from dataclasses import dataclass

import torch

from rlhf_fast.data.batches import Example
from rlhf_fast.rollout.sequence import Sequence


@dataclass(frozen=True, repr=False)
class Rollouts:
    """B sequences (prompt and response), packed into N tokens, in the order of the prompts, n in a row for each."""

    input_ids: torch.Tensor  # (N,) int64
    response_mask: torch.Tensor  # (N,) bool: true on response tokens, the end token included
    logprobs: torch.Tensor  # (N,) float32: of response tokens under softmax(logits / temperature), as training has it
    sampled_logprobs: torch.Tensor  # (N,) float32: of the same under what was sampled from: penalties, top_k, top_p
    entropy: torch.Tensor  # (N,) float32: of the distribution that each response token was drawn from, before cuts
    cu_seqlens: torch.Tensor  # (B + 1,) int32: where each sequence starts
    prompt_index: torch.Tensor  # (B,) int64: which prompt each sequence answers
    texts: list[str]  # the responses, without special tokens
    # "stop" (ended by itself), "length" (cut by max_new_tokens), "unfinished" (see until=), "abort", or "error" (logits
    # that were not finite)
    finish_reasons: list[str]
    # (N,) float32: of a generator with a value head, at the state that each response token was drawn from
    values: torch.Tensor | None = None
    sequences: tuple[Sequence, ...] = ()  # what Generator.resume goes on from

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        prompts, response = len(set(self.prompt_index.tolist())), int(self.response_mask.sum())
        ends = ", ".join(f"{count} {reason}" for reason, count in Counter(self.finish_reasons).items())
        return (
            f"Rollouts({len(self)} responses to {prompts} prompts: {ends}; "
            f"{self.response_mask.numel() - response} + {response} tokens)"
        )

    @staticmethod
    def of(sequences: abc.Sequence[Sequence], texts: list[str], device: torch.device) -> Rollouts:
        def packed(name: str) -> torch.Tensor:
            rows = [[0.0] * len(s.prompt) + getattr(s, name) for s in sequences]
            return torch.tensor([x for row in rows for x in row], dtype=torch.float32, device=device)

        lengths = [len(s) for s in sequences]
        # Not where some tokens are from before there was a value head (see Generator.resume).
        has_values = any(s.values for s in sequences) and all(len(s.values) == len(s.response) for s in sequences)
        return Rollouts(
            input_ids=torch.tensor([i for s in sequences for i in s.tokens(0, len(s))], device=device),
            response_mask=torch.tensor(
                [m for s in sequences for m in [False] * len(s.prompt) + [True] * len(s.response)], device=device
            ),
            logprobs=packed("logprobs"),
            sampled_logprobs=packed("sampled_logprobs"),
            entropy=packed("entropies"),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device),
            prompt_index=torch.tensor([s.prompt_index for s in sequences], device=device),
            texts=texts,
            finish_reasons=[s.finish_reason or "unfinished" for s in sequences],
            values=packed("values") if has_values else None,
            sequences=tuple(sequences),
        )

    def examples(self) -> list[Example]:
        """Convert the sequences to examples for training.

        Raises:
            ValueError: a sequence has no response (it failed, or was ended before its first token).
        """
        ids, masks = self.input_ids.tolist(), self.response_mask.tolist()
        examples = []
        for i, (start, end) in enumerate(itertools.pairwise(self.cu_seqlens.tolist())):
            if not any(masks[start:end]):
                raise ValueError(
                    f"rollouts: sequence {i} has no response (finish reason {self.finish_reasons[i]!r}); leave it out"
                )
            split = start + masks[start:end].index(True)
            examples.append(Example(tuple(ids[start:split]), tuple(ids[split:end])))
        return examples

    def to_padded(self, padding_value: int = 0) -> dict[str, torch.Tensor]:
        """Pad to (B, T) on the right: input_ids, response_mask, logprobs and attention_mask, by name."""
        lengths = self.cu_seqlens.diff().long()
        width = int(lengths.max()) if len(self) else 0
        attention = torch.arange(width, device=lengths.device) < lengths.unsqueeze(-1)  # (B, T)
        padded: dict[str, torch.Tensor] = {"attention_mask": attention}
        for name, fill in (("input_ids", padding_value), ("response_mask", False), ("logprobs", 0.0)):
            packed = getattr(self, name)
            padded[name] = torch.full(attention.shape, fill, dtype=packed.dtype, device=packed.device)
            padded[name][attention] = packed
        return padded
