"""Every column of PPO's metrics.jsonl, computed again in float64 from what was sampled and the weights of the time."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_fast import models
from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig, RunConfig
from rlhf_fast.data.batches import Example
from rlhf_fast.data.templates import Prompt
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.trainers.ppo.sampler import Sampled, step_prompts
from rlhf_fast.trainers.ppo.trainer import PPOTrainer

PROMPTS = [{"prompt": f"question {i}"} for i in range(8)]
TIMED = {"seconds", "seconds_rollout", "seconds_scoring", "seconds_training", "decode_roofline", "busy"}
TIMED |= {"training_utilisation"}
OPTIM = OptimConfig(lr=8e-3, schedule="linear", warmup=0.25, max_grad_norm=0.05, max_tokens_per_microbatch=40)


def letters(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [0.4 * sum(character.isascii() for character in response) for response in responses]


def length(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def flat(prompts: list[Prompt], responses: list[str]) -> list[float]:
    """The same for all responses to some of the prompts."""
    return [float(len(r)) if int(str(p)[-1]) % 2 else 1.0 for p, r in zip(prompts, responses, strict=True)]


@dataclass
class Step:
    """What a step saw: its samples, and before each update the models in float64 and the rows that it learned from."""

    sampled: Sampled
    drawn_by: Any  # the policy that drew them
    updates: list[tuple[Any, Any, list[int]]] = field(default_factory=list)  # policy, value head, rows
    statistics: list[dict[str, float]] = field(default_factory=list)  # of each update, by hand


def watched(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps of a run that is to come."""
    steps: list[Step] = []
    drawn_by: dict[int, Any] = {}
    draw, take, update = trainer.sampler._sample, trainer.sampler.take, trainer.update

    def sample(step: int) -> Any:
        drawn_by[step] = copy.deepcopy(trainer.model).double()
        return draw(step)

    def taken(step: int) -> Any:
        found = take(step)
        steps.append(Step(found[0], drawn_by[step]))
        return found

    def learned(run: Any, experience: Any, part: list[int], step: int) -> Any:
        head = None if trainer.critic is None else copy.deepcopy(trainer.critic.head).double()
        steps[-1].updates.append((copy.deepcopy(trainer.model).double(), head, list(part)))
        return update(run, experience, part, step)

    monkeypatch.setattr(trainer.sampler, "_sample", sample)
    monkeypatch.setattr(trainer.sampler, "take", taken)
    monkeypatch.setattr(trainer, "update", learned)
    return steps


# By hand --------------------------------------------------------------------------------------------------------------


def outputs(model: Any, head: Any, example: Example, temperature: float) -> tuple[torch.Tensor, ...]:
    """Log-probability, entropy and value at each response token: (T,) each."""
    ids = torch.tensor([[*example.prompt, *example.response]])
    found = model(input_ids=ids, output_hidden_states=True)
    here = slice(len(example.prompt) - 1, ids.shape[1] - 1)
    logp = torch.log_softmax(found.logits[0, here] / temperature, -1)
    own = logp.gather(1, torch.tensor(example.response)[:, None])[:, 0]
    values = torch.zeros_like(own) if head is None else head(found.hidden_states[-1][0, here])[:, 0]
    return own, -(logp.exp() * logp).sum(-1), values


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    advantages, after, following = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        after = float(rewards[t]) + gamma * following - float(values[t]) + gamma * lam * after
        advantages[t], following = after, float(values[t])
    return advantages


