"""PPO: the details that make it work, each a named test. docs/ppo.md says which detail is where."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlhf_fast import models, ops
from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig
from rlhf_fast.data.batches import Example, pad
from rlhf_fast.data.templates import Prompt
from rlhf_fast.ops import reference
from rlhf_fast.rewards.scoring import Scores
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.trainers.ppo.experience import Outputs, minibatches
from rlhf_fast.trainers.ppo.kl_controller import KLController
from rlhf_fast.trainers.ppo.sampler import Sampled, step_prompts
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from tests.unit.trainers.seen import collect

TIMED = ("seconds", "decode_roofline", "training_utilisation", "busy")  # metrics that no two runs have the same
PROMPTS = [{"prompt": f"question {i}"} for i in range(12)]


def by_length(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def make(folder: Path, out: Path, reward: Any = by_length, **options: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "steps": 2,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "minibatches": 2,
        "max_new_tokens": 12,
        "lora": LoRAConfig(r=4),
        "optim": OptimConfig(lr=1e-3, schedule="constant", warmup=0.0),
    }
    return PPOTrainer(folder, reward, PROMPTS, out, PPOConfig(**{**settings, **options}))


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def gae_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the trainer hands to ops.gae, filled in when it does, with the rewards that this makes of it."""
    seen: dict[str, torch.Tensor] = {}
    original = ops.gae

    def record(**given: Any) -> tuple[torch.Tensor, ...]:
        nothing = {"values": torch.zeros_like(given["values"]), "gamma": 0.0, "lam": 0.0}
        rewards = original(**{**given, **nothing})[0]  # without a future and a baseline
        seen.update(rewards=rewards, values=given["values"], cu_seqlens=given["cu_seqlens"])
        return original(**given)

    monkeypatch.setattr(ops, "gae", record)
    return seen


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_has_ratio_one_and_no_kl(temperature: float, tiny_folder: Path, tmp_path: Path) -> None:
    """Details 4 and 31: sampling, scoring and training agree on the distribution, temperature included."""
    trainer = make(tiny_folder, tmp_path, steps=1, epochs=1, minibatches=1, temperature=temperature)
    trainer.train()
    (row,) = metrics(tmp_path)
    assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and row["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert row["clip_fraction"] == 0.0 and row["approx_kl"] == pytest.approx(0.0, abs=1e-5)
    assert row["kl"] == pytest.approx(0.0, abs=1e-5) and row["explained_variance"] is not None


def test_the_checks_of_the_first_update_can_fail(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detail 31: a reference that is another model, or a sampler with another temperature, stops the run."""
    trainer = make(tiny_folder, tmp_path)
    for name, parameter in trainer.reference.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with pytest.raises(RuntimeError, match="KL to the reference"):
        trainer.train()

    trainer = make(tiny_folder, tmp_path)
    of_policy, of_reference = trainer.scorer.of_policy, trainer.scorer.of_reference

    def shifted(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part - 0.01 for part in parts]

    def outputs(*given: Any) -> Outputs:
        found = of_policy(*given)
        return found._replace(logprobs=shifted(found.logprobs))

    monkeypatch.setattr(trainer.scorer, "of_policy", outputs)
    monkeypatch.setattr(trainer.scorer, "of_reference", lambda samples: shifted(of_reference(samples)))
    with pytest.raises(RuntimeError, match=r"ratio_mean 1\.010.* instead of 1"):
        trainer.train()


def test_token_rewards_add_up_to_the_score_less_the_kl(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Details 9 and 10: the score stands on the last response token, the KL penalty on every one."""
    scores: list[float] = []

    def reward(prompts: list[Prompt], responses: list[str]) -> list[float]:
        scores[:] = [float(i) for i in range(len(responses))]
        return scores

    trainer = make(tiny_folder, tmp_path, reward, kl_coef=0.5, missing_eos_penalty=0.0)
    for name, parameter in trainer.model.named_parameters():  # away from the reference, so that there is a KL
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    seen = gae_arguments(monkeypatch)
    experience = collect(trainer)
    lengths = seen["cu_seqlens"].diff().tolist()
    rewards = seen["rewards"].split(lengths)
    for i, example in enumerate(experience.examples):
        ids = torch.tensor([[*example.prompt, *example.response]])
        with torch.no_grad():
            kl = [
                torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
                for model in (trainer.model, trainer.reference)
            ]
        start = len(example.prompt) - 1
        k1 = [float(kl[0][start + t, token] - kl[1][start + t, token]) for t, token in enumerate(example.response)]
        assert float(rewards[i].sum()) == pytest.approx(scores[i] - 0.5 * sum(k1), abs=1e-3)
        assert float(rewards[i][-1]) == pytest.approx(scores[i] - 0.5 * k1[-1], abs=1e-4)
        assert rewards[i][:-1].tolist() == pytest.approx([-0.5 * x for x in k1[:-1]], abs=1e-4)


def test_a_response_that_was_cut_pays_the_penalty(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detail 7: subtracted from the score of exactly those that did not end by themselves."""
    seen = gae_arguments(monkeypatch)
    trainer = make(
        tiny_folder, tmp_path, lambda p, r: [1.0] * len(r), missing_eos_penalty=3.0, max_new_tokens=40, kl_coef=0.0
    )
    experience = collect(trainer)
    eos = trainer.tokenizer.eos_token_id
    last = [float(part[-1]) for part in seen["rewards"].split(seen["cu_seqlens"].diff().tolist())]
    ended = [example.response[-1] == eos for example in experience.examples]
    assert True in ended and False in ended, "choose a seed with both kinds"
    assert last == [1.0 if done else -2.0 for done in ended]


def test_advantages_are_whitened_over_the_whole_step(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detail 13: masked mean 0, deviation 1, over all sequences and not by micro-batch; returns are not whitened."""
    trainer = make(tiny_folder, tmp_path)
    experience = collect(trainer)
    original, whitened = ops.linear_ppo_loss, []

    def record(*given: Any, **others: Any) -> Any:
        whitened.append(reference.whiten_by(given[4], others["advantage_sums"]))
        return original(*given, **others)

    trainer.loss = record
    for row in range(len(experience.examples)):
        list(trainer._losses(experience, [row]))
    advantages = torch.cat(whitened)
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantages.std()) == pytest.approx(1.0, abs=1e-3)
    returns = [float(part[0]) for part in experience.returns]
    assert max(returns) > min(returns) > -2.0  # scores less the penalty, as they came


def test_rewards_may_be_whitened_without_losing_their_sign(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = gae_arguments(monkeypatch)
    trainer = make(
        tiny_folder, tmp_path, lambda p, r: [5.0] * len(r), whiten_rewards=True, missing_eos_penalty=0.0, kl_coef=0.0
    )
    collect(trainer)
    ends = seen["cu_seqlens"][1:].long() - 1
    assert bool((seen["rewards"][ends] > 0).all())
    assert float(seen["rewards"].std()) == pytest.approx(1.0, abs=1e-3)


def test_the_value_head_starts_at_zero_and_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """Detail 20: first values are 0; after training the head is in the checkpoint, beside the policy."""
    trainer = make(tiny_folder, tmp_path)
    assert not trainer.critic.head.weight.any() and not trainer.critic.head.bias.any()
    experience = collect(trainer)
    assert not torch.cat(experience.old_values).any()
    trainer.train()
    assert trainer.critic.head.weight.any()
    saved = load_file(tmp_path / "checkpoints" / "step-2" / "value_head.safetensors")
    assert torch.equal(saved["weight"], trainer.critic.head.weight)


def test_the_reference_never_moves(tiny_folder: Path, tmp_path: Path) -> None:
    """Detail 29: bit for bit the same before and after, while the policy changes."""
    trainer = make(tiny_folder, tmp_path, optim=OptimConfig(lr=1e-2))
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        before = trainer.reference(input_ids=ids).logits.clone()
        assert torch.equal(before, trainer.model(input_ids=ids).logits)
    trainer.train()
    with torch.no_grad():
        assert torch.equal(before, trainer.reference(input_ids=ids).logits)
        assert not torch.equal(before, trainer.model(input_ids=ids).logits)


@pytest.mark.parametrize("r", [0, 4])
def test_a_reference_exists_for_adapters_and_for_full_training(r: int, tiny_folder: Path, tmp_path: Path) -> None:
    make(tiny_folder, tmp_path, lora=LoRAConfig(r=r)).train()
    rows = metrics(tmp_path)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5) and rows[1]["kl"] != 0.0


def test_every_epoch_sees_every_sequence_once_in_an_order_of_its_own(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detail 19."""
    trainer = make(tiny_folder, tmp_path, steps=1, epochs=3, minibatches=4)
    rows: list[list[int]] = []
    original = trainer._losses
    monkeypatch.setattr(
        trainer, "_losses", lambda experience, part, *_: (rows.append(part), original(experience, part))[1]
    )
    trainer.train()
    assert [len(part) for part in rows] == [2] * 12
    epochs = [list(itertools.chain(*rows[start : start + 4])) for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_same_seed_gives_the_same_run(tiny_folder: Path, tmp_path: Path) -> None:
    """Detail 25: samples, metrics and weights."""

    def run(out: Path, seed: int) -> tuple[list[dict[str, float]], str, torch.Tensor]:
        trainer = make(tiny_folder, out, seed=seed)
        trainer.train()
        rows = [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in metrics(out)]
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return rows, (out / "samples.jsonl").read_text(), weights

    first, again, other = (run(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first[0] == again[0] and first[1] == again[1] and torch.equal(first[2], again[2])
    assert first[1] != other[1]


def test_prompts_come_round_in_permutations(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path)
    steps = [[record.prompt for record in step_prompts(trainer.prompts, trainer.config, step)] for step in range(1, 7)]
    assert sorted(map(str, itertools.chain(*steps[:3]))) == sorted(row["prompt"] for row in PROMPTS)
    assert sorted(map(str, itertools.chain(*steps[3:]))) == sorted(row["prompt"] for row in PROMPTS)
    assert steps[:3] != steps[3:]


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.2), (0.0, 0.2 * (1 - 0.2 * 0.05)), (60.0, 0.2 * (1 + 0.2 * 0.05)), (6.6, 0.2 * 1.005)]
)
def test_the_adaptive_controller_is_the_papers(kl: float, expected: float) -> None:
    """Detail 12: target 6, horizon 10,000 sequences, an error of at most 20 % counted; 500 sequences here."""
    controller = KLController(0.2, target=6.0, horizon=10_000)
    controller.update(kl, sequences=500)
    assert controller.coef == pytest.approx(expected, rel=1e-6)


def test_a_fixed_coefficient_stays_and_state_is_restored(tiny_folder: Path, tmp_path: Path) -> None:
    controller = KLController(0.2)
    controller.update(100.0, 500)
    assert controller.coef == 0.2
    make(tiny_folder, tmp_path, kl_target=0.001, kl_horizon=10.0).train()
    saved = json.loads((tmp_path / "checkpoints" / "step-2" / "rlhf_fast.json").read_text())["kl_controller"]
    again = KLController(1.0)
    again.load_state_dict(saved)
    assert again.coef == saved["coef"] != 0.05 and again.target == 0.001


def test_what_is_rewarded_is_learned_and_the_kl_penalty_holds_it_back(tiny_folder: Path, tmp_path: Path) -> None:
    """The whole of it: the share of one byte in the samples rises from that of chance, less so under a KL penalty."""

    def share(prompts: list[Prompt], responses: list[str]) -> list[float]:
        return [4.0 * response.count("e") / max(1, len(response)) for response in responses]

    runs = {}
    for kl_coef in (0.0, 1.0):
        trainer = make(
            tiny_folder,
            tmp_path / str(kl_coef),
            share,
            steps=25,
            prompts_per_step=8,
            samples_per_prompt=4,
            max_new_tokens=8,
            epochs=2,
            kl_coef=kl_coef,
            missing_eos_penalty=0.0,
            lora=LoRAConfig(r=0),
            optim=OptimConfig(lr=3e-3, schedule="constant", warmup=0.0, max_tokens_per_microbatch=100_000),
        )
        trainer.train()
        runs[kl_coef] = metrics(tmp_path / str(kl_coef))
    assert runs[0.0][0]["score"] < 0.2 and runs[0.0][-1]["score"] > 2.0
    free, held = (sum(row["kl"] for row in runs[coef][-5:]) / 5 for coef in (0.0, 1.0))
    assert 0.0 < held < 0.5 * free


def test_the_checkpoint_is_the_policy(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path)
    trainer.train()
    again, _ = models.load(tmp_path)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_what_cannot_work_is_refused_before_anything_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="prompts_per_step: 99, but there are only 12 prompts"):
        make(tiny_folder, out, prompts_per_step=99)
    with pytest.raises(ValueError, match=r"row 0: with max_new_tokens = 12 it comes to \d+ tokens, more than"):
        make(tiny_folder, out, max_length=20)
    assert not out.exists()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 99))
def test_minibatches_hold_each_sample_once_and_a_prompts_together(prompts: list[int], count: int, seed: int) -> None:
    examples = [Example((prompt + 1,), (i + 1,)) for i, prompt in enumerate(prompts)]
    parts = minibatches(examples, count, np.random.default_rng(seed))
    assert len(parts) == count
    assert sorted(i for part in parts for i in part) == list(range(len(examples)))
    if len(set(prompts)) >= count:
        assert all(parts)
        of = [{prompts[i] for i in part} for part in parts]
        assert sum(map(len, of)) == len(set(prompts))
    assert parts == minibatches(examples, count, np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reward_models_are_in_the_dtype_of_all_models(dtype: str, tiny_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = models.reward_from(tiny_folder, LoRAConfig(r=0))
    models.save(tmp_path / "reward", model, tokenizer)
    trainer = make(tiny_folder, tmp_path / "out", reward=tmp_path / "reward", dtype=dtype)
    (part,) = trainer.reward.parts
    assert {p.dtype for p in part.function.model.parameters()} == {getattr(torch, dtype)}
    assert len(trainer.reward(trainer.prompts, ["yes"] * len(trainer.prompts)).scores) == len(trainer.prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_in_float32_the_samplers_log_probabilities_are_taken_for_trainings(
    dtype: torch.dtype, tiny_folder: Path, tmp_path: Path
) -> None:
    trainer = make(tiny_folder, tmp_path)
    trainer.model.to(dtype)
    rollouts = trainer.sampler.generator.generate(["a", "b"], SamplingParams(max_new_tokens=8))
    examples = rollouts.examples()
    samples = Sampled(1, [], rollouts, Scores([], {}), None, None)
    logprobs, entropies, values = (torch.cat(x) for x in trainer.scorer.of_policy(samples, 0))
    batch = pad(examples)
    with torch.no_grad():
        states = models.response_states(trainer.model, batch)
        expected, entropy = models.response_logprobs(trainer.model, batch, 1.0, states)
    for got, want in ((logprobs, expected), (entropies, entropy), (values, trainer.critic.head(states.float())[:, 0])):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch.equal(logprobs, rollouts.logprobs[rollouts.response_mask]) == (dtype == torch.float32)


def test_a_run_without_a_critic_learns_and_keeps_no_value_head(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path, advantage="rloo", steps=2)
    before = [p.detach().clone() for p in trainer.optimizer.parameters]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.optimizer.parameters, strict=True))
    (row, *_) = metrics(tmp_path)
    assert "policy_loss" in row and not {"value_loss", "explained_variance"} & set(row)
    assert not list(tmp_path.rglob("value_head.safetensors"))
