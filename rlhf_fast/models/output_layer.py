"""Read what an output layer multiplies states by, whatever adapter of peft is on it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from rlhf_fast.models.inner import measured_once

LoRA = tuple[torch.Tensor, torch.Tensor, float]  # (r, H), (V, r), scaling


def product_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None, LoRA | None]:
    """(weight (V, H), bias (V,) or None, low-rank addition or None); gradients flow to what is trained.

    A copy that is trained in place of the layer is that copy, and LoRA stays the two factors that it is. Of other
    adapters (DoRA, IA3, LoKr, several at once) the weight is what the layer makes of unit vectors, which costs as much
    as reading H tokens, and is made anew each time.

    Raises:
        ValueError: hooks on the layer, which would not fire, as only its weights are read.
    """
    if heard(layer):
        raise ValueError(
            "model: its output layer has hooks, or a forward of its own, which would be passed over: the weight is "
            "multiplied by elsewhere; remove them, or put them on the layer before"
        )
    if isinstance(layer, ModulesToSaveWrapper):
        used = [name for name in layer.active_adapters if name in layer.modules_to_save]
        if used and not layer.disable_adapters:
            return product_of(layer.modules_to_save[used[0]])
        return product_of(layer.original_module)
    if not isinstance(layer, BaseTunerLayer):
        return layer.weight, getattr(layer, "bias", None), None
    base = layer.get_base_layer()
    used = [name for name in layer.active_adapters if _holds(layer, name)]
    if layer.disable_adapters or layer.merged or not used:
        return product_of(base)
    if type(layer) is lora.Linear and len(used) == 1 and used[0] not in layer.lora_variant:
        return _with_factors(layer, base, used[0])
    return _probed_by_unit_vectors(layer, base, used)


def heard(module: nn.Module) -> bool:
    """Return whether somebody listens to a module's calls, or has put another forward in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _holds(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, name) for name in layer.adapter_layer_names)


def _with_factors(layer: Any, base: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None, LoRA]:
    """Return weight, bias and factors in the dtype of the weight, whatever that of the factors."""
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name])
    weight, bias, _ = product_of(base)
    if b.bias is not None:
        addition = scaling * b.bias
        bias = addition.to(weight.dtype) if bias is None else (bias + addition).to(bias.dtype)
    return weight, bias, (a.weight.to(weight.dtype), b.weight.to(weight.dtype), scaling)


def _probed_by_unit_vectors(layer: Any, base: Any, used: list[str]) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """Return weight and bias as what the layer makes of unit vectors and of zeros."""
    like = base.weight
    units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)  # (H, H)
    nothing = layer(torch.zeros_like(units[:1]))  # (1, V)
    # A bias that is trained may be 0 now, so it is told by its name. Any other offset shows in the values, which are
    # looked at once: on a GPU each look waits for all that the device has to do.
    names = [name for name, _ in layer.named_parameters()]
    has_bias = any(name.endswith("bias") for name in names) or measured_once(
        layer, f"offset of {used} in {names}", lambda _: bool(torch.count_nonzero(nothing.detach()))
    )
    products = layer(units)  # (H, V)
    return ((products - nothing) if has_bias else products).T, nothing[0] if has_bias else None, None
