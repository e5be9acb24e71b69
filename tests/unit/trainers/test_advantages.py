"""Each advantage against a restatement of its paper's formula in float64, and the penalty where it says it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig
from rlhf_fast.models.scoring import per_example
from rlhf_fast.trainers.ppo.advantages import ADVANTAGES, GAE, Advantages, DrGRPO, Scored, equal_groups
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from tests.scenarios.trainers.test_ppo_options import rows
from tests.unit.trainers.seen import collect

LENGTHS = [3, 1, 5, 2, 4, 2]  # of two prompts' responses, three each
COMPARING = ["grpo", "dr_grpo", "rloo", "reinforce++"]
PROMPTS = [{"prompt": f"Say {i}"} for i in range(12)]


def scored(scores: list[float], kl: torch.Tensor | None = None) -> Scored:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    kl = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0)) if kl is None else kl
    return Scored(torch.tensor(scores), kl, cu_seqlens, None, None)


def advantages(kind: Any, given: Scored, kl_coef: float, **options: Any) -> Advantages:
    return ADVANTAGES[kind](given, kl_coef, PPOConfig(advantage=kind, samples_per_prompt=3, **options))


def whitened(found: Advantages) -> torch.Tensor:
    """As the loss has them."""
    if found.sums is None:
        return found.advantages.double()
    n, total, squares = found.sums.tolist()
    return (found.advantages.double() - total / n) / ((squares - total**2 / n) / (n - 1) + 1e-8) ** 0.5


def by_the_paper(kind: str, given: Scored, kl_coef: float, scale: str | None) -> torch.Tensor:
    """Of every token, in Python's float64."""
    scores = [given.scores[i : i + 3].double() for i in (0, 3)]
    kl = [part.double() for part in given.kl.split(LENGTHS)]
    sums = [torch.stack([part.sum() for part in kl[i : i + 3]]) for i in (0, 3)]
    deviation = {"group": [group.std() + 1e-6 for group in scores], "batch": [torch.cat(scores).std() + 1e-6] * 2}

    def beside(group: torch.Tensor) -> torch.Tensor:
        if kind == "rloo":
            return group - (group.sum() - group) / 2
        return group - group.mean()

    scale = scale or ("group" if kind == "grpo" else "none")
    scaled = [beside(group) / deviation.get(scale, [1.0, 1.0])[g] for g, group in enumerate(scores)]
    if kind == "reinforce++":
        tokens = torch.cat(scaled).repeat_interleave(torch.tensor(LENGTHS))
        tokens = (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
        return tokens - kl_coef * torch.cat([part.flip(0).cumsum(0).flip(0) for part in kl])
    paid = torch.cat([s - kl_coef * beside(group) for s, group in zip(scaled, sums, strict=True)])
    return paid.repeat_interleave(torch.tensor(LENGTHS))


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "scale"),
    [*((kind, scale) for kind in COMPARING[:3] for scale in (None, "group", "batch", "none")), ("reinforce++", None)],
)
def test_is_what_its_paper_says(kind: str, scale: str | None, kl_coef: float) -> None:
    given = scored([0.1, 2.5, -1.0, 7.0, 7.5, 7.25])
    found = advantages(kind, given, kl_coef, scale=scale)
    assert found.returns is None
    torch.testing.assert_close(whitened(found), by_the_paper(kind, given, kl_coef, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", COMPARING)
def test_equal_scores_give_no_advantage_whatever_the_penalty_weighs(kind: str) -> None:
    """And a penalty in the reward weighs what it says, in place of all that there is."""
    for scale in (None, "group", "batch", "none") if kind != "reinforce++" else (None,):
        given = scored([0.1] * 6)
        assert not whitened(advantages(kind, given, 0.0, scale=scale)).any()
        small, large = (advantages(kind, given, kl_coef, scale=scale).advantages for kl_coef in (0.001, 0.01))
        torch.testing.assert_close(large, 10 * small, rtol=1e-4, atol=1e-6)
        assert 0 < float(small.abs().max()) < 0.001 * float(given.kl.abs().sum())


@pytest.mark.parametrize("kind", COMPARING)
def test_a_penalty_is_the_same_beside_small_scores_as_beside_large_ones(kind: str) -> None:
    def penalties(size: float) -> torch.Tensor:
        given = scored([size * x for x in (0.1, 2.5, -1.0, 7.0, 7.5, 7.25)])
        return whitened(advantages(kind, given, 0.3)) - whitened(advantages(kind, given, 0.0))

    torch.testing.assert_close(penalties(0.01), penalties(1.0), rtol=1e-4, atol=1e-5)


def test_groups_are_equal_only_where_all_their_scores_are() -> None:
    assert equal_groups([1.0, 1.0, 0.0, 1.0, 2.0, 2.0], 2) == [0, 2]
    assert equal_groups([1.0, 1.0, 0.0, 1.0, 2.0, 2.0], 3) == []


# In a run -------------------------------------------------------------------------------------------------------------


def make(folder: Path, out: Path, reward: Any, **options: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "steps": 1,
        "prompts_per_step": 4,
        "samples_per_prompt": 3,
        "max_new_tokens": 5,
        "minibatches": 1,
        "epochs": 1,
        "missing_eos_penalty": 0.0,
        "lora": LoRAConfig(r=4),
        "optim": OptimConfig(lr=1e-3, schedule="constant", warmup=0.0),
    }
    return PPOTrainer(folder, reward, PROMPTS, out, PPOConfig(**{**settings, **options}))


def away(trainer: PPOTrainer) -> PPOTrainer:
    """From the reference, so that there is a penalty."""
    with torch.no_grad():
        for parameter in trainer.optimizer.parameters:
            parameter += 0.02
    return trainer


def lengths_of(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(text)) for text in responses]


def all_alike(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.1] * len(responses)


@pytest.mark.parametrize(("kind", "estimate"), [("grpo", "k3"), ("dr_grpo", "k3"), ("reinforce++", "k2")])
def test_in_the_loss_the_penalty_has_the_gradient_of_its_estimator(
    kind: str, estimate: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """With equal scores it is all that there is to learn from."""
    trainer = away(make(tiny_folder, tmp_path, all_alike, advantage=kind, kl_coef=0.7))
    experience = collect(trainer, 2, 0.7)
    assert not torch.cat(experience.advantages).any()
    every = list(range(len(experience.examples)))
    for loss, _ in trainer._losses(experience, every):
        loss.backward()
    got = [p.grad.clone() for p in trainer.optimizer.parameters if p.grad is not None]
    for p in trainer.optimizer.parameters:
        p.grad = None

    def logprobs(batch: Any) -> list[torch.Tensor]:
        from rlhf_fast import models

        return [models.response_logprobs(trainer.model, batch, 1.0)[0]]

    (reference,) = per_example(experience.examples, trainer.scorer._reference_logprobs, 4096, "cpu")
    from rlhf_fast.data.batches import pad

    batch = pad(experience.examples, torch.device("cpu"), trainer.shared)
    with torch.enable_grad():
        (now,) = logprobs(batch)
        distance = now - torch.cat(reference)
        per_token = distance.square() / 2 if estimate == "k2" else torch.exp(-distance) - 1 + distance
        (0.7 * per_token.mean()).backward()
    want = [p.grad for p in trainer.optimizer.parameters if p.grad is not None]
    assert len(got) == len(want) > 0 and max(float(x.abs().max()) for x in want) > 1e-4
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [*COMPARING, "remax"])
def test_in_the_reward_the_loss_has_no_penalty(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    trainer = away(make(tiny_folder, tmp_path, lengths_of, advantage=kind, kl_in="reward", kl_coef=0.7))
    with_penalty, without = (collect(trainer, 2, kl_coef) for kl_coef in (0.7, 0.0))
    assert with_penalty.ref_logprobs == [] and trainer.critic is None
    assert not torch.equal(torch.cat(with_penalty.advantages), torch.cat(without.advantages))


def test_with_a_critic_the_penalty_may_be_in_the_loss_too(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = away(make(tiny_folder, tmp_path, lengths_of, kl_in="loss", kl_coef=0.7))
    with_penalty, without = (collect(trainer, 2, kl_coef) for kl_coef in (0.7, 0.0))
    assert torch.equal(torch.cat(with_penalty.advantages), torch.cat(without.advantages))
    assert len(with_penalty.ref_logprobs) == len(with_penalty.examples)
    grads = []
    for kl_coef in (0.7, 0.0):
        trainer.kl_controller.coef = kl_coef
        for loss, _ in trainer._losses(with_penalty, list(range(len(with_penalty.examples)))):
            loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in trainer.optimizer.parameters if p.grad is not None]))
        for p in trainer.optimizer.parameters:
            p.grad = None
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("kind", COMPARING)
def test_a_run_learns_and_counts_the_groups_that_are_equal(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path, lengths_of, advantage=kind, steps=2)
    before = [p.detach().clone() for p in trainer.optimizer.parameters]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.optimizer.parameters, strict=True))
    assert all(0.0 <= row["equal_groups"] <= 1.0 for row in rows(tmp_path))


