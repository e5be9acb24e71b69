"""Every column of metrics.jsonl of the trainers that go through fit, against plain models and formulas in float64.

Step n's figures are of the weights before it, which the checkpoint of step n - 1 has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, RewardConfig, RunConfig, SFTConfig
from rlhf_fast.data.batches import Example
from rlhf_fast.data.pairs import PairGroup, epoch_batches_by_pairs
from rlhf_fast.models.checkpoint import read_extra
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.statistics.intervals import clustered_share
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.loop.steps import epoch_batches
from rlhf_fast.trainers.reward import RewardTrainer, poisson_weight
from rlhf_fast.trainers.sft import SFTTrainer

# Several micro-batches a step, gradients that are clipped, a rate that is another in every step.
OPTIM = OptimConfig(lr=4e-3, schedule="linear", warmup=0.4, max_grad_norm=0.1, max_tokens_per_microbatch=16)
COMMON: dict[str, Any] = {
    "lora": LoRAConfig(r=0),
    "optim": OPTIM,
    "epochs": 2,
    "batch_size": 3,
    "heldout": 0.3,
    "run": RunConfig(save_every=1, keep_last=99),
}
RATES = [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]  # of 6 steps, of which 40 % are to warm up
ROWS = [{"prompt": f"say {letter}", "completion": letter * (1 + i % 4)} for i, letter in enumerate("abcdefghij")]
PAIRS: list[dict[str, Any]] = [
    {"prompt": f"q{i}", "chosen": "ab" * (1 + i % 3), "rejected": "c" * (2 + i % 5), "margin": 0.2 * (i % 2),
     "confidence": (1.0, 0.8)[i % 2]}
    for i in range(10)
]  # fmt: skip
PAIRS += [{"prompt": "q4", "chosen": "ab", "rejected": other} for other in ("d", "de")]  # of one held-out prompt three
Figures = dict[str, torch.Tensor]
Sides = list[Any]  # of each comparison, its two responses among others


@torch.no_grad()
def far_apart(trainer: Any, scale: float = 0.05) -> None:
    """Noise on the weights, so that there is something to tell apart from a model that knows nothing."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trainer.model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def logs(out: Path) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The rows of steps, and those of evaluations by their step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row for row in rows if any(name.startswith("heldout_") for name in row)}
    return [row for row in rows if "loss" in row], measured


def compare(
    out: Path,
    trained: set[str],
    auto: Any,
    batches: list[Any],
    of_step: Callable[[Any, Any], Figures],
    of_heldout: Callable[[Any], dict[str, float]],
    noise: Collection[str] = (),
) -> None:
    """All columns of all rows of a run whose checkpoint of step 0 is its start, where `noise` are not told."""
    steps, measured = logs(out)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6] and list(measured) == [0, 1, 2, 3, 4, 5, 6]
    for n in range(7):
        model = auto.from_pretrained(out / "checkpoints" / f"step-{n}").double().eval()
        with torch.no_grad():
            expected = of_heldout(model)
        same(measured[n], expected, noise if n == 0 else (), rel=1e-4)
        if n == 6:
            break
        found = of_step(model, batches[n])
        found["loss"].backward()
        gradients = [p.grad for name, p in model.named_parameters() if name in trained and p.grad is not None]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        assert norm > OPTIM.max_grad_norm
        expected = {name: float(value.detach()) for name, value in found.items()}
        expected |= {"lr": OPTIM.lr * RATES[n], "grad_norm": norm}
        same(steps[n], expected, noise if n == 0 else (), rel=2e-4)


def same(row: dict[str, Any], expected: dict[str, float], noise: Collection[str], rel: float) -> None:
    assert row.keys() == expected.keys() | {"step", "seconds"}
    told = [name for name in expected if name not in noise]
    assert {name: row[name] for name in told} == pytest.approx(
        {name: expected[name] for name in told}, rel=rel, abs=2e-5
    )


