"""Every setting of PPO reaches what it names; those that all trainers have are in test_settings.py.

A setting that is in neither table fails `test_every_setting_of_ppo_is_in_a_table`.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig, RewardConfig
from rlhf_fast.rewards import calls as reward_calls
from rlhf_fast.rewards.calls import RewardError
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from tests.unit.trainers.seen import Seen, run
from tests.unit.trainers.test_settings import NESTED, OF_ALL

PROMPTS = [{"prompt": f"question {i}"} for i in range(12)]
STOPS = tuple(range(4, 40))  # a seventh of a random model's tokens
LEARNS = OptimConfig(lr=1e-2, schedule="constant", warmup=0.0)


def first_alike(prompts: list[Any], responses: list[str]) -> list[float]:
    """0 for all responses to the first prompt, the length of others."""
    return [0.0 if prompt == prompts[0] else len(r) for prompt, r in zip(prompts, responses, strict=True)]


# The runs that settings are seen in, each on top of SMALL.
SMALL: dict[str, Any] = {
    "steps": 2, "prompts_per_step": 3, "samples_per_prompt": 2, "minibatches": 2, "epochs": 2, "max_new_tokens": 12,
    "lora": LoRAConfig(r=4), "optim": LEARNS,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "main": {
        "steps": 3, "epochs": 3, "max_new_tokens": 7, "stop_token_ids": STOPS, "temperature": 0.7, "kl_coef": 0.3,
        "gamma": 0.9, "lam": 0.8, "clip_low": 0.15, "clip_high": 0.3, "value_clip": 0.4, "value_coef": 0.5,
        "reward_clip": 0.6, "missing_eos": "replace", "missing_eos_penalty": 2.5, "dual_clip": 3.0,
    },
    "whitened": {"steps": 1, "whiten_rewards": True, "kl_coef": 0.3},
    "untargeted": {},
    "targeted": {"steps": 3, "kl_horizon": 50.0},  # and a kl_target that is set below
    "far": {"steps": 5, "max_kl": 1e-3, "kl_coef": 0.0},
    "moved": {"steps": 1, "epochs": 4, "max_update_kl": 1e-6},
    "in the loss": {"kl_in": "loss", "kl_coef": 0.3, "critic": "separate", "critic_warmup": 1},
    "grpo": {"advantage": "grpo", "scale": "batch", "steps": 1},
    "again": {"advantage": "rloo", "resample": 2, "steps": 1, "missing_eos_penalty": 0.0, "reward": first_alike},
    "behind": {"lag": 1, "rollout_cap": 1.5},
    "sequences": {"ratio": "sequence", "aggregation": "sequence_mean", "steps": 1},
    "cispo": {"objective": "cispo", "steps": 1},
    "sapo": {"objective": "sapo", "tau_pos": 1.5, "tau_neg": 2.5, "steps": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def seen(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """`seen("main")`: that run, made once."""
    made: dict[str, Seen] = {}
    folder = tmp_path_factory.mktemp("settings")

    def find(name: str) -> Seen:
        if name not in made:
            options = {**SMALL, **RUNS[name]}
            if name == "targeted":  # near enough to what the KL is after a step that nothing is clamped
                options["kl_target"] = 1.1 * find("untargeted").steps[1]["kl"]
            made[name] = run("ppo", tiny_folder, folder / name.replace(" ", "-"), PROMPTS, **options)
            assert made[name].error is None, made[name].error
        return made[name]

    return find


# How settings are seen ------------------------------------------------------------------------------------------------

Check = Callable[[Seen], None]


def checked(condition: Callable[[Seen], Any], expected: Any = True) -> Check:
    def check(found: Seen) -> None:
        assert condition(found) == expected

    return check


def told(name: str, value: float) -> Check:
    """What the loss is given by that name, in every call."""
    return checked(lambda found: {call.words.get(name) for call in found.losses}, {value})


def lengths(found: Seen, step: int = 0) -> list[int]:
    return [int(n) for n in found.scored[step][0].cu_seqlens.diff()]


def is_sampled_and_learned_at(found: Seen) -> None:
    """The same temperature in both: the first ratios are 1."""
    assert {call.words["temperature"] for call in found.losses} == {0.7}
    assert float(found.losses[0].stats["ratio_max"]) == pytest.approx(1.0, abs=1e-3)
    assert {params.temperature for params, _ in found.sampled} == {0.7}


def ends_at_stop_tokens(found: Seen) -> None:
    responses = [e.response for _, rollouts in found.sampled for e in rollouts.examples()]
    assert any(response[-1] in STOPS and len(response) < 7 for response in responses)
    assert not any(token in STOPS for response in responses for token in response[:-1])


def every_sample_is_learned_from(times: int) -> Check:
    def check(found: Seen) -> None:
        drawn = Counter(e.response for e in found.sampled[0][1].examples())
        assert found.learned_from(0) == {response: times * n for response, n in drawn.items()}

    return check


def pays_as_told(found: Seen) -> None:
    """A score of at most 0.6, and -2.5 for each that was cut off."""
    for (scored, _, _), (_, rollouts), (_, _, raw) in zip(found.scored, found.sampled, found.rewarded, strict=True):
        ends = rollouts.finish_reasons
        expected = [min(0.6, score) if end == "stop" else -2.5 for score, end in zip(raw, ends, strict=True)]
        assert scored.scores.tolist() == pytest.approx(expected)
    assert max(found.rewarded[0][2]) > 0.6 and {"stop", "length"} <= {
        e for _, r in found.sampled for e in r.finish_reasons
    }


def estimated(
    found: Seen, step: int, gamma: float, lam: float, whiten: bool = False
) -> tuple[list[float], list[float]]:
    """Advantages, not whitened, and returns of a step, by hand."""
    scored, kl_coef, _ = found.scored[step]
    sizes = lengths(found, step)
    assert scored.values is not None
    rewards = [(-kl_coef * part).double() for part in scored.kl.split(sizes)]
    for part, score in zip(rewards, scored.scores.tolist(), strict=True):
        part[-1] += score
    if whiten:  # around their mean, which stays
        mean, deviation = torch.cat(rewards).mean(), torch.cat(rewards).std()
        rewards = [(part - mean) / deviation + mean for part in rewards]
    advantages, values = [], [part.tolist() for part in scored.values.split(sizes)]
    for part, own in zip(rewards, values, strict=True):
        after, made = 0.0, []
        for t in reversed(range(len(own))):
            following = own[t + 1] if t + 1 < len(own) else 0.0
            after = float(part[t]) + gamma * following - own[t] + gamma * lam * after
            made.append(after)
        advantages += made[::-1]
    return advantages, [a + v for a, v in zip(advantages, itertools.chain(*values), strict=True)]


def given_to_the_loss(found: Seen, step: int, what: str) -> list[float]:
    """Of the first epoch of a step, in the order of their size."""
    each = len(found.losses) // len(found.steps)
    calls = found.losses[step * each : step * each + each // found.config.epochs]
    return sorted(x for call in calls for x in (call.inputs[4] if what == "advantages" else call.words[what]).tolist())


def is_estimated_by_hand(found: Seen) -> None:
    """In the second step, when values are no longer 0, and the discount is told from lambda."""
    scored = found.scored[1][0]
    assert scored.values is not None and float(scored.values.abs().max()) > 0.01
    advantages, returns = estimated(found, 1, gamma=0.9, lam=0.8)
    assert given_to_the_loss(found, 1, "advantages") == pytest.approx(sorted(advantages), abs=1e-5)
    assert given_to_the_loss(found, 1, "returns") == pytest.approx(sorted(returns), abs=1e-5)


def is_whitened_by_hand(found: Seen) -> None:
    advantages, _ = estimated(found, 0, gamma=1.0, lam=0.95, whiten=True)
    assert given_to_the_loss(found, 0, "advantages") == pytest.approx(sorted(advantages), abs=1e-4)
    assert advantages != pytest.approx(estimated(found, 0, gamma=1.0, lam=0.95)[0], abs=1e-2)


def adapts(found: Seen) -> None:
    """By hand, with a KL that is far below the target at first and near it then."""
    kls, coefs = ([row[name] for row in found.steps] for name in ("kl", "kl_coef"))
    target = found.config.kl_target
    assert abs(kls[1] / target - 1) < 0.2
    second = 0.05 * (1 - 0.2 * 6 / 50)
    assert coefs == pytest.approx([0.05, second, second * (1 + (kls[1] / target - 1) * 6 / 50)])
    assert [coef for _, coef, _ in found.scored] == coefs


def has_the_penalty_in_the_loss(found: Seen) -> None:
    assert {call.words["kl_coef"] for call in found.losses} == {0.3}
    assert all(call.words["ref_logprobs"] is not None for call in found.losses)
    assert {coef for _, coef, _ in found.scored} == {0.0}


def has_its_own_model(found: Seen) -> None:
    own = {id(p) for p in found.trainer.model.parameters()}
    others = [w for w in found.updates[0].weights if id(w) not in own]
    assert len(others) == len([w for w in found.updates[0].weights if id(w) in own]) + 2  # and a head with a bias


def warms_up(found: Seen) -> None:
    own = {id(p) for p in found.trainer.model.parameters()}
    moved = [
        any(g is not None and g.any() for w, g in zip(u.weights, u.gradients, strict=True) if id(w) in own)
        for u in found.updates
    ]
    assert moved == [False] * 4 + [True] * 4


def compares_over_the_step(found: Seen) -> None:
    """GRPO's advantages, but divided by the deviation of all scores."""
    scores = found.scored[0][0].scores.view(3, 2).double()
    expected = (scores - scores.mean(1, keepdim=True)) / scores.std()
    of_tokens = expected.flatten().float().repeat_interleave(torch.tensor(lengths(found)))
    assert given_to_the_loss(found, 0, "advantages") == pytest.approx(sorted(of_tokens.tolist()), abs=1e-4)
    assert all("values" not in call.words for call in found.losses)


