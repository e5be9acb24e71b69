from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


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


def test_a_method_of_ones_own_fits_on_a_page_and_learns(tiny_folder: Path, tmp_path: Path) -> None:
    """The first update is plain policy gradient, so its gradient is that of the loss without ratio or clip."""
    custom = example("custom_method")
    custom.main([str(tmp_path / "run"), "--model", str(tiny_folder), "--steps", "2", "--tokens", "6"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["ratio_mean"] == pytest.approx(1.0, abs=0.05) and rows[0]["grad_norm"] > 0
    assert len((EXAMPLES / "custom_method.py").read_text().splitlines()) < 90

    torch.manual_seed(0)
    states, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    tokens, signs = torch.tensor([1, 6, 2, 0, 3]), torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    logprobs = torch.log_softmax(states @ weight.T, -1).gather(1, tokens[:, None])[:, 0]
    words = {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "clip_low": 0.1, "clip_high": 0.1}
    loss, stats = custom.gspo(states, weight, tokens, logprobs.detach(), signs, denominator=10, **words)
    (got,) = torch.autograd.grad(loss, states)
    (want,) = torch.autograd.grad(-(signs * logprobs).sum() / 10, states)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert float(stats["ratio_mean"]) == pytest.approx(0.5) and float(stats["clip_fraction"]) == 0.0


def test_human_comparisons_train_a_reward_model_and_dpo(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"chosen": f"\n\nHuman: q{i}\n\nAssistant: yes", "rejected": f"\n\nHuman: q{i}\n\nAssistant: no, not now"}
        for i in range(30)
    ]
    rows.append({"chosen": "\n\nHuman: q\n\nAssistant: " + "y" * 99, "rejected": "\n\nHuman: q\n\nAssistant: no"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(tmp_path / "data.jsonl"), str(tmp_path / "runs"), "--model", str(tiny_folder), "--max-tokens", "90"]
    example("hh").main(words)
    said = capsys.readouterr().out
    assert "30 of 31 comparisons" in said and "reward {" in said and "dpo {" in said
    assert (tmp_path / "runs" / "dpo" / "result.json").exists()
