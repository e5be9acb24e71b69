"""Whether a model can be served from blocks of keys and values, and by which of the faster layers: by trying."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_fast.models.forward import evaluating
from rlhf_fast.ops.paged_attention import KVCache, PagedBatch
from rlhf_fast.rollout import attention, layers, torch_layers

BLOCK = 16
PROMPTS = (5, 7)  # tokens of two sequences; the second comes in two chunks


@dataclass(frozen=True)
class Served:
    """How a model is served."""

    caches: dict[int, tuple[int, int, torch.Tensor]]  # each layer's kv heads, dim, and a tensor of its dtype
    options: dict[int, attention.Options]  # each layer's attention
    faster: tuple[str, ...]  # kinds of layers that are replaced

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, in all layers."""
        return sum(2 * heads * -(-dim // 16) * 16 * like.itemsize for heads, dim, like in self.caches.values())


def probe(inner: Any, device: torch.device, fast: bool = True) -> Served:
    """Compute two short sequences with and without blocks.

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
    want = _plain(inner, ids)
    calls: torch_layers.Calls = {}
    try:
        got, step = _in_blocks(inner, ids, (), {}, calls)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        raise ValueError(f"model: {name} cannot be served from paged keys and values: {error}") from error
    expected, asked = inner.config.get_text_config().num_hidden_layers, sorted(step.options)
    if len(asked) != expected or not _same(got, want):
        raise ValueError(
            f"model: {name} cannot be served from paged keys and values: {len(asked)} of its {expected} layers attend "
            f"through transformers' interface{'' if _same(got, want) else ', and its states come out different'} "
            "(state-space layers, compressed or shared caches and attention biases are not supported)"
        )
    caches = {layer: (c.keys.shape[1], c.dim, c.keys[:0]) for layer, c in step.caches.items()}
    return Served(caches, step.options, _faster(inner, ids, got, step.options, calls) if fast else ())


@torch.no_grad()
def _faster(
    inner: Any, ids: torch.Tensor, want: torch.Tensor, options: dict[int, Any], calls: torch_layers.Calls
) -> tuple[str, ...]:
    """As many kinds of faster layers as give the same states; the most particular is the first to go."""
    with attention.paged(inner):
        kinds = layers.KINDS if layers.compiled_for(want) else torch_layers.that_serve(calls, options)
    for count in range(len(kinds), 0, -1):
        with contextlib.suppress(ValueError, TypeError, AttributeError, RuntimeError, IndexError):  # not that model
            if _same(_in_blocks(inner, ids, kinds[:count], options)[0], want):
                return kinds[:count]
    return ()


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    loose = 1e-4 if want.dtype == torch.float32 else 0.1
    return torch.allclose(got.float(), want.float(), rtol=0, atol=loose * float(want.abs().max()))


@torch.no_grad()
def _plain(inner: Any, ids: torch.Tensor) -> torch.Tensor:
    with evaluating(inner):
        states = [
            inner.base_model(input_ids=part.unsqueeze(0), use_cache=False).last_hidden_state[0]
            for part in ids.split(PROMPTS)
        ]
    return torch.cat(states)  # (N, H)


@torch.no_grad()
def _in_blocks(
    inner: Any,
    ids: torch.Tensor,
    kinds: tuple[str, ...],
    options: dict[int, Any],
    calls: torch_layers.Calls | None = None,
) -> tuple[torch.Tensor, attention.Step]:
    watched = contextlib.nullcontext() if calls is None else torch_layers.watched(inner, calls)

    def new_cache(layer: int, kv_heads: int, dim: int, like: torch.Tensor) -> KVCache:
        return KVCache.new(3, kv_heads, dim, BLOCK, like)

    first, second = ids.split(PROMPTS)
    caches: dict[int, KVCache] = {}
    states = []
    chunks = (  # tokens, counts, contexts, blocks
        (torch.cat([first, second[:3]]), (5, 3), (5, 3), (2, 1)),
        (second[3:], (4,), (7,), (1,)),
    )
    with attention.paged(inner), layers.replaced(inner, kinds, options), watched:
        for tokens, counts, contexts, blocks in chunks:
            at = np.concatenate([np.arange(end - count, end) for count, end in zip(counts, contexts, strict=True)])
            slots = np.repeat(blocks, counts) * BLOCK + at
            tables, cu_queries, ends = (
                torch.tensor(x, dtype=torch.int32, device=ids.device)
                for x in ([[b] for b in blocks], np.cumsum([0, *counts]), contexts)
            )
            batch = PagedBatch.of(tables, cu_queries, ends)
            step = attention.Step(caches, batch, torch.tensor(slots, device=ids.device), new_cache)
            with attention.using(step):
                positions = torch.tensor(at, device=ids.device).unsqueeze(0)
                out = inner.base_model(input_ids=tokens.unsqueeze(0), position_ids=positions, use_cache=False)
            states.append(out.last_hidden_state[0])
    return torch.cat(states), step