def by_hand(step: Step, reference: Any, parts: list[Any], config: PPOConfig, kl_coef: float) -> dict[str, float]:
    """All that a step's row says but for rates and times; `parts` are the reward's (weight, function)."""
    rollouts, prompts = step.sampled.rollouts, [record.prompt for record in step.sampled.records]
    n, examples = config.samples_per_prompt, rollouts.examples()
    asked = [prompts[i // n] for i in range(len(examples))]
    given = {function.__name__: function(asked, rollouts.texts) for _, function in parts}
    scores = np.array([w * np.array(given[function.__name__]) for w, function in parts]).sum(0)
    ended = np.array([reason == "stop" for reason in rollouts.finish_reasons])
    rewards = scores.clip(-config.reward_clip, config.reward_clip) - config.missing_eos_penalty * ~ended

    start, head, _ = step.updates[0]
    with torch.no_grad():
        old = [outputs(start, head, example, config.temperature) for example in examples]
        ref = [outputs(reference, None, example, config.temperature)[0] for example in examples]
        drawn = [outputs(step.drawn_by, None, example, config.temperature) for example in examples]
    sequence_kl = np.mean([float((d[0] - r).sum()) for d, r in zip(drawn, ref, strict=True)])
    row = {
        "score": scores.mean(),
        **({f"score/{name}": np.mean(found) for name, found in given.items()} if len(parts) > 1 else {}),
        "reward": rewards.mean() - kl_coef * sequence_kl,
        "kl": sequence_kl,
        "entropy": float(torch.cat([d[1] for d in drawn]).mean()),
        "response_tokens": np.mean([len(example.response) for example in examples]),
        "finished": ended.mean(),
        "kl_coef": kl_coef,
        "updates": len(step.updates),
    }
    returns: list[torch.Tensor] = []
    if config.advantage == "gae":
        advantages = []
        for (logp, _, values), other, paid in zip(old, ref, rewards, strict=True):
            of_tokens = -(kl_coef if config.kl_estimator is None else 0.0) * (logp - other)
            of_tokens[-1] += paid
            advantages.append(gae(of_tokens, values, config.gamma, config.lam))
            returns.append(advantages[-1] + values)
        everything = torch.cat(advantages)
        whole = [(a - everything.mean()) / (everything.var() + 1e-8).sqrt() for a in advantages]
        all_returns, all_values = torch.cat(returns), torch.cat([o[2] for o in old])
        unexplained = (all_returns - all_values).var(correction=0)
        row["explained_variance"] = 1 - float(unexplained / all_returns.var(correction=0))
    else:
        kls = torch.tensor([float((o[0] - r).sum()) for o, r in zip(old, ref, strict=True)])
        of_responses = without_critic(step, torch.tensor(rewards), kls, config, kl_coef)
        whole = [torch.full_like(r, float(a)) for r, a in zip(ref, of_responses, strict=True)]
        if config.advantage == "reinforce++":
            everything = torch.cat(whole)
            whole = [(a - everything.mean()) / (everything.var() + 1e-8).sqrt() for a in whole]
        if config.advantage != "remax":
            groups = rewards.reshape(-1, n)
            row["equal_groups"] = (groups == groups[:, :1]).all(1).mean()
    step.statistics = rows = [
        update(*at, examples, old, ref, drawn, whole, returns, config, kl_coef) for at in step.updates
    ]
    return {**row, **{name: float(np.mean([one[name] for one in rows])) for name in rows[0]}}


def without_critic(
    step: Step, rewards: torch.Tensor, kls: torch.Tensor, config: PPOConfig, kl_coef: float
) -> torch.Tensor:
    """Of each response: (B,)."""
    n = config.samples_per_prompt
    if config.advantage == "remax":
        assert step.sampled.greedy is not None
        rollouts = step.sampled.greedy[0]
        likeliest = letters([record.prompt for record in step.sampled.records], rollouts.texts)
        cut = [reason != "stop" for reason in rollouts.finish_reasons]
        paid = [score - config.missing_eos_penalty * x for score, x in zip(likeliest, cut, strict=True)]
        return rewards - kl_coef * kls - torch.tensor(paid).repeat_interleave(n)

    def apart(x: torch.Tensor) -> torch.Tensor:
        groups = x.view(-1, n)
        others = (groups.sum(1, keepdim=True) - groups) / (n - 1)
        return groups - (others if config.advantage == "rloo" else groups.mean(1, keepdim=True))

    found = apart(rewards)
    if config.advantage == "grpo":
        found = found / (rewards.view(-1, n).std(1, keepdim=True) + 1e-6)
    if config.kl_estimator is None:
        found = found - kl_coef * apart(kls)
    return found.flatten()


def update(
    model: Any, head: Any, part: list[int], examples: list[Example], old: Any, ref: Any, drawn: Any, whole: Any,
    returns: Any, config: PPOConfig, kl_coef: float,
) -> dict[str, float]:  # fmt: skip
    """Of one minibatch, with the norm of its gradient from autograd."""
    now = [outputs(model, head, examples[i], config.temperature) for i in part]
    logp, values = (torch.cat([one[k] for one in now]) for k in (0, 2))
    before, sampled_values = (torch.cat([old[i][k] for i in part]) for k in (0, 2))
    advantages = torch.cat([whole[i] for i in part])
    d = logp - before
    ratio = d.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    policy = torch.maximum(plain, clipped)
    row = {}
    if config.lag:
        weight = (before - torch.cat([drawn[i][0] for i in part])).exp()
        policy = policy * weight.clamp(max=config.rollout_cap)
        row["rollout_weight"] = weight.clamp(max=config.rollout_cap).mean()
        row["rollout_clip_fraction"] = (weight > config.rollout_cap).double().mean()
    loss = row["policy_loss"] = policy.mean()
    if head is not None:
        aim = torch.cat([returns[i] for i in part])
        near = sampled_values + (values - sampled_values).clamp(-config.value_clip, config.value_clip)
        row["value_loss"] = 0.5 * torch.maximum((values - aim) ** 2, (near - aim) ** 2).mean()
        loss = loss + config.value_coef * row["value_loss"]
    if config.kl_estimator is not None:
        away = logp - torch.cat([ref[i] for i in part])
        loss = loss + kl_coef * (0.5 * away**2 if config.kl_estimator == "k2" else torch.exp(-away) - 1 + away).mean()
    loss.backward()
    gradients = [p.grad for module in (model, head) if module is not None for p in module.parameters()]
    row |= {
        "loss": loss,
        "grad_norm": sum(g.square().sum() for g in gradients if g is not None).sqrt(),
        "clip_fraction": (clipped > plain).double().mean(),
        "approx_kl": -d.mean(),
        "approx_kl_k3": (torch.expm1(d) - d).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
    }
    return {name: float(value.detach()) for name, value in row.items()}


def adapted(coef: float, kl: float, sequences: int, config: PPOConfig) -> float:
    assert config.kl_target is not None
    return coef * (1 + min(max(kl / config.kl_target - 1, -0.2), 0.2) * sequences / config.kl_horizon)


def rates(config: PPOConfig, updates: list[int]) -> list[float]:
    """The mean rate of each step's updates: up over a quarter of all that there might be, then down to 0."""
    total = config.steps * config.epochs * config.minibatches
    warmup = total // 4
    each = [OPTIM.lr * ((i + 1) / warmup if i < warmup else 1 - (i - warmup) / (total - warmup)) for i in range(total)]
    ends = np.cumsum([0, *updates])
    return [float(np.mean(each[start:end])) for start, end in itertools.pairwise(ends)]


# The runs -------------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gae": ([(1.0, letters), (-0.5, length)], {"reward_clip": 2.0, "clip_low": 0.1, "clip_high": 0.3}),
    "gae, an older policy's samples": ([(1.0, letters)], {"lag": 1, "rollout_cap": 1.1}),
    "grpo": ([(1.0, flat)], {"advantage": "grpo", "kl_coef": 0.3}),
    "grpo with other prompts": ([(1.0, flat)], {"advantage": "grpo", "resample": 1}),
    "dr_grpo": ([(1.0, letters)], {"advantage": "dr_grpo", "samples_per_prompt": 4}),
    "rloo": ([(1.0, letters)], {"advantage": "rloo", "samples_per_prompt": 4}),
    "reinforce++": ([(1.0, letters)], {"advantage": "reinforce++"}),
    "remax": ([(1.0, letters)], {"advantage": "remax"}),
    "gae with the penalty in the loss": ([(1.0, letters)], {"kl_in": "loss"}),
    "few updates": ([(1.0, letters)], {"max_update_kl": 0.01, "value_coef": 0.7, "value_clip": 0.05}),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_of_a_step(name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, options = RUNS[name]
    settings: dict[str, Any] = {
        "steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "minibatches": 2, "epochs": 2,
        "max_new_tokens": 5, "stop_token_ids": tuple(range(4, 40)), "temperature": 0.8, "missing_eos_penalty": 0.7,
        "gamma": 0.9, "lam": 0.8, "value_clip": 0.1, "value_coef": 0.4, "kl_coef": 0.6, "kl_target": 0.05,
        "kl_horizon": 60.0, "lora": LoRAConfig(r=0), "optim": OPTIM,
    }  # fmt: skip
    config = PPOConfig(**{**settings, **options})
    trainer = PPOTrainer(tiny_folder, parts if len(parts) > 1 else parts[0][1], PROMPTS, tmp_path, config)
    reference = copy.deepcopy(trainer.model).double()
    steps = watched(trainer, monkeypatch)
    result = trainer.train()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lrs, coef = rates(config, [len(step.updates) for step in steps]), config.kl_coef
    for i, (step, row) in enumerate(zip(steps, found, strict=True)):
        expected = {**by_hand(step, reference, parts, config, coef), "step": i + 1, "lr": lrs[i]}
        if config.lag:
            expected["lag"] = float(i > 0)
        if config.resample:
            own = step_prompts(trainer.prompts, config, i + 1)
            expected["resampled"] = float(sum(record not in own for record in step.sampled.records))
        assert row.keys() - TIMED == expected.keys()
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5), i + 1
        coef = adapted(coef, expected["kl"], 4 * config.samples_per_prompt, config)  # once the row was told
    assert coef != config.kl_coef and trainer.kl_controller.coef == pytest.approx(coef, rel=1e-4)
    told = ("score", "reward", "kl", "kl_coef", "entropy", "finished")
    summary = {key: found[-1][key] for key in told} | {f"{key}_before": found[0][key] for key in told}
    assert result["summary"] == summary
    # What would go unseen if it did not happen here.
    assert abs(found[-1]["kl"]) > 1e-3 and 0 < found[0]["finished"] < 1
    assert any(0 < row["clip_fraction"] < 1 for row in found)
    if name == "grpo":
        assert any(0 < row["equal_groups"] < 1 for row in found)
    if config.resample:
        assert any(0 < row["resampled"] < 4 for row in found)
    if name == "few updates":
        for step in steps:
            moved = [row["approx_kl_k3"] > options["max_update_kl"] for row in step.statistics]
            assert not any(moved[:-1]) and (moved[-1] or len(moved) == 4)
        # The estimator that is never negative, and not the other, which is below the limit all the same.
        assert any(step.statistics[-1]["approx_kl"] < 0 for step in steps if len(step.updates) < 4)
    if config.lag:
        assert any(0 < row["rollout_clip_fraction"] < 1 for row in found)


def test_held_out_figures_are_of_one_unpaid_response_to_each_prompt_by_the_checkpoint_of_the_step(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """By the same random numbers each time; clips and penalties are for training."""
    ends, asked = tuple(range(4, 40)), [f"held out {i}" for i in range(6)]
    config = PPOConfig(
        steps=2, prompts_per_step=4, samples_per_prompt=2, max_new_tokens=6, temperature=0.8, stop_token_ids=ends,
        reward_clip=0.1, seed=3, lora=LoRAConfig(r=0), optim=OPTIM, run=RunConfig(save_every=1, keep_last=9),
    )  # fmt: skip
    held_out = [{"prompt": prompt} for prompt in asked]
    result = PPOTrainer(tiny_folder, letters, PROMPTS, tmp_path, config, heldout_data=held_out).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row for row in rows if "heldout_score" in row}
    assert list(measured) == [0, 1, 2]
    params = SamplingParams(temperature=0.8, max_new_tokens=6, stop_token_ids=ends, seed=3)
    for step, row in measured.items():
        folder = tmp_path / "checkpoints" / f"step-{step}" if step else tiny_folder
        rollouts = Generator(*models.load(folder)).generate(asked, params)
        assert {name: value for name, value in row.items() if name not in ("step", "seconds")} == pytest.approx(
            {
                "heldout_score": np.mean(letters(list(asked), rollouts.texts)),
                "heldout_finished": rollouts.finish_reasons.count("stop") / 6,
                "heldout_tokens": np.mean([len(example.response) for example in rollouts.examples()]),
            }
        )
        assert 0 < row["heldout_finished"] < 1 and row["heldout_score"] > 0.1
    names = ("heldout_score", "heldout_finished", "heldout_tokens")
    assert {name: result["summary"][name] for name in names} == {name: measured[2][name] for name in names}
    before = {name: result["summary"][f"{name}_before"] for name in names}
    assert before == {name: measured[0][name] for name in names}


@pytest.mark.parametrize(("held_out", "best"), [(False, 2), (True, 3)])
def test_the_best_checkpoint_is_that_of_the_highest_reward_or_held_out_score(
    held_out: bool, best: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is what was paid less the KL penalty, and not the score."""
    config = PPOConfig(
        steps=5, prompts_per_step=4, lora=LoRAConfig(r=2), run=RunConfig(save_every=1, keep_last=1)
    )  # fmt: skip
    others = [{"prompt": "held out"}] if held_out else None
    trainer = PPOTrainer(tiny_folder, letters, PROMPTS, tmp_path, config, heldout_data=others)
    scores, rewards, measured = [4.0, 1.0, 2.0, 3.0, 0.0], [0.1, 0.3, 0.2, 0.0, 0.1], [9.0, 1.0, 2.0, 3.0, 2.5, 1.0]
    monkeypatch.setattr(trainer, "step", lambda run, n: {"score": scores[n - 1], "reward": rewards[n - 1], "kl": 0.0})
    monkeypatch.setattr(trainer, "evaluate", lambda n: {"heldout_score": measured[n]})
    trainer.train()
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {f"step-{best}", "step-5"}
