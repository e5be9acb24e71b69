"""Plots take a second a page, and every trainer leaves one: only tests/pages and the verbs draw them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlhf_fast.pages import plots


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)


@dataclass(frozen=True)
class Update:
    """A step as torch's optimiser is given it."""

    settings: dict[str, Any]  # lr, eps, weight_decay and the like
    weights: list[torch.Tensor]  # all that it trains
    gradients: list[torch.Tensor | None]  # after clipping

    @property
    def gradient(self) -> torch.Tensor:
        """Of all weights, as one vector; 0 where there is none."""
        pairs = zip(self.weights, self.gradients, strict=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs])

    def of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The gradient of one weight; None if it has none, or is not trained."""
        pairs = zip(self.weights, self.gradients, strict=True)
        return next((gradient for own, gradient in pairs if own is weight), None)


@contextlib.contextmanager
def recorded_updates() -> Iterator[list[Update]]:
    """Filled in with each step that an optimiser of torch takes meanwhile."""
    seen: list[Update] = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [None if weight.grad is None else weight.grad.detach().clone() for weight in weights]
        settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        seen.append(Update(settings, weights, gradients))

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture
def updates() -> Iterator[list[Update]]:
    with recorded_updates() as seen:
        yield seen