def samples_again(found: Seen) -> None:
    """The first prompt's responses score alike, always: others stand in for it, twice."""
    assert found.steps[0]["resampled"] == 2 and len(found.sampled) == 3


def is_behind(found: Seen) -> None:
    assert [row["lag"] for row in found.steps] == [0.0, 1.0]
    assert all("rollout_logprobs" in call.words for call in found.losses)


HERE: dict[str, tuple[str, Check]] = {
    "steps": ("main", checked(lambda found: len(found.steps), 3)),
    "prompts_per_step": ("main", checked(lambda found: [len(set(p)) for p, _, _ in found.rewarded], [3] * 3)),
    "samples_per_prompt": ("main", checked(lambda f: {n for p, _, _ in f.rewarded for n in Counter(p).values()}, {2})),
    "max_new_tokens": ("main", checked(lambda found: max(lengths(found)), 7)),
    "stop_token_ids": ("main", ends_at_stop_tokens),
    "temperature": ("main", is_sampled_and_learned_at),
    "epochs": ("main", every_sample_is_learned_from(3)),
    "minibatches": ("main", checked(lambda found: [row["updates"] for row in found.steps], [6.0] * 3)),
    "kl_coef": ("main", checked(lambda found: [coef for _, coef, _ in found.scored], [0.3] * 3)),
    "kl_target": ("targeted", adapts),
    "kl_horizon": ("targeted", adapts),
    "max_kl": ("far", checked(lambda found: 1 < len(found.steps) < 5)),
    "max_update_kl": ("moved", checked(lambda found: 0 < found.steps[0]["updates"] < 8)),
    "advantage": ("grpo", compares_over_the_step),
    "kl_in": ("in the loss", has_the_penalty_in_the_loss),
    "scale": ("grpo", compares_over_the_step),
    "resample": ("again", samples_again),
    "critic": ("in the loss", has_its_own_model),
    "critic_warmup": ("in the loss", warms_up),
    "gamma": ("main", is_estimated_by_hand),
    "lam": ("main", is_estimated_by_hand),
    "ratio": ("sequences", told("ratio", "sequence")),
    "objective": ("cispo", told("objective", "cispo")),
    "aggregation": ("sequences", told("aggregation", "sequence_mean")),
    "tau_pos": ("sapo", told("tau_pos", 1.5)),
    "tau_neg": ("sapo", told("tau_neg", 2.5)),
    "dual_clip": ("main", told("dual_clip", 3.0)),
    "clip_low": ("main", told("clip_low", 0.15)),
    "clip_high": ("main", told("clip_high", 0.3)),
    "value_clip": ("main", told("value_clip", 0.4)),
    "value_coef": ("main", told("value_coef", 0.5)),
    "whiten_rewards": ("whitened", is_whitened_by_hand),
    "reward_clip": ("main", pays_as_told),
    "missing_eos": ("main", pays_as_told),
    "missing_eos_penalty": ("main", pays_as_told),
    "lag": ("behind", is_behind),
    "rollout_cap": ("behind", told("rollout_cap", 1.5)),
}
BELOW = {"min_reward_agreement", "reward_timeout", "reward_retries", "reward_batch", "cuda_graphs"}