# Sampled again --------------------------------------------------------------------------------------------------------


def odd_prompts_are_equal(prompts: list[Any], responses: list[str]) -> list[float]:
    """Of an odd prompt all responses score alike; of an even one none."""
    return [0.0 if int(str(p).split()[-1]) % 2 else float(i) for i, p in enumerate(prompts)]


def test_prompts_that_say_nothing_are_replaced_by_others(tiny_folder: Path, tmp_path: Path) -> None:
    kept = make(tiny_folder, tmp_path / "a", odd_prompts_are_equal, advantage="grpo")
    kept.train()
    (plain,) = rows(tmp_path / "a")
    trainer = make(tiny_folder, tmp_path / "b", odd_prompts_are_equal, advantage="grpo", resample=4)
    sampled, _ = trainer.sampler.take(1)
    first, _ = kept.sampler.take(1)
    numbers = [int(record.prompt.split()[-1]) for record in sampled.records if isinstance(record.prompt, str)]
    was = [int(record.prompt.split()[-1]) for record in first.records if isinstance(record.prompt, str)]
    assert any(n % 2 for n in was) and plain["equal_groups"] == sum(n % 2 for n in was) / 4
    assert not any(n % 2 for n in numbers) and len(set(numbers)) == 4
    assert [n for n in numbers if n in was] == [n for n in was if not n % 2]  # the others stay where they were
    assert sampled.resampled >= sum(n % 2 for n in was)
    assert sampled.rollouts.prompt_index.tolist() == [i for i in range(4) for _ in range(3)]
    scores = sampled.scoring.result().scores
    assert len(scores) == 12 and equal_groups(scores, 3) == []
    for i, example in enumerate(sampled.rollouts.examples()):  # each with the prompt that it answers
        assert f"Say {numbers[i // 3]}" in trainer.tokenizer.decode(example.prompt)
    trainer.train()
    (row,) = rows(tmp_path / "b")
    assert row["equal_groups"] == 0.0 and row["resampled"] == sampled.resampled


