"""The forward passes that training needs: states before response tokens, log-probabilities, last-token scores.

Rows are padded on the right. A batch whose rows are single sequences is passed without an attention mask: causal
attention never looks ahead, so a real token cannot see the padding and gets the same state whatever else is in its
batch. Responses that share a prompt are told apart by a mask and by their positions, packed sequences by attention that
ends with each of them and by positions that begin anew.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from rlhf_fast import ops
from rlhf_fast.data.batches import LONGEST_ROW, Batch, Example, pad
from rlhf_fast.data.conversations import Tokenized, batch_of
from rlhf_fast.models.packed_attention import packed


@dataclass(frozen=True)
class Head:
    """A model's output layer as the linear ops take it: logits = softcap(logit_scale * (hidden @ weight.T + ...))."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    lora: tuple[torch.Tensor, torch.Tensor, float] | None  # (r, H), (V, r), scaling
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, Any]:
        """What the linear ops take by keyword, besides the weight."""
        return {"bias": self.bias, "lora": self.lora, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V), in the dtype of the weight; states and adapters of another are brought to it."""
        dtype = self.weight.dtype
        hidden = hidden.to(dtype)
        logits = nn.functional.linear(hidden, self.weight, None if self.bias is None else self.bias.to(dtype))
        if self.lora is not None:
            a, b, scaling = self.lora
            adapted = nn.functional.linear(nn.functional.linear(hidden.to(a.dtype), a), b.to(a.dtype))
            logits = logits + scaling * adapted.to(dtype)
        logits = logits * self.logit_scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def unwrapped(model: nn.Module) -> Any:
    """The transformers model itself, adapters in place, without peft's wrapper around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def output_head(model: nn.Module) -> Head:
    """The output layer of a causal language model, its adapter if it has one, and the scaling and soft cap of its
    config."""
    inner = unwrapped(model)
    layer, config = inner.get_output_embeddings(), inner.config
    lora = None
    if isinstance(layer, LoraLayer):
        layer, lora = layer.get_base_layer(), _adapter(layer)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), lora, softcap, float(scale))


def _adapter(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """The adapter of an output layer as (a, b, scaling), or None while it is switched off or folded into the weight."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return None
    if len(names) > 1:
        raise ValueError(f"model: {len(names)} adapters on the output layer at once ({', '.join(names)}), expected one")
    return layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, float(layer.scaling[names[0]])


def hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    segments: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Last hidden states (rows, T, H) of right-padded `input_ids` (rows, T); the rest as in Batch."""
    inner = unwrapped(model)
    where: dict[str, torch.Tensor] = {}
    if positions is not None:
        where["position_ids"] = positions
    if mask is not None:  # added to the scores: all that every implementation understands
        scores = torch.zeros(mask.shape, dtype=inner.dtype, device=mask.device)
        where["attention_mask"] = scores.masked_fill_(~mask, torch.finfo(inner.dtype).min)
    with packed(inner, segments) if segments else contextlib.nullcontext():
        states: torch.Tensor = inner.base_model(input_ids=input_ids, use_cache=False, **where).last_hidden_state
    return states


def response_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The state from which each response token is predicted, packed: (R, H)."""
    return _states(model, batch)[batch.before]  # (R, H)


def _states(model: nn.Module, batch: Batch) -> torch.Tensor:
    states = hidden_states(model, batch.input_ids, batch.positions, batch.mask, batch.segments)
    return states.flatten(0, 1)  # (rows * T, H)


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
        temperature=temperature,
        **head.options(),
    )


def score_last(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A reward model's score at the last real token of each sequence, by each of its K heads: (B, K), float32."""
    scores: torch.Tensor = unwrapped(model).score(_states(model, batch)[batch.last])
    return scores.float()


def lower_bound(scores: torch.Tensor, lcb: float) -> torch.Tensor:
    """(B, K) -> (B,): the heads' mean less `lcb` of their standard deviations (Coste et al., arXiv:2310.02743)."""
    return scores.mean(dim=1) - lcb * scores.std(dim=1, correction=0)


@torch.no_grad()
def longest_shared(model: nn.Module) -> int:
    """How long sequences may be that share their prompt in a row of a batch (see data/batches.py); 0: none may.

    Found by trying: there are models that heed neither a mask nor positions. A window narrower than a sequence would
    be lost, since the mask stands for it.
    """
    inner = unwrapped(model)
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    prompt, *responses = (tuple(i % vocabulary for i in ids) for ids in ((5, 6, 7), (8, 9, 10), (11, 12), (13, 14, 15)))
    examples = [Example(prompt, response) for response in responses]
    device = next(model.parameters()).device
    batch = pad(examples, device, shared=8)
    with evaluating(model):
        apart = response_states(model, pad(examples, device))
        try:
            # As it should be, and what came of it if the model heeded only the one or only the other.
            right, no_positions, no_mask = (
                float((response_states(model, each) - apart).abs().max())
                for each in (batch, replace(batch, positions=None), replace(batch, mask=None))
            )
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError):
            return 0
    if not 4 * right < min(no_positions, no_mask):  # rounding in any dtype is far below a quarter of either
        return 0
    return min(LONGEST_ROW, _window(model))


@torch.no_grad()
def longest_packed(model: nn.Module) -> int:
    """How long sequences may be that are packed into a row (see data/conversations.py); 0: none may.

    Found by trying: there are models whose attention is not transformers' to choose, and others that carry a state from
    token to token. A window narrower than a sequence would be lost, since attention is asked for each without a mask.
    """
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    ids = [tuple(i % vocabulary for i in row) for row in ((5, 6, 7, 8), (9, 10), (11, 12, 13))]
    conversations = [Tokenized(row, (False, *[True] * (len(row) - 1))) for row in ids]
    device = next(model.parameters()).device
    batch = batch_of(conversations, device, packed=True)
    with evaluating(model):
        apart = response_states(model, batch_of(conversations, device))
        try:
            # As it should be, and what comes of it when each sees those before it.
            right, one_sequence = (
                float((response_states(model, each) - apart).abs().max())
                for each in (batch, replace(batch, positions=None, segments=None))
            )
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError):
            return 0
    rounding = torch.finfo(apart.dtype).eps ** 0.5 * float(apart.abs().max())
    return _window(model) if right < rounding and 4 * right < one_sequence else 0


def _window(model: nn.Module) -> int:
    """How far back every layer of a model looks at least, in tokens."""
    config = unwrapped(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([window for window in windows if window], default=sys.maxsize)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Refuse a model whose logits are not its head applied to its states, rather than train it on wrong numbers."""
    inner, head = unwrapped(model), output_head(model)
    ids = torch.tensor([[5, 6, 7, 8]], device=head.weight.device)
    truth = inner(input_ids=ids, use_cache=False).logits.float()
    logits = head.logits(hidden_states(model, ids)).float()
    if not torch.allclose(truth, logits, rtol=1e-2, atol=1e-2 * truth.abs().max().item()):
        raise ValueError(
            f"model: {type(inner).__name__} changes its logits after the output layer in a way not known here"
        )
