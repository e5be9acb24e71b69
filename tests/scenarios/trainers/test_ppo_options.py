"""What PPO can be told: who the critic is, what is paid, when to stop, and advantages and losses of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast import models, ops
from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig, RewardConfig, RunConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.data.templates import Prompt
from rlhf_fast.data.tokenize import tokenize_example
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.trainers.ppo.advantages import Advantages, Scored
from rlhf_fast.trainers.ppo.metrics import operations
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from tests.unit.trainers.seen import collect

PROMPTS = [{"prompt": f"question {i}"} for i in range(8)]


def by_length(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def make(folder: Path, out: Path, reward: Any = by_length, **options: Any) -> PPOTrainer:
    own = {name: options.pop(name) for name in ("advantage_function", "loss") if name in options}
    settings: dict[str, Any] = {
        "steps": 2,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "minibatches": 2,
        "max_new_tokens": 12,
        "lora": LoRAConfig(r=4),
        "optim": OptimConfig(lr=1e-3, schedule="constant", warmup=0.0),
    }
    config = PPOConfig(**{**settings, **options})
    if "advantage_function" in own:
        own["advantage"] = own.pop("advantage_function")
    return PPOTrainer(folder, reward, PROMPTS, out, config, **own)


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def trainable(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def moved(before: list[torch.Tensor], model: Any) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


# The critic -----------------------------------------------------------------------------------------------------------


def test_a_separate_critic_is_trained_apart_and_shares_what_nobody_trains(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path, critic="separate")
    critic = trainer.critic
    assert critic is not None and critic.model is not None
    frozen = {p.data_ptr() for p in trainer.model.parameters() if not p.requires_grad}
    own = {p.data_ptr() for p in critic.model.parameters()}
    assert frozen <= own and not own & {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad}
    before = trainable(critic.model)
    trainer.train()
    assert moved(before, critic.model) and critic.head.weight.any()
    assert not all(torch.equal(a, b) for a, b in zip(trainable(critic.model), trainable(trainer.model), strict=True))
    saved = load_file(tmp_path / "checkpoints" / "step-2" / "value_head.safetensors")
    assert torch.equal(saved["weight"], critic.head.weight)
    assert sum(name.startswith("model.") for name in saved) == len(before)


def test_the_values_of_a_separate_critic_are_those_of_its_model(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path, critic="separate")
    critic = trainer.critic
    assert critic is not None and critic.model is not None
    with torch.no_grad():
        critic.head.weight.normal_()
        for parameter in critic.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        experience = collect(trainer, kl_coef=0.0)
        for example, values in zip(experience.examples, experience.old_values, strict=True):
            states = models.response_states(critic.model, pad([example]))
            torch.testing.assert_close(values, critic.head(states).squeeze(-1), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def reward_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward") / "run"
    data = [{"prompt": f"q{i}", "chosen": "a" * (3 + i % 4) + "!", "rejected": "b" * (3 + i % 5)} for i in range(40)]
    config = RewardConfig(batch_size=8, lora=LoRAConfig(r=4), optim=OptimConfig(lr=3e-3), max_length=200)
    RewardTrainer(tiny_folder, data, out, config).train()
    return out


def test_a_critic_can_begin_as_the_reward_model(reward_model: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Its value of a whole response is the score."""
    trainer = make(tiny_folder, tmp_path, str(reward_model), critic="reward", min_reward_agreement=0.0)
    critic = trainer.critic
    assert critic is not None and critic.model is not None
    assert all("lora_" in name for name, p in critic.model.named_parameters() if p.requires_grad)
    prompts, responses = ["q1", "q2"], ["aaaa!", "bbb"]
    score = RewardModel(reward_model)
    examples = [tokenize_example(score.tokenizer, p, r, name="x") for p, r in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        batch = pad(examples)
        states = models.hidden_states(critic.model, batch.input_ids).flatten(0, 1)[batch.last]
    assert critic.head(states).squeeze(-1).tolist() == pytest.approx(score(list(prompts), responses), abs=1e-4)
    before = trainable(critic.model)
    trainer.train()
    assert moved(before, critic.model)
    assert rows(tmp_path)[0]["explained_variance"] is not None


def test_a_critic_from_a_reward_needs_a_reward_model(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"ppo\.critic: 'reward' starts from a reward model's checkpoint, but the reward"
    ):
        make(tiny_folder, tmp_path, critic="reward")


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_while_it_warms_up_only_the_critic_learns(critic: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Detail 32."""
    trainer = make(tiny_folder, tmp_path, critic=critic, critic_warmup=2, steps=2)
    assert trainer.critic is not None
    before = trainable(trainer.model)
    trainer.train()
    assert not moved(before, trainer.model) and trainer.critic.head.weight.any()
    assert all(abs(row["kl"]) < 1e-4 for row in rows(tmp_path))
    trainer = make(tiny_folder, tmp_path / "after", critic=critic, critic_warmup=1, steps=2)
    before = trainable(trainer.model)
    trainer.train()
    assert moved(before, trainer.model)


# What is paid ---------------------------------------------------------------------------------------------------------


def scored(trainer: PPOTrainer, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[bool]]:
    """What is paid for each response of a step, and which were cut."""
    seen: list[Scored] = []
    original = trainer.advantage
    monkeypatch.setattr(trainer, "advantage", lambda s, c, g: (seen.append(s), original(s, c, g))[1])
    experience = collect(trainer, kl_coef=0.0)
    ends = {trainer.tokenizer.eos_token_id, *trainer.config.stop_token_ids}
    return seen[0].scores.tolist(), [example.response[-1] not in ends for example in experience.examples]


def numbered(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [float(i) for i in range(len(responses))]


STOPS = tuple(range(4, 60))  # a fifth of a random model's tokens


@pytest.mark.parametrize("how", ["subtract", "replace"])
def test_a_response_without_an_end_pays_whatever_ends_it(
    how: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detail 7, with stop tokens of one's own."""
    trainer = make(
        tiny_folder,
        tmp_path,
        numbered,
        stop_token_ids=STOPS,
        missing_eos=how,
        missing_eos_penalty=2.0,
        max_new_tokens=4,
    )
    got, cut = scored(trainer, tmp_path, monkeypatch)
    assert set(cut) == {True, False}
    expected = [(i - 2.0 if how == "subtract" else -2.0) if missing else float(i) for i, missing in enumerate(cut)]
    assert got == expected


def test_scores_are_clipped_before_the_penalty(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(
        tiny_folder, tmp_path, lambda p, r: [-9.0, 9.0, 0.5, -0.5] * 2, reward_clip=2.0, missing_eos_penalty=0.25
    )
    got, cut = scored(trainer, tmp_path, monkeypatch)
    assert got == [x - 0.25 * c for x, c in zip([-2.0, 2.0, 0.5, -0.5] * 2, cut, strict=True)]


# When to stop ---------------------------------------------------------------------------------------------------------


def test_a_run_ends_when_it_is_too_far_from_its_reference(tiny_folder: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=0.05, schedule="constant", warmup=0.0)
    result = make(tiny_folder, tmp_path, steps=9, kl_coef=0.0, max_kl=0.05, optim=optim).train()
    found = rows(tmp_path)
    assert 1 < len(found) < 9 and found[-1]["kl"] > 0.05 and all(row["kl"] <= 0.05 for row in found[:-1])
    assert result["checkpoint"] == f"step-{len(found)}" and result["summary"]["kl"] == found[-1]["kl"]


def test_updates_of_a_step_end_when_they_have_moved_the_policy_far_enough(tiny_folder: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=0.05, schedule="constant", warmup=0.0)
    for limit, updates in ((None, 8.0), (1e-4, None)):
        out = tmp_path / str(limit)
        make(tiny_folder, out, steps=1, epochs=4, max_update_kl=limit, optim=optim).train()
        (row,) = rows(out)
        assert row["updates"] == updates if updates else 1.0 < row["updates"] < 8.0


def test_checkpoints_of_a_long_run_rotate(tiny_folder: Path, tmp_path: Path) -> None:
    make(tiny_folder, tmp_path, steps=5, run=RunConfig(save_every=1, keep_last=1)).train()
    kept = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    rewards = [row["reward"] for row in rows(tmp_path)]
    assert kept == {"step-5", f"step-{1 + rewards.index(max(rewards))}"}
    assert models.resolve(tmp_path).endswith("step-5")


# Other advantages and losses ------------------------------------------------------------------------------------------


def test_remax_holds_a_response_against_the_likeliest(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(
        tiny_folder, tmp_path, advantage="remax", samples_per_prompt=1, minibatches=1, missing_eos_penalty=0.5, steps=1
    )
    assert trainer.critic is None
    with torch.no_grad():  # away from the reference, for a penalty
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02
    seen: list[Scored] = []
    original = trainer.advantage
    trainer.advantage = lambda s, c, g: (seen.append(s), original(s, c, g))[1]
    experience = collect(trainer, kl_coef=0.7)

    def of(prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
        ended = response[-1] == trainer.tokenizer.eos_token_id
        return len(trainer.tokenizer.decode(response, skip_special_tokens=True)) / 10 - (0.0 if ended else 0.5)

    kl = seen[0].kl.split([len(e.response) for e in experience.examples])
    for example, advantages, distance in zip(experience.examples, experience.advantages, kl, strict=True):
        ids = torch.tensor([example.prompt])
        greedy = trainer.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )[0, len(example.prompt) :]
        expected = (
            of(example.prompt, example.response)
            - 0.7 * float(distance.sum())
            - of(example.prompt, tuple(greedy.tolist()))
        )
        torch.testing.assert_close(advantages, torch.full_like(advantages, expected), rtol=0, atol=1e-4)
    make(tiny_folder, tmp_path / "run", advantage="remax").train()


def test_an_advantage_function_of_ones_own(tiny_folder: Path, tmp_path: Path) -> None:
    def best_of_step(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        lengths = scored.cu_seqlens.diff().long()
        best = (scored.scores == scored.scores.max()).float()
        return Advantages(best.repeat_interleave(lengths), None, None)

    trainer = make(tiny_folder, tmp_path, advantage="rloo", advantage_function=best_of_step)
    experience = collect(trainer, kl_coef=0.0)
    assert {float(x) for part in experience.advantages for x in part} == {0.0, 1.0}
    trainer.train()
    assert "best_of_step" in (tmp_path / "config.yaml").read_text()


def test_a_loss_of_ones_own_gets_what_the_op_gets(tiny_folder: Path, tmp_path: Path) -> None:
    calls: list[Any] = []

    def loss(*given: Any, **words: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        calls.append(words)
        found, stats = ops.linear_ppo_loss(*given, **words)
        return 2.0 * found, {**stats, "mine": found.detach() * 0 + 3.0 / words["denominator"]}

    trainer = make(tiny_folder, tmp_path, loss=loss, steps=1, minibatches=1, epochs=1)
    trainer.train()
    (row,) = rows(tmp_path)
    assert row["mine"] == pytest.approx(3.0 * len(calls) / calls[0]["denominator"]) and "ratio_min" not in row
    make(tiny_folder, tmp_path / "plain", steps=1, minibatches=1, epochs=1).train()
    assert row["grad_norm"] == pytest.approx(2 * rows(tmp_path / "plain")[0]["grad_norm"], rel=1e-4)


# What is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, 4])
def test_the_operations_of_training_are_counted_by_hand(r: int, tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make(tiny_folder, tmp_path, lora=LoRAConfig(r=r), samples_per_prompt=1, minibatches=1)
    experience = collect(trainer, kl_coef=0.0)
    tokens = sum(map(len, experience.examples))
    config = trainer.model.config
    h, layers = config.hidden_size, config.num_hidden_layers
    kv = h // config.num_attention_heads * config.num_key_value_heads
    of_layer = {
        "in": [h, h, h, h, h, h, config.intermediate_size],
        "out": [h, kv, kv, h, config.intermediate_size, config.intermediate_size, h],
    }
    weights = layers * sum(a * b for a, b in zip(of_layer["in"], of_layer["out"], strict=True)) + h * config.vocab_size
    adapters = layers * r * sum(of_layer["in"] + of_layer["out"])
    expected = tokens * (4 * (weights + adapters) + 2 * (adapters if r else weights))
    assert operations(trainer.model, experience.examples, bool(trainer.shared)) == expected


def test_a_step_tells_its_times_and_what_part_of_the_machine_it_used(tiny_folder: Path, tmp_path: Path) -> None:
    make(tiny_folder, tmp_path).train()
    found = rows(tmp_path)
    parts = [row[f"seconds_{part}"] for row in found for part in ("rollout", "scoring", "training")]
    assert all(part > 0 for part in parts) and sum(parts) <= found[-1]["seconds"] + 1e-2
    for row in found:
        assert 0 < row["busy"] <= 1.1
        assert 0 < row["decode_roofline"] < 1 and 0 < row["training_utilisation"] < 1
