"""docs/losses.md: what other trainers compute, as arithmetic, beside the call that gives the same here."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops

PAGE = Path(__file__).parents[3] / "docs" / "losses.md"
ROW = re.compile(r"^\| (?P<source>[^|]+) \| `(?P<theirs>[^|]+)` \| `(?P<ours>[^|]+)` \|$", re.MULTILINE)
ROWS = [match.groupdict() for match in ROW.finditer(PAGE.read_text())]


def rows(*given: tuple[float, ...]) -> Tensor:
    return torch.tensor(given, dtype=torch.float64)


NAMES: dict[str, Any] = {
    "ops": ops,
    "t": lambda *x: torch.tensor(x, dtype=torch.float64),
    "log": lambda *x: torch.tensor(x, dtype=torch.float64).log(),
    "rows": rows,
    "flags": lambda *x: rows(*x).bool(),
    "starts": lambda *x: torch.tensor(x),
    "labels": lambda *x: torch.tensor(x),
    "ln": math.log,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "mean": lambda *x: sum(x) / len(x),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


def test_the_page_is_read_whole() -> None:
    tables = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and "`" in line]
    assert len(tables) == len(ROWS) > 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["source"][:60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["reference", "kernels"])
def test_gives_what_they_give(row: dict[str, str], dtype: torch.dtype) -> None:
    def narrowed(make: Any) -> Any:
        return lambda *x: make(*x).to(dtype)

    names = {**NAMES, **{name: narrowed(NAMES[name]) for name in ("t", "log", "rows")}}
    theirs, ours = eval(row["theirs"], dict(NAMES)), eval(row["ours"], names)
    assert float(ours) == pytest.approx(theirs, rel=1e-12 if dtype == torch.float64 else 2e-6)
