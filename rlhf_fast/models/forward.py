"""The forward passes that training needs: states before response tokens, log-probabilities, last-token scores.

Rows are padded on the right. A batch whose rows are single sequences is passed without an attention mask: causal
attention never looks ahead, so a real token cannot see the padding and gets the same state whatever else is in its
batch. Responses that share a prompt are told apart by a mask and by their positions, packed sequences by attention that
ends with each of them and by positions that begin anew.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from rlhf_fast import ops
from rlhf_fast.data.batches import LONGEST_ROW, Batch, Example, pad
from rlhf_fast.data.conversations import Tokenized, batch_of
from rlhf_fast.models.adapters import refuse_prompts_of_adapters
from rlhf_fast.models.inner import FAILURES, evaluating, forget_measures, is_near, trunk
from rlhf_fast.models.logits import logits_of
from rlhf_fast.models.output_layer import product_of
from rlhf_fast.models.packed_attention import packed
from rlhf_fast.models.sight import longest_row, reach_of, sights


@dataclass(frozen=True)
class Head:
    """A model's output layer as the linear ops take it: logits = softcap(logit_scale * (hidden @ weight.T + ...))."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    lora: tuple[torch.Tensor, torch.Tensor, float] | None  # (r, H), (V, r), scaling
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, Any]:
        """Return what the linear ops take by keyword, besides the weight."""
        return {"bias": self.bias, "lora": self.lora, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits (..., V) of states (..., H) in the dtype of the weight; states and adapters are cast to it."""
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
    """The transformers model itself, adapters in place, without peft's wrapper around it.

    Raises:
        ValueError: an adapter that works in that wrapper, before the model.
    """
    if not isinstance(model, PeftModel):
        return model
    refuse_prompts_of_adapters(model)
    return model.get_base_model()


def output_head(model: nn.Module) -> Head:
    """The output layer of a causal language model, its adapter if it has one, and what becomes of its products."""
    inner = unwrapped(model)
    weight, bias, lora = product_of(inner.get_output_embeddings())
    made = logits_of(inner)
    return Head(weight, bias, lora, made.softcap, made.scale)


def hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    segments: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Last hidden states (rows, T, H) of right-padded `input_ids` (rows, T); the rest as in Batch."""
    inner = unwrapped(model)
    if positions is None:  # else they share a row, which `longest_shared` allows or not
        require_reach(model, max(segments) if segments else input_ids.shape[1])
    where: dict[str, torch.Tensor] = {}
    if positions is not None:
        where["position_ids"] = positions
    if mask is not None:  # added to the scores: all that every implementation understands
        scores = torch.zeros(mask.shape, dtype=inner.dtype, device=mask.device)
        where["attention_mask"] = scores.masked_fill_(~mask, torch.finfo(inner.dtype).min)
    with packed(inner, segments) if segments else contextlib.nullcontext():
        states: torch.Tensor = trunk(inner)(input_ids=input_ids, use_cache=False, **where).last_hidden_state
    return states


def require_reach(model: nn.Module, longest: int) -> None:
    """Refuse sequences of so many tokens where others in their batch would have other states for it.

    Raises:
        ValueError: names the model, and the length up to which it can be trained.
    """
    inner = unwrapped(model)
    if longest > (reach := reach_of(inner)):
        raise ValueError(
            f"model: {type(inner).__name__} rotates all tokens of a batch differently once one sequence is longer than "
            f"{reach} (LongRoPE, dynamic NTK); got max_length {longest}, expected at most {reach}"
        )


def response_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The state from which each response token is predicted, packed: (R, H)."""
    return _states(model, batch)[batch.predicted_at]  # (R, H)


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
    """Combine the scores of K heads, (B, K) -> (B,): mean less `lcb` standard deviations (arXiv 2310.02743)."""
    return scores.mean(dim=1) - lcb * scores.std(dim=1, correction=0)


@torch.no_grad()
def longest_shared(model: nn.Module) -> int:
    """Find how long sequences may be that share their prompt in a row of a batch (see data/batches.py); 0: none may.

    Found by trying: there are models that heed neither a mask nor positions. A window narrower than a sequence would
    be lost, since the mask stands for it.
    """
    inner = unwrapped(model)
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    prompt, *responses = (tuple(i % vocabulary for i in ids) for ids in ((5, 6, 7), (8, 9, 10), (11, 12), (13, 14, 15)))
    examples = [Example(prompt, response) for response in responses]
    device = next(model.parameters()).device
    batch = pad(examples, device, longest_shared=8)
    if not _heeds(model, batch, pad(examples, device), replace(batch, positions=None), replace(batch, mask=None)):
        return 0
    return min(LONGEST_ROW, _window(model)) if longest_row(inner) >= LONGEST_ROW else 0


@torch.no_grad()
def longest_packed(model: nn.Module) -> int:
    """Find how long sequences may be that are packed into a row (see data/conversations.py); 0: none may.

    Found by trying: there are models whose attention is not transformers' to choose, and others that carry a state from
    token to token. A window narrower than a sequence would be lost, since attention is asked for each without a mask.
    """
    if longest_row(unwrapped(model)) < sys.maxsize:
        return 0
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    ids = [tuple(i % vocabulary for i in row) for row in ((5, 6, 7, 8), (9, 10), (11, 12, 13))]
    conversations = [Tokenized(row, (False, *[True] * (len(row) - 1))) for row in ids]
    device = next(model.parameters()).device
    batch = batch_of(conversations, device, packed=True)
    one_sequence = replace(batch, positions=None, segments=None)
    return _window(model) if _heeds(model, batch, batch_of(conversations, device), one_sequence) else 0


def _heeds(model: nn.Module, batch: Batch, apart: Batch, *others: Batch) -> bool:
    """Return whether a model gives a batch the states that its sequences have apart, and the others different states.

    However little what they lack may weigh, or rounding blur it: a model that does not heed it gives the same bits.
    """
    with evaluating(model):
        want = response_states(model, apart).float()
        try:
            got, again, *different = (response_states(model, each).float() for each in (batch, batch, *others))
        except FAILURES:
            return False
    noise = (again - got).abs().max()  # 0, unless the sums of a device come in any order
    near = torch.finfo(unwrapped(model).dtype).eps ** 0.5 * want.norm()
    heeds = (bool((states - got).abs().max() > 2 * noise) for states in different)
    return bool((got - want).norm() <= near) and all(heeds)


def _window(model: nn.Module) -> int:
    """Find how long sequences may be that every layer sees the whole of, in tokens; 0 where that cannot be known."""
    inner = unwrapped(model)
    try:
        by_layer = sights(inner)
    except ValueError:
        return 0
    if not by_layer:  # its attention is its own, and so are its masks
        return 0
    return min(reach_of(inner), *(min(sight.window or sys.maxsize, sight.longest) for sight in by_layer.values()))


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Refuse a model whose logits are not its head applied to its states, or whose states depend on what follows or on
    other rows, rather than train it on wrong numbers."""
    inner = unwrapped(model)
    name = type(inner).__name__
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 3], [5, 4, 7, 8]], device=inner.device)
    forget_measures(inner)
    with evaluating(model):
        head = output_head(model)
        try:
            truth = inner(input_ids=ids, use_cache=False).logits
            states = hidden_states(model, ids)
            alone = hidden_states(model, ids[:1, :2])
        except FAILURES as error:
            raise ValueError(f"model: {name} cannot be used here: {error}") from error
    if not is_near(head.logits(states), truth, half=2e-2):
        raise ValueError(f"model: {name} changes its logits after the output layer in a way not known here")
    if not is_near(states[:2, :2], alone.expand(2, -1, -1), half=0.1):  # whose rounding chooses experts, too
        raise ValueError(f"model: {name} lets tokens see what follows them, or other rows; expected a causal model")
    reach_of(inner)
