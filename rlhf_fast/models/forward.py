"""The forward passes that training needs: states before response tokens, log-probabilities, last-token scores.

Batches are padded on the right and passed without an attention mask: causal attention never looks ahead, so a real
token cannot see the padding and gets the same state whatever else is in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from rlhf_fast import ops
from rlhf_fast.data.batches import Batch


@dataclass(frozen=True)
class Head:
    """A model's output layer as the linear ops take it: logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


def unwrapped(model: nn.Module) -> Any:
    """The transformers model itself, adapters in place, without peft's wrapper around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def output_head(model: nn.Module) -> Head:
    """The output layer of a causal language model, with the scaling and soft cap that its config names."""
    inner = unwrapped(model)
    layer, config = inner.get_output_embeddings(), inner.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), softcap, float(scale))


def hidden_states(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states of right-padded `input_ids` (B, T) as (B, T, H)."""
    states: torch.Tensor = unwrapped(model).base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return states


def response_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The state from which each response token is predicted, packed: (R, H)."""
    hidden = hidden_states(model, batch.input_ids)  # (B, T, H)
    return hidden[:, :-1][batch.response_mask[:, 1:]]  # (R, H)


def response_logprobs(
    model: nn.Module, batch: Batch, temperature: float = 1.0, states: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each response token and the entropy it was drawn from, packed: (R,), (R,), float32."""
    head = output_head(model)
    if states is None:
        states = response_states(model, batch)
    return ops.linear_token_logprobs(
        states,
        head.weight,
        batch.response_tokens,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def score_last(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A reward model's score at the last real token of each sequence: (B,), float32."""
    hidden = hidden_states(model, batch.input_ids)  # (B, T, H)
    rows = torch.arange(len(batch.lengths), device=hidden.device)
    last = hidden[rows, batch.lengths - 1]  # (B, H)
    scores: torch.Tensor = unwrapped(model).score(last)  # (B, 1)
    return scores.squeeze(-1).float()


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Refuse a model whose logits are not its head applied to its states, rather than train it on wrong numbers."""
    inner, head = unwrapped(model), output_head(model)
    ids = torch.tensor([[5, 6, 7, 8]], device=head.weight.device)
    truth = inner(input_ids=ids, use_cache=False).logits.float()
    logits = nn.functional.linear(hidden_states(model, ids), head.weight, head.bias).float() * head.logit_scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if not torch.allclose(truth, logits, rtol=1e-2, atol=1e-2 * truth.abs().max().item()):
        raise ValueError(
            f"model: {type(inner).__name__} changes its logits after the output layer in a way not known here"
        )
