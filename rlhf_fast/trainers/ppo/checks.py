"""Checks that a run of PPO must pass to go on: in its first step, whatever the model and the data, and after each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlhf_fast.trainers.loop.monitor import Step, Stop

# How far the first update may be from exact. In float32 micro-batches differ only in the order of sums; in bfloat16 a
# state rounds to 8 bits, which differ with the shape of the batch, so that single tokens may be anywhere near.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_start(kl: torch.Tensor, dtype: torch.dtype) -> None:
    """Require that the policy is its reference before the first update."""
    distance = kl.abs().max() if dtype == torch.float32 else kl.abs().mean()
    if not float(distance) <= TOLERANCE[dtype]:
        _raise_if([f"KL to the reference {float(distance):.2e} instead of 0"])


def check_first_update(stats: dict[str, float], dtype: torch.dtype) -> None:
    """Require that every ratio is 1 in the first update: else sampling and training disagree on the model."""
    wrong = []
    exact = dtype == torch.float32
    for name, expected in (("ratio_mean", 1.0), ("approx_kl", 0.0), *([("ratio_max", 1.0)] if exact else [])):
        if name in stats and not abs(stats[name] - expected) <= TOLERANCE[dtype]:
            wrong.append(f"{name} {stats[name]:.6f} instead of {expected}")
    if exact and stats.get("clip_fraction", 0.0) != 0.0:
        wrong.append(f"clip_fraction {stats['clip_fraction']} instead of 0")
    if not math.isfinite(stats.get("explained_variance", 0.0)):
        wrong.append(f"explained_variance {stats['explained_variance']}")
    _raise_if(wrong)


@dataclass(frozen=True)
class KLLimit:
    """Monitor that ends a run after a step whose samples are further from the reference than `ppo.max_kl`."""

    nats: float

    def __call__(self, step: Step) -> Stop | None:
        kl = step.metrics["kl"]
        return None if kl <= self.nats else Stop(f"kl {kl:.3f} is above ppo.max_kl = {self.nats}")


def _raise_if(wrong: list[str]) -> None:
    if wrong:
        raise RuntimeError(
            f"PPO's first update is not what it must be: {'; '.join(wrong)}; sampling and training disagree on this "
            "model, so that PPO would learn from wrong ratios: please report it"
        )