@pytest.mark.parametrize("name", HERE)
def test_a_setting_of_ppo_reaches_what_it_names(name: str, seen: Callable[[str], Seen]) -> None:
    which, check = HERE[name]
    found = seen(which)
    assert getattr(found.config, name) != getattr(PPOConfig(), name), "a run with the default shows nothing"
    check(found)


def test_every_setting_of_ppo_is_in_a_table() -> None:
    """A new one is to be added, with what it does."""
    assert {f.name for f in fields(PPOConfig)} == {*HERE, *BELOW, *OF_ALL, *NESTED, "seed"}


# Settings of how rewards are had --------------------------------------------------------------------------------------


def trainer(folder: Path, out: Path, reward: Any, **options: Any) -> PPOTrainer:
    return PPOTrainer(folder, reward, PROMPTS, out, PPOConfig(**{**SMALL, "steps": 1, **options}))


def test_the_agreement_that_a_reward_model_needs(tiny_folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    pairs += [{"prompt": f"r{i}", "chosen": "no", "rejected": "yes"} for i in range(12)]  # which nobody can learn
    RewardTrainer(tiny_folder, pairs, tmp_path / "reward", RewardConfig(heldout=0.5, max_steps=1)).train()
    trainer(tiny_folder, tmp_path / "low", tmp_path / "reward", min_reward_agreement=0.0)
    with pytest.raises(ValueError, match=r"less than ppo\.min_reward_agreement = 100%"):
        trainer(tiny_folder, tmp_path / "high", tmp_path / "reward", min_reward_agreement=1.0)


def test_how_often_a_failed_reward_is_asked_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_calls, "FIRST_PAUSE", 0.0)
    calls = []

    def fail(prompts: list[Any], responses: list[str]) -> list[float]:
        calls.append(len(responses))
        raise OSError("away")

    for retries in (0, 3):
        calls.clear()
        with pytest.raises(RewardError, match="away"):
            trainer(tiny_folder, tmp_path / str(retries), fail, reward_retries=retries).train()
        assert len(calls) == retries + 1


