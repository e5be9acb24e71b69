"""The optimiser of all trainers, with its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rlhf_fast.config import OptimConfig


class Optimizer:
    """AdamW over the trainable parameters of some modules, with clipping and a schedule over `total_steps`."""

    def __init__(self, modules: Sequence[nn.Module], config: OptimConfig, total_steps: int) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameter; pass it through models.trainable first")
        self.config = config
        self.adam = torch.optim.AdamW(
            self.parameters, lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, learning_rate_factor(config, total_steps))

    @property
    def lr(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self) -> float:
        """Apply the accumulated gradients; returns their norm before clipping.

        Raises:
            FloatingPointError: the gradient is not finite. The weights are as before.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is {norm}; lower optim.lr, or look at the data of this step")
        self.adam.step()
        self.schedule.step()
        self.adam.zero_grad(set_to_none=True)
        return norm


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
