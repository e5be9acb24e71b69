"""Faster ways through a model's own layers while it generates on a CPU in float32, with the parameters it has.

For the time of a generation, forward of a layer is replaced on that one object: linear layers (with their adapters),
RMS norms, gated MLPs (gate and up in one product), attention with rotated halves (queries, keys and values in one
product, rotation and writing in one launch), and whole layers of those. What a layer is, is found by looking at it;
that the model computes the same, by computing something (probe.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from rlhf_fast.models.adapters import Model
from rlhf_fast.models.forward import output_head
from rlhf_fast.models.output_layer import heard
from rlhf_fast.ops import compiled
from rlhf_fast.ops.compiled import Linear, PagedAttention
from rlhf_fast.ops.linear import Weight, rms_norm, usable
from rlhf_fast.ops.paged_attention import MOST_DIM
from rlhf_fast.rollout.model import attention, torch_layers

KINDS = ("linear", "norm", "mlp", "attention", "layer")
Forward = Callable[..., Any]
Options = dict[int, attention.Options]  # those that the attention of each layer was called with


def compiled_for(states: torch.Tensor) -> bool:
    """Return whether the kernels of these layers serve states such as these."""
    return compiled.cpu is not None and states.device.type == "cpu" and states.dtype == torch.float32


@contextlib.contextmanager
def replaced(model: nn.Module, kinds: tuple[str, ...], options: Options) -> Iterator[None]:
    """Replace the layers of these kinds."""
    done: list[nn.Module] = []
    inside: set[nn.Module] = set()  # of layers that are replaced as a whole, and call none of these
    try:
        listened = _listened(model)
        for module in model.modules():  # a layer comes before what is in it
            if module in inside or module in listened:
                continue
            forward = next((f for kind in kinds if (f := _FASTER[kind](module, options)) is not None), None)
            if forward is not None:
                module.forward = forward
                done.append(module)
                inside |= {inner for inner in module.modules() if not _is_norm(inner)}
        yield
    finally:
        for module in done:
            del module.forward


def _listened(model: nn.Module) -> set[nn.Module]:
    """Modules that cannot be replaced, since hooks of what is in them would not fire, or somebody else has replaced
    them."""
    modules: set[nn.Module] = set()
    for module in model.modules():
        inside = [inner for inner in module.modules() if inner is not module and heard(inner)]
        if inside or "forward" in vars(module):
            modules.add(module)
    return modules


def head(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output layer of a model: states (S, H) -> logits (S, V), in the dtype of its weight."""
    of = output_head(model)
    factors = () if of.lora is None else of.lora[:2]
    if not all(_fits(x) for x in (of.weight, *factors)) or not _is_plain(of.bias) or not _is_plain(*factors[1:]):
        return of.logits
    product = Linear([Weight(of.weight, of.bias, of.lora)])

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        logits = product(hidden.to(of.weight.dtype))[0]  # of a trunk that may be narrower
        if of.logit_scale != 1.0:
            logits *= of.logit_scale
        return of.softcap * torch.tanh(logits / of.softcap) if of.softcap else logits

    return logits


def _fits(x: torch.Tensor) -> bool:
    return usable(x) and x.dim() == 2 and x.stride(1) == 1


def _is_plain(x: torch.Tensor | None = None) -> bool:
    return x is None or (usable(x) and x.is_contiguous())


def _weights(module: Any, *names: str) -> list[Weight] | None:
    """Return what the linear layers of these names multiply by, or None if one is no plain linear layer."""
    weights = [_weight(getattr(module, name, None)) for name in names]
    return None if None in weights else weights  # type: ignore[return-value]


def _weight(layer: Any) -> Weight | None:
    adapter: Any = None
    if isinstance(layer, lora.Linear):
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters or layer.merged:
            names = []
        if len(names) > 1 or any(name in layer.lora_variant or layer.lora_bias[name] for name in names):
            return None
        if names:
            factors: list[Any] = [layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight]
            a, b = factors
            adapter = (a, b, float(layer.scaling[names[0]]))
            if not (_fits(a) and _fits(b) and _is_plain(b)):
                return None
        layer = layer.get_base_layer()
    if type(layer) is not nn.Linear or not _fits(layer.weight) or not _is_plain(layer.bias):
        return None
    return Weight(layer.weight, layer.bias, adapter)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear(module: nn.Module, options: Options) -> Forward | None:
    weight = _weight(module)
    if weight is None:
        return None
    product, columns = Linear([weight]), weight.weight.shape[0]
    return lambda x, *_, **__: product(_rows(x))[0].view(*x.shape[:-1], columns)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


