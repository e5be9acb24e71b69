"""Gradients that must flow, against plain autograd through the model, and what no gradient may reach."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import models, ops
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig
from rlhf_fast.data.batches import Example
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.pipeline import tiny_model
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.ppo.advantages import Advantages, Scored
from rlhf_fast.trainers.ppo.sampler import Sampled
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from tests.unit.trainers.conftest import Update
from tests.unit.trainers.seen import collect

PROMPTS = [{"prompt": f"question {i}"} for i in range(4)]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes " * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(8)]
UNCLIPPED = OptimConfig(lr=1e-2, schedule="constant", warmup=0.0, max_grad_norm=math.inf)
RANKS = pytest.mark.parametrize("r", [0, 4], ids=["all weights", "adapter"])


def ppo(folder: Path, out: Path, r: int, advantage: Any = None, loss: Any = ops.linear_ppo_loss, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "steps": 1, "prompts_per_step": 4, "samples_per_prompt": 2, "epochs": 1, "minibatches": 1,
        "max_new_tokens": 8, "lora": LoRAConfig(r=r), "optim": UNCLIPPED,
    }  # fmt: skip
    config = PPOConfig(**{**settings, **more})
    return PPOTrainer(
        folder, lambda prompts, texts: [len(t) / 10 for t in texts], PROMPTS, out, config, advantage, loss
    )


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def states(model: Any, example: Example) -> torch.Tensor:
    """(T, H) that predict a response, by transformers alone."""
    inner = unwrapped(model)
    ids = torch.tensor([[*example.prompt, *example.response]])
    found: torch.Tensor = inner.model(input_ids=ids).last_hidden_state[0]
    return found[len(example.prompt) - 1 : -1]


def logprobs(model: Any, example: Example) -> torch.Tensor:
    """(T,) of a response, by transformers alone."""
    logits = unwrapped(model).lm_head(states(model, example))
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(example.response)[:, None]).squeeze(-1)


def assert_gradients(update: Update, model: Any, r: int, expected: dict[str, torch.Tensor | None]) -> None:
    """Of every weight, or of the adapter and a head beside it alone; to float32's rounding of the whole."""
    names = [n for n, _ in model.named_parameters() if r == 0 or "lora_" in n or "modules_to_save" in n]
    assert list(expected) == list(trained(model)) == names
    whole = torch.cat([g.flatten() for g in expected.values() if g is not None]).norm()
    assert whole > 0
    for name, weight in trained(model).items():
        wanted, got = expected[name], update.of(weight)
        difference = (0 if got is None else got) - (torch.zeros_like(weight) if wanted is None else wanted)
        assert float(difference.norm()) < 1e-4 * float(whole), name


def assert_none(update: Update, weights: Any) -> None:
    for weight in weights:
        gradient = update.of(weight)
        assert gradient is None or not gradient.any()


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor | None]:
    weights = trained(model)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))


# Policy and critic ----------------------------------------------------------------------------------------------------


def fixed(advantage: float, returns: float) -> Callable[..., Advantages]:
    """Of every other token that advantage, and of each these returns."""

    def function(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        own = advantage * (torch.arange(scored.kl.numel()) % 2)
        return Advantages(own, torch.full_like(scored.kl, returns), None)

    return function


@RANKS
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critics_loss_reaches_the_trunk_that_it_reads(
    critic: str, r: int, tiny_folder: Path, tmp_path: Path, nudge: Callable[..., None], updates: list[Update]
) -> None:
    """The policy's if that is shared, and nothing of the policy if it has its own. No advantage: the loss is its."""
    trainer = ppo(tiny_folder, tmp_path, r, fixed(0.0, 2.0), critic=critic, value_coef=0.5)
    nudge(trainer.critic.head, 0.1)
    examples = collect(trainer, 1, 0.0).examples
    reads = trainer.model if critic == "shared" else trainer.critic.model
    model, head = copy.deepcopy((reads, trainer.critic.head))
    values = torch.cat([head(states(model, example)).squeeze(-1) for example in examples])
    loss = 0.5 * 0.5 * (values - 2.0).square().mean()
    of_model, of_head = gradients(loss, model), torch.autograd.grad(loss_of_head(model, head, examples), head.weight)[0]
    trainer.train()
    (update,) = updates
    assert_gradients(update, reads, r, of_model)
    torch.testing.assert_close(update.of(trainer.critic.head.weight), of_head, rtol=1e-4, atol=1e-6)
    if critic == "separate":
        assert_none(update, trainer.model.parameters())


def loss_of_head(model: Any, head: Any, examples: list[Example]) -> torch.Tensor:
    values = torch.cat([head(states(model, example).detach()).squeeze(-1) for example in examples])
    return 0.5 * 0.5 * (values - 2.0).square().mean()


@RANKS
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_policys_loss_reaches_no_critic(
    critic: str, r: int, tiny_folder: Path, tmp_path: Path, nudge: Callable[..., None], updates: list[Update]
) -> None:
    trainer = ppo(tiny_folder, tmp_path, r, fixed(1.0, 2.0), critic=critic, value_coef=0.0)
    nudge(trainer.critic.head, 0.1)
    examples = collect(trainer, 1, 0.0).examples
    model = copy.deepcopy(trainer.model)
    found = torch.cat([logprobs(model, example) for example in examples])
    expected = gradients(-(found * (torch.arange(len(found)) % 2)).mean(), model)
    trainer.train()
    (update,) = updates
    assert_gradients(update, trainer.model, r, expected)
    assert_none(update, [p for module in trainer.critic.modules for p in module.parameters()])


@RANKS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_while_the_critic_warms_up_no_weight_of_the_policy_moves(
    critic: str, tied: bool, r: int, tmp_path: Path
) -> None:
    """Its output layer neither, whose weight the loss is given; nor by weight decay."""
    settings = tiny_model()
    settings.tie_word_embeddings = tied
    models.save(tmp_path / "model", *models.load(settings))
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup=0.0, weight_decay=0.5)
    trainer = ppo(tmp_path / "model", tmp_path / "run", r, steps=2, critic_warmup=2, critic=critic, optim=optim)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    of_critic = [p.detach().clone() for module in trainer.critic.modules for p in module.parameters()]
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    after = [p for module in trainer.critic.modules for p in module.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(of_critic, after, strict=True))


