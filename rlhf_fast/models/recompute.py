"""Activations that are computed again for the gradient instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_activations(model: nn.Module) -> None:
    """From now on every decoder layer keeps its input alone. Unlike transformers' own switch it needs no training mode,
    in which dropout would act.

    Raises:
        ValueError: a model without layers that transformers marks as such.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"optim.checkpointing: {type(model).__name__} has no layers that can be computed again; unset it"
        )
    for layer in layers:
        layer.forward = functools.partial(_again, layer.forward)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing in a layer is random, so no state of a generator has to come back.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
