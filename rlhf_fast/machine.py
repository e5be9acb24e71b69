"""Rates at which this machine reads and multiplies, the limits that utilisation is told against, and how busy it is."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceRates:
    """Rates of a device, measured."""

    read: float  # bytes a second
    product: float  # operations a second of a large matrix product in the dtype that was asked for


@functools.cache
def measured(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Measure the rates of a device; once in a process, in a fraction of a second."""
    x = torch.zeros(1 << (28 if device.type == "cuda" else 24), device=device)
    return DeviceRates(read=x.nbytes / _seconds(lambda: x.sum(), device), product=product_rate(device, dtype))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations a second of a large matrix product in this dtype."""
    n = 8192 if device.type == "cuda" else 1536
    a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=c), device)


class Busy:
    """Meter of the share of time in its context in which the device computed: of a CPU's threads their processor time,
    of a GPU what its driver says, asked five times a second. `share` is None where the driver cannot be asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.share: float | None = None
        self._seen: list[float] = []
        self._over = threading.Event()

    def __enter__(self) -> Busy:
        self._started, self._cpu = time.perf_counter(), time.process_time()
        self._asking = threading.Thread(target=self._ask, daemon=True)
        if self.device.type == "cuda":
            self._asking.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self._over.set()
            self._asking.join()
            self.share = statistics.fmean(self._seen) if self._seen else None
        else:
            passed = time.perf_counter() - self._started
            self.share = (time.process_time() - self._cpu) / passed / torch.get_num_threads()

    def _ask(self) -> None:
        while not self._over.wait(0.2):
            try:
                self._seen.append(torch.cuda.utilization(self.device) / 100)
            except Exception:  # no NVML, or one that this card does not answer
                return


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The middle one of a few, after one that warms up."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
