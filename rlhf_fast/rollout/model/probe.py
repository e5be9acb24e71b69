"""Probe whether a model can be served from blocks of keys and values, and by which of the faster layers: by trying."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_fast.models.inner import FAILURES, evaluating, trunk
from rlhf_fast.models.sight import longest_row, reach_of, sights
from rlhf_fast.ops.paged_attention import KVCache, PagedBatch
from rlhf_fast.rollout.model import attention, layers, torch_layers
from rlhf_fast.rollout.requests import context_length

BLOCK = 16
PROMPTS = (5, 7, 4)  # tokens of three sequences; the second comes in two chunks
FAR = 4096  # where the second one stands in a model that does not say how many positions it has


@dataclass(frozen=True)
class Served:
    """Ways in which a model is served."""

    caches: dict[int, tuple[int, int, torch.Tensor]]  # each layer's kv heads, dim, and a tensor of its dtype
    options: dict[int, attention.Options]  # each layer's attention
    faster: tuple[str, ...]  # kinds of layers that are replaced
    windows: dict[int, int]  # what each layer sees: so many tokens, or (0) all that stand before
    longest: int  # sequence for which all this is so
    longest_step: int  # tokens that may be computed at once

    @property
    def bytes_per_token(self) -> int:
        """Count the bytes of a token's keys and values, in all layers."""
        return sum(2 * heads * -(-dim // 16) * 16 * like.itemsize for heads, dim, like in self.caches.values())


def probe(inner: Any, device: torch.device, fast: bool = True) -> Served:
    """Compute three short sequences with and without blocks: at the first positions, the last ones, and between.

    Positions beyond windows and original lengths show what rotates, or scales its queries, by them. What no short
    sequence shows, windows and chunks, the model's masks are asked for (models/sight.py).

    Raises:
        ValueError: the model cannot be served; names it and says why.
    """
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise ValueError(f"model: {name} is an encoder-decoder; expected a decoder")
    if not getattr(inner, "_supports_attention_backend", False):
        raise ValueError(
            f"model: {name} does not attend through transformers' attention interface, which paged attention needs; "
            "expected a model such as Llama, Qwen, Mistral, Gemma, Phi, OLMo or GPT-2"
        )
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([(11 * i + 5) % vocabulary for i in range(sum(PROMPTS))], device=device)
    seen, reach = sights(inner), reach_of(inner)
    windows = {layer: sight.window for layer, sight in seen.items()}
    end = min(context_length(inner.config.get_text_config()) or FAR, reach)
    starts = (0, max(end - PROMPTS[1], 0), end // 2 if end >= 2 * max(PROMPTS) else 0)
    rows = _Rows(ids, starts, windows)
    calls: torch_layers.Calls = {}
    try:
        want = _plain(inner, rows)
        got, step = _in_blocks(inner, rows, (), {}, calls)
    except FAILURES as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} in its own code: {error}"
        raise ValueError(f"model: {name} cannot be served from paged keys and values: {said}") from error
    expected, asked = inner.config.get_text_config().num_hidden_layers, sorted(step.options)
    if len(asked) != expected or not _same(got, want):
        raise ValueError(
            f"model: {name} cannot be served from paged keys and values: {len(asked)} of its {expected} layers attend "
            f"through transformers' interface{'' if _same(got, want) else ', and its states come out different'} "
            "(state-space layers, compressed or shared caches and attention biases are not supported)"
        )
    caches = {layer: (c.keys.shape[1], c.dim, c.keys[:0]) for layer, c in step.caches.items()}
    faster = _faster(inner, rows, got, step.options, calls) if fast else ()
    longest = min(reach, *(sight.longest for sight in seen.values()))
    row = longest_row(inner)  # steps are rows in which tokens of many sequences stand
    return Served(caches, step.options, faster, windows, min(longest, row), row)


@dataclass(frozen=True)
class _Rows:
    """Short sequences, and where they begin."""

    ids: torch.Tensor  # (N,), of all of them
    starts: tuple[int, ...]  # the position of the first token of each
    windows: dict[int, int]


@torch.no_grad()
def _faster(
    inner: Any, rows: _Rows, want: torch.Tensor, options: dict[int, Any], calls: torch_layers.Calls
) -> tuple[str, ...]:
    """Find as many kinds of faster layers as give the same states; the most particular is the first to go."""
    with attention.paged(inner):
        kinds = layers.KINDS if layers.compiled_for(want) else torch_layers.that_serve(calls, options)
    for count in range(len(kinds), 0, -1):
        with contextlib.suppress(*FAILURES):  # not that model
            if _same(_in_blocks(inner, rows, kinds[:count], options)[0], want):
                return kinds[:count]
    return ()


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    loose = 1e-4 if want.dtype == torch.float32 else 0.1
    return torch.allclose(got.float(), want.float(), rtol=0, atol=loose * float(want.abs().max()))


@torch.no_grad()
def _plain(inner: Any, rows: _Rows) -> torch.Tensor:
    """The states of each sequence by itself."""
    states = []
    with evaluating(inner):
        for part, start in zip(rows.ids.split(PROMPTS), rows.starts, strict=True):
            at = torch.arange(start, start + len(part), device=part.device)
            where = {"position_ids": at.unsqueeze(0)} if start else {}  # as the model counts by itself
            states.append(trunk(inner)(input_ids=part.unsqueeze(0), use_cache=False, **where).last_hidden_state[0])
    return torch.cat(states)  # (N, H)


@torch.no_grad()
def _in_blocks(
    inner: Any,
    rows: _Rows,
    kinds: tuple[str, ...],
    options: dict[int, Any],
    calls: torch_layers.Calls | None = None,
) -> tuple[torch.Tensor, attention.Step]:
    """Compute the states from blocks in two steps, in which the third sequence and half of the second come later."""
    watched = contextlib.nullcontext() if calls is None else torch_layers.watched(inner, calls)

    def new_cache(layer: int, kv_heads: int, dim: int, like: torch.Tensor) -> KVCache:
        return KVCache.new(4, kv_heads, dim, BLOCK, like)

    device = rows.ids.device
    first, second, third = rows.ids.split(PROMPTS)
    caches: dict[int, KVCache] = {}
    states = []
    chunks = (  # tokens, sequences, counts, contexts
        (torch.cat([first, second[:3]]), (0, 1), (5, 3), (5, 3)),
        (torch.cat([second[3:], third]), (1, 2), (4, 4), (7, 4)),
    )
    with attention.paged(inner), layers.replaced(inner, kinds, options), watched:
        for tokens, numbers, counts, contexts in chunks:
            at = [np.arange(end - count, end) for count, end in zip(counts, contexts, strict=True)]
            positions = np.concatenate([x + rows.starts[number] for x, number in zip(at, numbers, strict=True)])
            slots = np.concatenate([x + (number + 1) * BLOCK for x, number in zip(at, numbers, strict=True)])
            tables, cu_queries, ends = (
                torch.tensor(x, dtype=torch.int32, device=device)
                for x in ([[number + 1] for number in numbers], np.cumsum([0, *counts]), contexts)
            )
            batch = PagedBatch.of(tables, cu_queries, ends)
            step = attention.Step(caches, batch, torch.tensor(slots, device=device), new_cache, rows.windows)
            with attention.using(step):
                places = torch.tensor(positions, device=device).unsqueeze(0)
                out = trunk(inner)(input_ids=tokens.unsqueeze(0), position_ids=places, use_cache=False)
            states.append(out.last_hidden_state[0])
    return torch.cat(states), step
