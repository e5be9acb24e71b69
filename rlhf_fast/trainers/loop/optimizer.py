"""The optimiser of all trainers, with its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rlhf_fast.config import OptimConfig


class Optimizer:
    """AdamW over the trainable parameters of some modules, with clipping and a schedule over `total_steps`.

    Parameters narrower than float32 are updated through float32 copies, so that small updates add up.
    """

    def __init__(self, modules: Sequence[nn.Module], config: OptimConfig, total_steps: int) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameter; pass it through models.trainable first")
        self.config = config
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay)
        self.factor = learning_rate_factor(config, total_steps)
        self.steps = 0  # taken, or skipped
        self.skipped = 0  # in a row, because loss or gradient was not finite

    @property
    def lr(self) -> float:
        """Return the learning rate of the next step."""
        return self.config.lr * self.factor(self.steps)

    def step(self, loss: float = 0.0) -> float:
        """Apply the accumulated gradients of `loss`; returns their norm before clipping.

        Where loss or norm is not finite, the weights stay as they are and `skipped` says for how many steps in a row.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm))
        if math.isfinite(norm) and math.isfinite(loss):
            for group in self.adam.param_groups:
                group["lr"] = self.lr
            self.adam.step()
            self.show()
            self.skipped = 0
        else:
            self.skipped += 1
        self.steps += 1
        self.drop_gradients()
        return norm

    @torch.no_grad()
    def show(self) -> None:
        """Round the float32 copies into the model."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def drop_gradients(self) -> None:
        for parameter in (*self.parameters, *self.masters):
            parameter.grad = None


def learning_rate_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at each step: linear warm-up, then constant, linear or cosine to zero."""
    warmup = math.ceil(config.warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total_steps - warmup)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return factor