def test_where_all_prompts_say_nothing_it_ends_and_keeps_them(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path, all_alike, advantage="dr_grpo", resample=3, steps=2, kl_coef=0.0)
    before = [p.detach().clone() for p in trainer.optimizer.parameters]
    trainer.train()
    assert [(row["equal_groups"], row["resampled"]) for row in rows(tmp_path)] == [(1.0, 12.0)] * 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.optimizer.parameters, strict=True))


def test_what_is_sampled_again_hangs_on_the_seed_and_the_step_alone(tiny_folder: Path, tmp_path: Path) -> None:
    """So that a run that goes on from a kept step draws what an unbroken one does."""
    found = []
    for name in ("a", "b"):
        trainer = make(tiny_folder, tmp_path / name, odd_prompts_are_equal, advantage="rloo", resample=2)
        if name == "a":
            trainer.sampler.take(1)
        sampled, _ = trainer.sampler.take(2)
        assert sampled.resampled and json.loads(json.dumps(trainer.sampler.state_dict())) == {}
        found.append(sampled.rollouts)
    assert torch.equal(found[0].input_ids, found[1].input_ids)
    assert torch.equal(found[0].logprobs, found[1].logprobs)


def test_the_parts_of_a_reward_go_with_the_responses_that_stay(tiny_folder: Path, tmp_path: Path) -> None:
    reward = [(1.0, odd_prompts_are_equal), (0.0, lengths_of)]
    trainer = make(tiny_folder, tmp_path, reward, advantage="grpo", resample=4)
    sampled, _ = trainer.sampler.take(1)
    scores = sampled.scoring.result()
    assert sampled.resampled and scores.parts["odd_prompts_are_equal"] == scores.scores
    assert scores.parts["lengths_of"] == [float(len(text)) for text in sampled.rollouts.texts]