_offsets: dict[type, float | None] = {}  # what a class adds to its weight; None for another kind of norm


def _norm(module: Any, options: Options) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if not _is_norm(module):
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float) or not usable(weight):
        return None
    kind = type(module)
    if kind not in _offsets:
        x = torch.linspace(-2.0, 3.0, 2 * weight.shape[0]).view(2, -1)
        with torch.no_grad():
            want = kind.forward(module, x)
            same = [o for o in (0.0, 1.0) if torch.allclose(rms_norm(x, weight, eps, o), want, rtol=1e-5, atol=1e-6)]
        _offsets[kind] = same[0] if same else None
    offset = _offsets[kind]
    return None if offset is None else lambda x: rms_norm(x, weight, eps, offset)


def _mlp_products(module: Any) -> tuple[Linear, Linear] | None:
    act = type(getattr(module, "act_fn", None)).__name__
    gate = {"SiLUActivation": 1, "SiLU": 1, "GELUTanh": 2, "PytorchGELUTanh": 2}.get(act)
    weights = _weights(module, "gate_proj", "up_proj", "down_proj")
    if gate is None or weights is None or len(list(module.children())) != 4:
        return None
    return Linear(weights[:2], gate), Linear(weights[2:])


def _mlp(module: Any, options: Options) -> Forward | None:
    products = _mlp_products(module)
    if products is None:
        return None
    gated, down = products
    return lambda x: down(gated(_rows(x))[0])[0].view(x.shape)


Attend = Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]


def _attend(module: Any, options: Options) -> Attend | None:
    """(states (N, H), (cos, sin), what is to be added) -> (N, H)."""
    layer, dim = getattr(module, "layer_idx", None), getattr(module, "head_dim", None)
    weights = _weights(module, "q_proj", "k_proj", "v_proj", "o_proj")
    if weights is None or layer not in options or not isinstance(dim, int) or dim > MOST_DIM:
        return None
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if any(norm is not None and getattr(norm, "weight", None) is None for norm in norms):
        return None
    inputs, output, kernels, option = Linear(weights[:3]), Linear(weights[3:]), PagedAttention("cpu"), options[layer]
    kv_heads = weights[1].weight.shape[0] // dim
    scale = dim**-0.5 if option.scale is None else option.scale

    def attend(states: torch.Tensor, rotation: Any, add: torch.Tensor | None) -> torch.Tensor:
        step = attention.current()
        query, key, value = inputs(states)
        queries, keys = (
            torch_layers.in_heads(x, dim, norm) for x, norm in zip((query, key), norms, strict=True)
        )  # (N, heads, dim)
        cache = step.cache(layer, kv_heads, dim, keys)
        cos, sin = (x[0].contiguous() for x in rotation)  # (N, dim)
        if cos.shape != (len(states), dim):
            raise ValueError(f"rotation of {cos.shape[-1]} of {dim} dimensions")
        kernels.write(cache, keys, value.view(keys.shape), step.slots, cos=cos, sin=sin, query=queries)
        kernels.forward(
            queries, cache, step.batch, scale=scale, softcap=option.softcap, window=option.window, sinks=option.sinks,
            out=query,  # each row's result goes where its query was
        )  # fmt: skip
        return output(query, add)[0]

    return attend


def _attention(module: Any, options: Options) -> Forward | None:
    attend = _attend(module, options)
    if attend is None:
        return None

    def forward(hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> tuple[torch.Tensor, None]:
        return attend(hidden_states[0], position_embeddings, None).unsqueeze(0), None

    return forward


def _layer(module: Any, options: Options) -> Forward | None:
    """A layer of attention and MLP, each behind its norm and beside a residual."""
    names = {name for name, _ in module.named_children()}
    if names != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    attend, products = _attend(module.self_attn, options), _mlp_products(module.mlp)
    first, second = _norm(module.input_layernorm, options), _norm(module.post_attention_layernorm, options)
    if attend is None or products is None or first is None or second is None:
        return None
    gated, down = products

    def forward(hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> torch.Tensor:
        x = hidden_states[0]  # (N, H)
        x = attend(first(x), position_embeddings, x)
        return down(gated(second(x))[0], x)[0].unsqueeze(0)

    return forward


_FASTER: dict[str, Callable[[Any, Options], Forward | None]] = {
    "linear": _linear,
    "norm": _norm,
    "mlp": _mlp,
    "attention": _attention,
    "layer": _layer,
    **torch_layers.KINDS,
}
