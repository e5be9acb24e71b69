from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ppo_with_the_ops_is_plain_ppo_and_shorter() -> None:
    state = torch.get_rng_state()
    try:
        plain, fused = (list(example(name).train(steps=3)) for name in ("ppo_plain", "ppo_with_ops"))
    finally:
        torch.set_rng_state(state)
    for theirs, ours in zip(plain, fused, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    assert plain[2]["loss"] != plain[0]["loss"]
    lines = [len((EXAMPLES / f"{name}.py").read_text().splitlines()) for name in ("ppo_plain", "ppo_with_ops")]
    assert lines[1] < 0.75 * lines[0]


def test_sums_are_rewarded_by_a_rule_and_a_function(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verifiable = example("verifiable")
    assert verifiable.brief(["p"] * 3, ["", "x" * 100, "x" * 500]) == [1.0, 0.5, 0.0]
    verifiable.main([str(tmp_path / "run"), "--model", str(tiny_folder), "--steps", "1", "--tokens", "6"])
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["score"] == pytest.approx(row["score/math"] + 0.1 * row["score/brief"], abs=1e-9)
    assert "score" in capsys.readouterr().out