def test_equal_rewards_are_apart_by_nothing_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for value in (0.1, 0.7, -1e-3, 12345.678):
            for n in (3, 7, 10):
                for kind in ("grpo", "dr_grpo", "rloo"):
                    assert not ops.group_advantages(torch.full((2, n), value, dtype=dtype), kind).any()


# What a method needs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_settings_are_refused_by_what_the_method_needs(kind: str) -> None:
    """The ranges of the settings, which know no trainer, say of each method what its class does."""

    def refused(**options: Any) -> bool:
        try:
            PPOConfig(advantage=kind, **options)
        except ValueError:
            return True
        return False

    method = ADVANTAGES[kind]
    assert refused(critic_warmup=1) != method.needs_critic
    assert refused(samples_per_prompt=1) == method.compares_samples
    assert refused(resample=1) != method.compares_samples
    assert refused(scale="batch") != hasattr(method, "baseline")


def test_with_a_critic_returns_are_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    def silent(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        return Advantages(torch.zeros_like(scored.kl), None, None)

    config = PPOConfig(prompts_per_step=2, samples_per_prompt=2, max_new_tokens=6, minibatches=1, steps=1)
    trainer = PPOTrainer(tiny_folder, lengths_of, [{"prompt": "a"}, {"prompt": "b"}], tmp_path, config, silent)
    with pytest.raises(ValueError, match="it gave no returns, by which the critic learns; return them, or say needs_"):
        trainer.train()
    silent.needs_critic = False  # type: ignore[attr-defined]
    PPOTrainer(tiny_folder, lengths_of, [{"prompt": "a"}, {"prompt": "b"}], tmp_path / "b", config, silent).train()


class AboveTheLikeliest(GAE):
    """Needs both: a critic for all tokens, and greedy responses to compare with."""

    needs_greedy = True

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        assert scored.baselines is not None
        return super().__call__(scored._replace(scores=scored.scores - scored.baselines), kl_coef, config)


def plain(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    return ADVANTAGES[config.advantage](scored, kl_coef, config)


@pytest.mark.parametrize(
    ("advantage", "kind", "critic", "greedy"),
    [
        (AboveTheLikeliest(), "rloo", True, True),
        (DrGRPO(), "gae", False, False),
        (plain, "gae", True, False),
        (plain, "rloo", False, False),
        (plain, "remax", False, True),
    ],
)
def test_what_an_advantage_needs_is_made(
    advantage: Any, kind: str, critic: bool, greedy: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """As it says itself; where it says nothing, as the method that the settings name does."""
    config = PPOConfig(
        steps=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=6, minibatches=1, advantage=kind
    )
    trainer = PPOTrainer(tiny_folder, lengths_of, [{"prompt": "a"}, {"prompt": "b"}], tmp_path, config, advantage)
    sampled, _ = trainer.sampler.take(1)
    assert ((trainer.critic is not None), (sampled.greedy is not None)) == (critic, greedy)
    trainer.train()
