"""PPO on samples of the policy as it was an update ago: whose numbers go where. That it comes to the best policy is in
test_optimum.py, and that a killed run goes on in test_resume.py."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import models, ops
from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig
from rlhf_fast.data.batches import Example, pad
from rlhf_fast.data.templates import Prompt
from rlhf_fast.rewards.scoring import IN_FLIGHT, THREAD
from rlhf_fast.trainers.loop.monitor import Stop
from rlhf_fast.trainers.ppo.advantages import GAE, Advantages, Scored
from rlhf_fast.trainers.ppo.trainer import PPOTrainer

PROMPTS = [{"prompt": f"question {i}"} for i in range(12)]


def by_length(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def make(folder: Path, out: Path, reward: Any = by_length, advantage: Any = None, **options: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "epochs": 1, "minibatches": 1,
        "max_new_tokens": 12, "lag": 1, "lora": LoRAConfig(r=0),
        "optim": OptimConfig(lr=3e-3, schedule="constant", warmup=0.0, max_tokens_per_microbatch=100_000),
    }  # fmt: skip
    return PPOTrainer(folder, reward, PROMPTS, out, PPOConfig(**{**settings, **options}), advantage)


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def outputs(model: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each response token, in float64: (R,)."""
    found = []
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.response]])
        logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)[len(example.prompt) - 1 : -1]
        tokens = torch.tensor(example.response)[:, None]
        found.append((logs.gather(1, tokens)[:, 0], -(logs.exp() * logs).sum(-1)))
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def test_each_number_is_of_the_policy_that_it_should_be_of(tiny_folder: Path, tmp_path: Path) -> None:
    """Step 1 learns from its own policy's samples, later ones from those of the policy an update earlier: those are
    weighed, the ratio begins at 1, the penalty and the values are of the models that are trained, and what is logged of
    the samples is of the policy that drew them."""
    seen: list[dict[str, Any]] = []
    policies: list[dict[str, torch.Tensor]] = []  # before each update

    def advantage(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        seen.append({"scored": scored})
        return GAE()(scored, kl_coef, config)

    trainer = make(tiny_folder, tmp_path, advantage=advantage, kl_coef=0.5, value_coef=1.0)
    update = trainer.update

    def before(run: Any, experience: Any, part: list[int], step: int) -> Any:
        policies.append({name: x.detach().clone() for name, x in trainer.model.state_dict().items()})
        seen[-1].update(experience=experience, head=trainer.critic.head.weight.detach().clone())
        seen[-1]["bias"] = trainer.critic.head.bias.detach().clone()
        return update(run, experience, part, step)

    trainer.update = before  # type: ignore[method-assign]
    trainer.train()
    found = rows(tmp_path)
    assert [row["lag"] for row in found] == [0.0, 1.0, 1.0]
    moved = 0.0
    for step, (given, row) in enumerate(zip(seen, found, strict=True)):
        examples = given["experience"].examples
        reference, _ = outputs(trainer.reference, examples)
        trainer.model.load_state_dict(policies[max(0, step - 1)])
        drawn, entropy = outputs(trainer.model, examples)
        trainer.model.load_state_dict(policies[step])
        old, _ = outputs(trainer.model, examples)
        with torch.no_grad():
            states = models.response_states(trainer.model, pad(examples))
        values = states @ given["head"][0] + given["bias"]
        close = {"rtol": 0, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(torch.cat(given["experience"].rollout_logprobs), drawn, **close)
        torch.testing.assert_close(torch.cat(given["experience"].old_logprobs), old, **close)
        torch.testing.assert_close(torch.cat(given["experience"].old_values), values, **close)
        torch.testing.assert_close(given["scored"].kl, old - reference, **close)
        assert row["kl"] == pytest.approx(float((drawn - reference).sum()) / len(examples), abs=1e-3)
        assert row["entropy"] == pytest.approx(float(entropy.mean()), abs=1e-4)
        weights = (old - drawn).exp()
        assert row["rollout_weight"] == pytest.approx(float(weights.clamp(max=2.0).mean()), abs=1e-4)
        assert row["rollout_clip_fraction"] == pytest.approx(float((weights > 2.0).double().mean()), abs=1e-6)
        assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-4) and row["clip_fraction"] == 0.0
        moved = max(moved, float((weights - 1).abs().max()))
        if step == 0:
            assert torch.equal(
                torch.cat(given["experience"].rollout_logprobs), torch.cat(given["experience"].old_logprobs)
            )
    assert moved > 0.1  # otherwise nothing was told apart


def test_the_loss_weighs_tokens_by_how_much_likelier_they_have_become(tiny_folder: Path, tmp_path: Path) -> None:
    """Up to the cap; without a lag a loss is not given what it would need for that."""
    given: list[dict[str, Any]] = []

    def loss(*args: Any, **options: Any) -> Any:
        given.append({**options, "old_logprobs": args[3]})
        return ops.linear_ppo_loss(*args, **options)

    for lag in (0, 1):
        trainer = make(tiny_folder, tmp_path / str(lag), steps=2, lag=lag, rollout_cap=1.01)
        trainer.loss = loss
        trainer.train()
    assert [("rollout_logprobs" in each, each.get("rollout_cap")) for each in given] == [
        (False, None), (False, None), (True, 1.01), (True, 1.01),
    ]  # fmt: skip
    weights = (given[3]["old_logprobs"] - given[3]["rollout_logprobs"]).exp()
    (*_, last) = rows(tmp_path / "1")
    assert 0.0 < last["rollout_clip_fraction"] == pytest.approx(float((weights > 1.01).float().mean()), abs=1e-6)
    assert not {"lag", "rollout_weight", "rollout_clip_fraction"} & set(rows(tmp_path / "0")[0])


def test_for_a_policy_that_stands_still_a_lag_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    for lag in (0, 1):
        make(tiny_folder, tmp_path / str(lag), lag=lag, optim=OptimConfig(lr=1e-30)).train()
        found[lag] = rows(tmp_path / str(lag))
    for without, with_lag in zip(found[0], found[1], strict=True):
        assert with_lag["rollout_weight"] == pytest.approx(1.0, abs=1e-5) and with_lag["rollout_clip_fraction"] == 0.0
        for name in ("score", "response_tokens", "entropy", "kl", "policy_loss", "value_loss", "grad_norm"):
            assert with_lag[name] == pytest.approx(without[name], abs=1e-5), name
    assert (tmp_path / "0" / "samples.jsonl").read_text().count("\n") == 12


def test_the_next_steps_scores_come_while_this_one_is_learned_from(tiny_folder: Path, tmp_path: Path) -> None:
    """The judge answers for step 2 only once the update of step 1 has begun."""
    learning, answered = threading.Event(), []

    async def judge(prompts: list[Prompt], responses: list[str]) -> list[float]:
        if len(answered) == 1 and not learning.wait(30):
            raise RuntimeError("nobody learns while scores are missing")
        answered.append(len(responses))
        return by_length(prompts, responses)

    trainer = make(tiny_folder, tmp_path, judge, steps=2, reward_retries=0)
    update = trainer.update

    def begun(*given: Any) -> Any:
        learning.set()
        return update(*given)

    trainer.update = begun  # type: ignore[method-assign]
    trainer.train()
    assert answered == [8, 8]


def test_a_run_that_ends_early_neither_waits_nor_asks_for_scores_that_nobody_wants(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Of the second step's 16 calls those are made that had begun: as many as run at a time."""
    release, calls = threading.Event(), []

    async def judge(prompts: list[Prompt], responses: list[str]) -> list[float]:
        calls.append(responses)
        while len(calls) > 16 and not release.is_set():
            await asyncio.sleep(0.01)
        return by_length(prompts, responses)

    trainer = make(tiny_folder, tmp_path, judge, steps=2, samples_per_prompt=4, reward_batch=1)
    trainer.monitors = (lambda step: Stop("enough"),)
    trainer.train()
    release.set()
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(30)
    assert len(rows(tmp_path)) == 1 and 16 < len(calls) <= 16 + IN_FLIGHT


@pytest.mark.parametrize("advantage", ["gae", "remax"])
def test_what_was_sampled_ahead_comes_back_to_the_bit(advantage: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = PPOConfig(prompts_per_step=3, samples_per_prompt=2, max_new_tokens=9, lag=1, advantage=advantage)
    trainer = PPOTrainer(tiny_folder, by_length, PROMPTS, tmp_path, config)
    sampler = trainer.sampler
    assert sampler.state_dict() == {}
    assert sampler.take(4)[1] == 0
    state = json.loads(json.dumps(sampler.state_dict()))
    before, sampler.ahead = sampler.ahead, None
    assert before is not None
    sampler.load_state_dict(state)
    after = sampler.ahead
    assert after is not None and after.step == 5 and after.records == before.records
    pairs = [(before.rollouts, after.rollouts, before.scoring, after.scoring)]
    if advantage == "remax":
        assert before.greedy and after.greedy
        pairs.append((before.greedy[0], after.greedy[0], before.greedy[1], after.greedy[1]))
    for one, other, scoring, again in pairs:
        for name in ("input_ids", "response_mask", "logprobs", "entropy", "cu_seqlens", "prompt_index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.texts == other.texts and one.finish_reasons == other.finish_reasons
        assert scoring.result() == again.result()
    assert (after.greedy is None) == (advantage == "gae")