def start_of(trainer: Any, out: Path) -> set[str]:
    """Keep the model that training starts from as step 0; returns the names of what is trained."""
    models.save(out.parent / "start", trainer.model, trainer.tokenizer)
    return {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def put_start(out: Path) -> None:
    (out.parent / "start").rename(out / "checkpoints" / "step-0")


def test_of_supervised_fine_tuning(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = SFTTrainer(tiny_folder, ROWS, out, SFTConfig(**COMMON, samples=0))
    far_apart(trainer)
    trained = start_of(trainer, out)
    trainer.train()
    put_start(out)

    def loss(model: Any, demonstrations: list[Any]) -> torch.Tensor:
        terms = []
        for (conversation,) in demonstrations:
            logp = torch.log_softmax(model(input_ids=torch.tensor([conversation.input_ids])).logits[0], -1)
            which = [i for i, learned in enumerate(conversation.loss_mask) if learned]
            terms += [-logp[i - 1, conversation.input_ids[i]] for i in which]
        return torch.stack(terms).mean()  # of all tokens: a long answer counts for more than a short one

    def heldout(model: Any) -> dict[str, float]:
        value = float(loss(model, trainer.heldout))
        return {"heldout_loss": value, "heldout_perplexity": math.exp(value)}

    batches = epoch_batches(trainer.training, 3, 2, 0)
    compare(out, trained, AutoModelForCausalLM, batches, lambda model, batch: {"loss": loss(model, batch)}, heldout)
    lengths = [[of[0].learned for of in batch] for batch in batches]
    assert any(len(set(batch)) > 1 for batch in lengths)
    summary = json.loads((out / "result.json").read_text())["summary"]
    _, measured = logs(out)
    assert summary == {
        "demonstrations": 7,
        "heldout": 3,
        **{name: measured[6][name] for name in ("heldout_loss", "heldout_perplexity")},
        **{f"{name}_before": measured[0][name] for name in ("heldout_loss", "heldout_perplexity")},
    }


def test_of_direct_preference_optimisation(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = DPOTrainer(tiny_folder, PAIRS, out, DPOConfig(**COMMON, beta=0.3, label_smoothing=0.1))
    far_apart(trainer)
    trained = start_of(trainer, out)
    trainer.train()
    put_start(out)
    reference = AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step-0").double().eval()

    def logprob(model: Any, example: Example) -> torch.Tensor:
        ids = torch.tensor([[*example.prompt, *example.response]])
        logp = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        places = torch.arange(len(example.prompt) - 1, ids.shape[1] - 1)
        return logp[places, torch.tensor(example.response)].sum()

    def figures(model: Any, groups: list[PairGroup]) -> Figures:
        pairs: Sides = [
            (*(0.3 * (logprob(model, side) - logprob(reference, side).detach()) for side in sides), m, c)
            for group in groups
            for (_, *sides), m, c in zip(group.sides(), group.margins, group.confidences, strict=True)
        ]
        chosen, rejected = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
        margins, sure = (torch.tensor([pair[i] for pair in pairs]).double() for i in (2, 3))

        def of(x: torch.Tensor) -> torch.Tensor:
            return 0.9 * softplus(-x) + 0.1 * softplus(x)

        apart = chosen - rejected - margins
        difference = (chosen - rejected).detach()
        return {
            "loss": (sure * of(apart) + (1 - sure) * of(-apart)).mean(),
            "accuracy": (difference > 0).double().mean(),
            "margin": difference.mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
        }

    def heldout(model: Any) -> dict[str, float]:
        found = figures(model, trainer.heldout)
        return {f"heldout_{name}": float(found[name]) for name in ("loss", "accuracy", "margin")}

    batches = epoch_batches_by_pairs(trainer.training, 3, 2, 0)
    # As long as the policy is the reference all pairs are ties but for rounding, and it is rounding that agrees.
    noise = {"accuracy", "heldout_accuracy"}
    compare(out, trained, AutoModelForCausalLM, batches, figures, heldout, noise)


@pytest.mark.parametrize("heads", [1, 3])
def test_of_a_reward_model(heads: int, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = RewardTrainer(tiny_folder, PAIRS, out, RewardConfig(**COMMON, heads=heads, lcb=0.7, center_coef=0.05))
    far_apart(trainer)
    trained = start_of(trainer, out)
    trainer.train()
    put_start(out)

    def scores(model: Any, examples: list[Example]) -> torch.Tensor:
        ids = [torch.tensor([[*example.prompt, *example.response]]) for example in examples]
        return torch.cat([model(input_ids=each).logits for each in ids])  # (B, K)

    def bound(by_head: torch.Tensor) -> torch.Tensor:
        return by_head.mean(1) - 0.7 * by_head.std(1, correction=0)

    def agreement(difference: torch.Tensor) -> torch.Tensor:
        return (difference.detach() > 0).double()

    def figures(model: Any, groups: list[PairGroup]) -> Figures:
        sides: Sides = [side for group in groups for side in group.sides()]
        chosen, rejected = (scores(model, [side[i] for side in sides]) for i in (1, 2))
        margins, sure = (
            torch.tensor([x for group in groups for x in getattr(group, name)]).double()[:, None]
            for name in ("margins", "confidences")
        )
        times = torch.ones(len(sides), heads)
        if heads > 1:
            times = torch.tensor([[poisson_weight(0, head, side[0]) for head in range(heads)] for side in sides])
        x = chosen - rejected - margins
        terms = -sure * logsigmoid(x) - (1 - sure) * logsigmoid(-x) + 0.05 * (chosen + rejected) ** 2
        return {"loss": (times * terms).mean(), "accuracy": agreement(bound(chosen) - bound(rejected)).mean()}

    def heldout(model: Any) -> dict[str, float]:
        sides: Sides = [side for group in trainer.heldout for side in group.sides()]
        chosen, rejected = (bound(scores(model, [side[i] for side in sides])) for i in (1, 2))
        share = clustered_share(agreement(chosen - rejected).numpy(), [side[0] for side in sides])
        found = {"heldout_accuracy": share.mean, "heldout_accuracy_low": share.low, "heldout_accuracy_high": share.high}
        if heads > 1:
            by_head = scores(model, [example for group in trainer.heldout for example in group.examples])
            spread = float(by_head.std(1, correction=0).mean() / bound(by_head).std(correction=0))
            found["heldout_disagreement"] = spread
        return found

    batches = epoch_batches_by_pairs(trainer.training, 3, 2, 0)
    compare(out, trained, AutoModelForSequenceClassification, batches, figures, heldout)


@pytest.mark.parametrize(("heads", "lr"), [(1, 2e-3), (3, 3e-4)])
def test_a_reward_model_of_an_earlier_step_tells_that_steps_figures(
    heads: int, lr: float, tiny_folder: Path, tmp_path: Path
) -> None:
    """Not those of the last one, which was worse: in result, report, samples, and in the checkpoint that PPO reads."""
    config = RewardConfig(
        **{**COMMON, "patience": 2, "epochs": 5, "optim": OptimConfig(lr=lr, schedule="constant", warmup=0.0)},
        heads=heads,
    )
    against = [{"prompt": "x" + row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    trainer = RewardTrainer(tiny_folder, PAIRS, tmp_path, config, heldout_data=against)
    far_apart(trainer, 0.1)
    result = trainer.train()
    _, measured = logs(tmp_path)
    best, last = int(result["checkpoint"].removeprefix("step-")), max(measured)
    expected = {end or "mean": measured[best][f"heldout_accuracy{end and '_'}{end}"] for end in ("", "low", "high")}
    assert best == last - 2 > 0 and expected["mean"] > measured[last]["heldout_accuracy"]
    report = json.loads((tmp_path / "reward_report.json").read_text())
    assert result["summary"]["heldout_accuracy"] == report["accuracy"] == expected
    assert result["summary"]["heldout_accuracy_before"] == measured[0]["heldout_accuracy"]

    folder = tmp_path / "checkpoints" / f"step-{best}"
    extra = read_extra(folder)
    assert extra["heldout_agreement"] == expected
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    examples = [example for group in trainer.heldout for example in group.examples]
    with torch.no_grad():
        by_head = torch.cat([model(input_ids=torch.tensor([[*e.prompt, *e.response]])).logits for e in examples])
    scores = by_head.mean(1) - by_head.std(1, correction=0)
    scale = {"score_mean": float(scores.mean()), "score_std": float(scores.std(correction=0))}
    for place in (result["summary"], extra):
        assert {name: place[name] for name in scale} == pytest.approx(scale, rel=1e-4)
    assert {f"score_{name}": report["scores"][name] for name in ("mean", "std")} == pytest.approx(scale, rel=1e-4)
    reward = RewardModel(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        found = reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert found == pytest.approx([row["chosen_score"], row["rejected_score"]], abs=2e-4)
    assert sum(row["chosen_score"] > row["rejected_score"] for row in rows) / len(rows) == expected["mean"]
