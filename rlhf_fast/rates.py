"""What this machine reads and multiplies a second: the limits that utilisation is told against."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceRates:
    read: float  # bytes a second
    product: float  # operations a second of a large matrix product in the dtype that was asked for


@functools.cache
def measured(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Measured once in a process, in a fraction of a second."""
    x = torch.zeros(1 << (28 if device.type == "cuda" else 25), device=device)
    return DeviceRates(read=x.nbytes / _seconds(lambda: x.sum(), device), product=product_rate(device, dtype))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product in this dtype."""
    n = 8192 if device.type == "cuda" else 1536
    a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=c), device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The middle one of a few, after one that warms up."""
    found = []
    for _ in range(6):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])
