"""Direct preference optimisation against its formula, and what it does to the policy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.data.pairs import join
from rlhf_fast.trainers.dpo import DPOTrainer, batch_logprobs

ROWS = [{"prompt": f"question {i}", "chosen": "aaa" + "c" * (i % 3), "rejected": "bbbbb"} for i in range(24)]


def trainer(folder: Path, out: Path, **options: object) -> DPOTrainer:
    return DPOTrainer(folder, ROWS, out, DPOConfig(lora=LoRAConfig(r=4), **options))  # type: ignore[arg-type]


def test_the_first_loss_is_ln_2(tiny_folder: Path, tmp_path: Path) -> None:
    """Policy and reference are the same at the start, whatever the pairs."""
    dpo = trainer(tiny_folder, tmp_path)
    dpo._score_with_reference()
    evaluated = dpo.evaluate()
    assert evaluated["heldout_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluated["heldout_margin"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    "labels, expected", [({"margin": 1.0}, math.log1p(math.e)), ({"margin": -1.0}, math.log1p(1 / math.e))]
)
def test_the_first_loss_is_that_of_the_margin_where_all_pairs_have_it(
    labels: dict[str, float], expected: float, tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [{**row, **labels} for row in ROWS[:8]]
    dpo = DPOTrainer(tiny_folder, rows, tmp_path, DPOConfig(lora=LoRAConfig(r=4)))
    dpo._score_with_reference()
    assert dpo.evaluate()["heldout_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
def test_the_loss_is_the_papers(loss: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Of h = (log pi_w - log ref_w) - (log pi_l - log ref_l), summed over response tokens in float64; of IPO means."""
    e = 0.1 if loss == "robust" else 0.0
    dpo = trainer(tiny_folder, tmp_path, beta=0.3, loss=loss, label_smoothing=e)
    dpo._score_with_reference()
    for name, parameter in dpo.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    reference, _ = models.load(tiny_folder)

    @torch.no_grad()
    def logprob(model: torch.nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
        table = torch.log_softmax(logits, -1)
        total = sum(float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(response))
        return total / len(response) if loss == "ipo" else total

    def of(x: float) -> float:
        """The loss of x = beta h."""
        plain = math.log1p(math.exp(-x))
        return {
            "sigmoid": plain,
            "robust": ((1 - e) * plain - e * math.log1p(math.exp(x))) / (1 - 2 * e),
            "hinge": max(0.0, 1 - x),
            "ipo": (x / 0.3 - 1 / 0.6) ** 2,
        }[loss]

    expected = []
    for group in dpo.heldout:
        pairs = join([group], "cpu")
        for w, l in zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True):
            h = [
                logprob(dpo.model, e.prompt, e.response) - logprob(reference, e.prompt, e.response)
                for e in (pairs.examples[w], pairs.examples[l])
            ]
            expected.append(of(0.3 * (h[0] - h[1])))
    assert dpo.evaluate()["heldout_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_training_prefers_the_chosen_and_leaves_metrics(tiny_folder: Path, tmp_path: Path) -> None:
    dpo = trainer(tiny_folder, tmp_path, epochs=3, optim=OptimConfig(lr=5e-3))
    result = dpo.train()
    assert result["summary"]["heldout_accuracy"] == 1.0
    assert result["summary"]["heldout_loss"] < 0.6
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0]
    policy, _ = models.load(tmp_path)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(policy(input_ids=ids).logits, dpo.model(input_ids=ids).logits)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
def test_margins_and_confidences_are_in_the_loss(loss: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Against the formula in float64, x being beta h less the margin: c times as it stands, 1 - c times the other way
    round. What is measured beside it is of the pairs as they stand. One micro-batch and many give the same."""
    e, beta = (0.1 if loss == "robust" else 0.0), 0.3
    rows = [{**row, "confidence": [1.0, 0.5, 0.8][i % 3], "margin": 0.4 * (i % 2)} for i, row in enumerate(ROWS[:9])]
    config = DPOConfig(lora=LoRAConfig(r=4), beta=beta, loss=loss, label_smoothing=e, heldout=0.3)  # type: ignore[arg-type]
    dpo = DPOTrainer(tiny_folder, rows, tmp_path, config)
    dpo._score_with_reference()
    for name, parameter in dpo.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
    pairs = join(dpo.training, "cpu")
    with torch.no_grad():
        now = batch_logprobs(dpo.config, dpo.model, pad(pairs.examples)).double()
    h = now - torch.tensor([dpo.reference_logprobs[example] for example in pairs.examples]).double()
    x, c = beta * (h[pairs.chosen] - h[pairs.rejected]), pairs.confidences.double()
    assert pairs.margins.any() and (c < 1).any() and float(x.abs().min()) > 1e-5  # no tie, in float32

    def of(x: torch.Tensor) -> torch.Tensor:
        plus, minus = torch.nn.functional.softplus(-x), torch.nn.functional.softplus(x)
        return {
            "sigmoid": plus,
            "robust": ((1 - e) * plus - e * minus) / (1 - 2 * e),
            "hinge": (1 - x).clamp(min=0),
            "ipo": (x / beta - 1 / (2 * beta)) ** 2,
        }[loss]

    apart = x - pairs.margins.double()
    expected = (c * of(apart) + (1 - c) * of(-apart)).mean()
    for tokens in (10_000, 1):
        dpo.budget.tokens = tokens
        parts = list(dpo._losses(dpo.training))
        assert (len(parts) == 1) == (tokens > 1)
        assert float(sum(part.detach() for part, _ in parts)) == pytest.approx(float(expected), rel=1e-4)
        means = {name: sum(float(stats[name]) for _, stats in parts) for name in ("accuracy", "margin")}
        assert means["margin"] == pytest.approx(float(x.mean()), abs=1e-5)  # of sums of some 30 nats in float32
        assert means["accuracy"] == pytest.approx(float((x > 0).double().mean()))


def test_a_guess_has_no_gradient_at_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    """Of a confidence of one half both orders pull alike."""
    rows = [{**row, "confidence": 0.5} for row in ROWS[:6]]
    dpo = DPOTrainer(tiny_folder, rows, tmp_path, DPOConfig(lora=LoRAConfig(r=4)))
    dpo._score_with_reference()
    for loss, _ in dpo._losses(dpo.training):
        loss.backward()
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-7 for p in dpo.model.parameters())