def test_how_long_a_reward_is_waited_for(tiny_folder: Path, tmp_path: Path) -> None:
    def sleep(prompts: list[Any], responses: list[str]) -> list[float]:
        time.sleep(0.2)
        return [0.0] * len(responses)

    trainer(tiny_folder, tmp_path / "long", sleep, reward_timeout=60.0, reward_retries=0).train()
    with pytest.raises(RewardError, match=r"no answer within 0\.05 s"):
        trainer(tiny_folder, tmp_path / "short", sleep, reward_timeout=0.05, reward_retries=0).train()


def test_how_many_responses_a_call_of_a_reward_has(tiny_folder: Path, tmp_path: Path) -> None:
    sizes: list[int] = []

    async def count(prompts: list[Any], responses: list[str]) -> list[float]:
        sizes.append(len(responses))
        return [0.0] * len(responses)

    trainer(tiny_folder, tmp_path, count, reward_batch=4).train()
    assert sorted(sizes) == [2, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can record them")
def test_cuda_graphs_reach_the_generator_which_a_cpu_refuses(tiny_folder: Path, tmp_path: Path) -> None:
    trainer(tiny_folder, tmp_path / "off", lambda prompts, responses: [0.0] * len(responses))
    with pytest.raises(ValueError, match="cuda_graphs: the model is on cpu"):
        trainer(tiny_folder, tmp_path / "on", lambda prompts, responses: [0.0] * len(responses), cuda_graphs=True)
