"""What a machine can do, and how busy it is."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from rlhf_fast import machine as rates


def test_limits_are_measured_once_and_products_take_as_long_as_they_say() -> None:
    limits = rates.measured(torch.device("cpu"), torch.float32)
    assert limits is rates.measured(torch.device("cpu"), torch.float32)
    a = torch.randn(768, 768)
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    reached = 20 * 2 * 768**3 / (time.perf_counter() - started)
    assert 0.05 < reached / limits.product < 20  # whatever else the machine is doing
    assert 1e8 < limits.read < 1e13


def test_a_cpu_is_busy_while_it_computes_and_not_while_it_waits() -> None:
    with rates.Busy(torch.device("cpu")) as waiting:
        time.sleep(0.3)
    with rates.Busy(torch.device("cpu")) as computing:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            torch.randn(300, 300) @ torch.randn(300, 300)
    assert waiting.share is not None and computing.share is not None
    assert waiting.share < 0.05 < computing.share


def test_a_gpu_is_as_busy_as_its_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 40)
    with rates.Busy(torch.device("cuda")) as busy:
        time.sleep(0.5)
    assert busy.share == pytest.approx(0.4)

    def unknown(device: Any) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", unknown)
    with rates.Busy(torch.device("cuda")) as busy:
        time.sleep(0.3)
    assert busy.share is None
