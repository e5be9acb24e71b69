"""Layers with fewer launches, for models whose products are left to torch (on a GPU, or not in float32).

A norm is one launch, and attention takes queries and keys as their products leave them: one launch rotates and writes
them, two attend. transformers takes twenty and more for the same. What serves is found by computing each layer both
ways in float32, where a difference cannot hide behind rounding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rlhf_fast.ops.paged_attention import MOST_DIM, paged_attention, write_kv
from rlhf_fast.rollout.model import attention

Forward = Callable[..., Any]
Options = dict[int, attention.Options]
Calls = dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], attention.Step]]  # what layers were called with
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def norm(module: Any, options: Options) -> Forward | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(eps, float)
    if not is_norm or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    return lambda x: nn.functional.rms_norm(x, weight.shape, weight, eps)


def in_heads(x: torch.Tensor, dim: int, norm: Any) -> torch.Tensor:
    """x (N, heads * dim) as (N, heads, dim), each head through its norm, or all together."""
    whole = norm is not None and getattr(norm, "weight", x).shape[-1] != dim
    x = (norm(x) if whole else x).view(len(x), -1, dim)
    return x if norm is None or whole else norm(x)


def attend(module: Any, options: Options) -> Forward | None:
    layer, dim = getattr(module, "layer_idx", None), getattr(module, "head_dim", None)
    projections: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
    if layer not in options or not isinstance(dim, int) or dim > MOST_DIM or None in projections:
        return None
    of_query, of_key, of_value, of_output = projections
    norms, option = [getattr(module, name, None) for name in ("q_norm", "k_norm")], options[layer]

    def forward(hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> tuple[torch.Tensor, None]:
        step, states = attention.current(), hidden_states[0]  # (N, H)
        queries, keys = in_heads(of_query(states), dim, norms[0]), in_heads(of_key(states), dim, norms[1])
        cos, sin = (x[0].to(keys.dtype) for x in position_embeddings)  # (N, dim)
        cache = step.cache(layer, keys.shape[1], dim, keys)
        write_kv(cache, keys, of_value(states).view(keys.shape), step.slots, cos=cos, sin=sin, query=queries)
        out = paged_attention(queries, cache, step.batch, **vars(option))
        return of_output(out.view(len(states), -1)).unsqueeze(0), None

    return forward


KINDS: dict[str, Callable[[Any, Options], Forward | None]] = {"torch norm": norm, "torch attention": attend}


@contextlib.contextmanager
def watched(model: nn.Module, calls: Calls) -> Iterator[None]:
    """Note what each norm and attention is first called with."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs, attention.current()))

    kinds = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") or hasattr(m, "q_proj")]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in kinds]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def that_serve(calls: Calls, options: Options) -> tuple[str, ...]:
    """The kinds of which each layer computes here what it computes by itself."""
    return tuple(kind for kind in KINDS if all(_serves(kind, module, *call, options) for module, call in calls.items()))


def _serves(
    kind: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], step: attention.Step, options: Options
) -> bool:
    if KINDS[kind](module, options) is None:
        return True  # it stays as it is
    own = copy.deepcopy(module).float()
    ours = KINDS[kind](own, options)
    assert ours is not None
    outputs = []
    with contextlib.suppress(ValueError, TypeError, AttributeError, RuntimeError, IndexError):  # not that layer
        for forward in (own, ours):
            with attention.using(attention.Step({}, step.batch, step.slots, step.new_cache, step.windows)):
                out = forward(*_float(args), **_float(kwargs))
            outputs.append(out[0] if isinstance(out, tuple) else out)
    if len(outputs) < 2 or outputs[0].shape != outputs[1].shape:
        return False
    return torch.allclose(outputs[1], outputs[0], rtol=0, atol=1e-4 * float(outputs[0].abs().max()))


def _float(x: Any) -> Any:
    """The tensors in float32, wherever they are."""
    if isinstance(x, torch.Tensor):
        return x.float() if x.is_floating_point() else x
    if isinstance(x, tuple | list):
        return tuple(_float(each) for each in x)
    return {key: _float(each) for key, each in x.items()} if isinstance(x, dict) else x
