"""Activations that are computed again for the gradient instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_fast.models.forward import unwrapped
from rlhf_fast.models.packed_attention import packed, segments_of_now


def recompute_activations(model: nn.Module) -> None:
    """Keep only each decoder layer's input from now on. Unlike transformers' own switch it needs no training mode, in
    which dropout would act.

    Raises:
        ValueError: a model without layers that transformers marks as such.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"optim.checkpointing: {type(model).__name__} has no layers that can be computed again; unset it"
        )
    for layer in layers:
        layer.forward = functools.partial(_kept_in_part, unwrapped(model), layer.forward)


def _kept_in_part(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    segments = segments_of_now()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts of the forward pass and of the second, when the row is no longer the one being computed."""
        return nullcontext(), packed(model, segments) if segments else nullcontext()

    # Nothing in a layer is random, so no state of a generator has to come back.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)