# What stays as it was -------------------------------------------------------------------------------------------------


@RANKS
def test_the_reference_stays_the_start_and_the_old_policy_that_of_the_step(
    r: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all updates of two steps, as the loss is given them."""
    given: list[dict[tuple[int, ...], tuple[list[float], list[float]]]] = []
    old: list[dict[tuple[int, ...], list[float]]] = []
    start, _ = models.load(tiny_folder)

    def loss(*inputs: torch.Tensor, **words: Any) -> Any:
        _, _, tokens, old_logprobs, _ = inputs
        assert not old_logprobs.requires_grad and not words["ref_logprobs"].requires_grad
        sizes = words["cu_seqlens"].diff().tolist()
        parts = [x.split(sizes) for x in (tokens, old_logprobs, words["ref_logprobs"])]
        given.append({tuple(t.tolist()): (o.tolist(), x.tolist()) for t, o, x in zip(*parts, strict=True)})
        return ops.linear_ppo_loss(*inputs, **words)

    trainer = ppo(
        tiny_folder, tmp_path, r, loss=loss, kl_in="loss", steps=2, epochs=2, minibatches=2, max_new_tokens=12
    )
    take = trainer.sampler.take
    drawn: list[Sampled] = []

    def taken(step: int) -> tuple[Sampled, int]:
        samples, lag = take(step)
        drawn.append(samples)
        with torch.no_grad():
            old.append({e.response: logprobs(trainer.model, e).tolist() for e in samples.examples})
        return samples, lag

    monkeypatch.setattr(trainer.sampler, "take", taken)
    trainer.train()
    assert rows(tmp_path)[-1]["kl"] > 1e-3, "the policy is to move away"
    assert len(given) >= 8
    for step, samples in enumerate(drawn):
        for example in samples.examples:
            with torch.no_grad():
                of_start = logprobs(start, example).tolist()
            found = [calls[example.response] for calls in given if example.response in calls]
            assert len(found) >= 2, "each is learned from in both epochs"
            for old_logprobs, ref_logprobs in found:
                assert ref_logprobs == pytest.approx(of_start, abs=1e-4)
                assert old_logprobs == pytest.approx(old[step][example.response], abs=1e-4)


@RANKS
def test_dpos_reference_stays_the_start(r: int, tiny_folder: Path, tmp_path: Path) -> None:
    """The loss on held-out pairs after the run, by hand from the model that was loaded and the one that was saved."""
    config = DPOConfig(batch_size=3, epochs=2, beta=0.3, lora=LoRAConfig(r=r), optim=UNCLIPPED, heldout=0.3)
    trainer = DPOTrainer(tiny_folder, PAIRS, tmp_path, config)
    trainer.train()
    (start, _), (after, _) = models.load(tiny_folder), models.load(tmp_path)
    losses = []
    with torch.no_grad():
        for group in trainer.heldout:
            for chosen, rejected in zip(group.chosen, group.rejected, strict=True):
                sides = [group.examples[side] for side in (chosen, rejected)]
                of = [float(logprobs(after, e).sum() - logprobs(start, e).sum()) for e in sides]
                losses.append(math.log1p(math.exp(-0.3 * (of[0] - of[1]))))
    assert abs(rows(tmp_path)[-1]["heldout_loss"] - math.log(2)) > 1e-3, "the policy is to move away"
    assert rows(tmp_path)[-1]["heldout_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


# The reward model -----------------------------------------------------------------------------------------------------


@RANKS
def test_a_reward_models_loss_reaches_trunk_and_head(
    r: int, tiny_folder: Path, tmp_path: Path, nudge: Callable[..., None], updates: list[Update]
) -> None:
    """And of the weights beside an adapter none but the head's."""
    config = RewardConfig(
        batch_size=8, heldout=0.0, center_coef=0.2, lora=LoRAConfig(r=r), optim=UNCLIPPED, max_steps=1
    )
    trainer = RewardTrainer(tiny_folder, PAIRS, tmp_path, config)
    nudge(trainer.model)
    model = copy.deepcopy(trainer.model)
    terms = []
    for group in trainer.training:
        scores = []
        for example in group.examples:
            ids = torch.tensor([[*example.prompt, *example.response]])
            inner = unwrapped(model)
            scores.append(inner.score(inner.model(input_ids=ids).last_hidden_state[0, -1]).squeeze())
        for one, other in zip(group.chosen, group.rejected, strict=True):
            chosen, rejected = scores[one], scores[other]
            terms.append(torch.nn.functional.softplus(rejected - chosen) + 0.2 * (chosen + rejected).square())
    assert len(terms) == 8
    expected = gradients(torch.stack(terms).mean(), model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    (update,) = updates
    assert_gradients(update, trainer.model, r, expected)
    assert any("score" in name and gradient is not None for name, gradient in expected.items())
    for name, weight in trainer.model.named_parameters():
        if name in before:
            assert torch.equal(weight, before[name]) and update.of(weight) is None
            assert r > 0
