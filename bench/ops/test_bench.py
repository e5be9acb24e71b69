"""pytest-benchmark's view of the same benches, ours alone: ``pytest bench/ops``. Nothing here asserts a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import Bench, Case, benches, check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    (bench, case) for bench in benches("ops") for case in (bench.gpu_cases if DEVICE.type == "cuda" else bench.cases)
]


@pytest.mark.parametrize(("bench", "case"), CASES, ids=lambda x: x.op if isinstance(x, Bench) else str(x))
def test_ours(benchmark: Any, bench: Bench, case: Case) -> None:
    providers = bench.providers(case, DEVICE)
    ours = next(iter(providers))
    assert ours in check(bench, case, {ours: providers[ours], bench.truth: providers[bench.truth]})
    benchmark.group = bench.op
    benchmark.pedantic(providers[ours], rounds=5, warmup_rounds=1)
