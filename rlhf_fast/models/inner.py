"""Access the parts of a transformers model, whatever its family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

FAILURES = (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError)  # of models

_MEASURED = "_rlhf_fast_measured"

Found = TypeVar("Found")


def trunk(inner: Any) -> Any:
    """Return the part of a transformers model that computes its hidden states; the model itself where there is none."""
    if inner.base_model is not inner:
        return inner.base_model
    return next((part for name in ("model", "transformer") if (part := getattr(inner, name, None))), inner)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a block; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_near(got: torch.Tensor, want: torch.Tensor, half: float) -> bool:
    """Return whether tensors are the same up to rounding, which in dtypes of two bytes is `half` of their norm."""
    loose = 1e-4 if want.dtype == torch.float32 else half
    return bool((got.float() - want.float()).norm() <= loose * want.float().norm())


def measured_once(inner: Any, name: str, measure: Callable[[Any], Found]) -> Found:
    """Keep what `measure` finds of a model with it and with its copies, and with nothing that is saved of it."""
    kept = vars(inner).setdefault(_MEASURED, {})
    if name not in kept:
        kept[name] = measure(inner)
    measured: Found = kept[name]
    return measured


def forget_measures(inner: Any) -> None:
    """Forget what was measured of a model that may have been changed since."""
    vars(inner).pop(_MEASURED, None)
