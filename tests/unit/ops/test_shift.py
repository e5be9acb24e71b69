"""Which token a row predicts: the caller shifts, the docstrings say so, and the example shows it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import ops

ROOT = Path(__file__).resolve().parents[3]
SHIFT = "The caller shifts: row t of a model's output predicts token t + 1"
ALIGNED = "Position t of every input is of the same predicted token"
SENTENCES = {
    "token_logprobs": SHIFT,
    "linear_token_logprobs": SHIFT,
    "cross_entropy": SHIFT,
    "linear_cross_entropy": SHIFT,
    "linear_ppo_loss": SHIFT,
    "linear_dpo_loss": SHIFT,
    "full_kl": ALIGNED,
    "kl_estimate": ALIGNED,
    "ppo_loss": ALIGNED,
    "gae": ALIGNED,
    "sequence_sum": ALIGNED,
    "dpo_loss": "summed over the tokens that the rows predict",
}
LINEAR: dict[str, Callable[..., Any]] = {
    "linear_token_logprobs": ops.linear_token_logprobs,
    "linear_cross_entropy": ops.linear_cross_entropy,
    "linear_ppo_loss": lambda h, w, t: ops.linear_ppo_loss(h, w, t, torch.zeros(t.shape), torch.zeros(t.shape)),
    "linear_dpo_loss": lambda h, w, t: ops.linear_dpo_loss(h, w, t, torch.zeros(1), torch.zeros(1)),
}


@pytest.mark.parametrize("op", SENTENCES)
def test_every_docstring_says_which_token_a_row_predicts(op: str) -> None:
    assert SENTENCES[op] in " ".join((getattr(ops, op).__doc__ or "").split())


@pytest.mark.parametrize("op", LINEAR)
def test_a_transposed_head_is_called_that(op: str) -> None:
    hidden, tokens = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    words = r"weight: shape \(8, 30\), which is \(H, V\) for hidden of \(2, 3, 8\); expected \(V, H\): give weight\.T"
    with pytest.raises(ValueError, match=words):
        LINEAR[op](hidden, torch.zeros(8, 30), tokens)
    LINEAR[op](hidden, torch.zeros(30, 8), tokens)


def test_the_example_shifts_and_gets_the_loss_of_transformers(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("shift", ROOT / "examples" / "shift.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(["--model", str(tiny_folder)])
    assert found["ours"] == pytest.approx(found["transformers"], abs=1e-5)
    assert found["from logits"] == pytest.approx(found["transformers"], abs=1e-5)
    assert abs(found["unshifted"] - found["transformers"]) > 1e-2
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "transformers",
        "ours",
        "from",
        "unshifted",
    ]
