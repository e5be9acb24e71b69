"""Every setting of the trainers reaches what it names: a value other than the default is seen where it acts.

A setting that is in no table here fails `test_every_setting_is_in_a_table`.
"""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, RunConfig
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE
from rlhf_fast.rewards.model import RewardModel
from tests.unit.trainers.seen import CONFIGS, Seen, run

METHODS = list(CONFIGS)
LONG = "word " * 30
ROWS = [{"prompt": f"a<user>b {i}", "completion": f"answer {i % 3}"} for i in range(12)]
CONVERSATION = {
    "messages": [
        {"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")
    ]
}  # fmt: skip
PAIRS = [{"prompt": f"a<user>b {i}", "chosen": f"yes {i % 3}", "rejected": "no"} for i in range(12)]
ROLES = ("demonstrations", "heldout")
STEPS = 6  # of the run `trained`: half of the rows, twice in each of three epochs

# Runs of every trainer; those of the tables below are made of them -------------------------------------------------

COMMON: dict[str, dict[str, Any]] = {
    "told": {
        "template_kwargs": {"mood": "kind"}, "parse_special_tokens": True, "date": "2020-02-29", "max_length": 90,
        "overlong": "truncate", "dtype": "bfloat16", "lora": LoRAConfig(r=3, alpha=7.5, targets=("q_proj", "up_proj")),
    },
    "trained": {
        "lora": LoRAConfig(r=2),
        "optim": OptimConfig(
            lr=3e-3, schedule="linear", warmup=0.5, weight_decay=0.2, adam_eps=1e-3, max_grad_norm=0.05,
            max_tokens_per_microbatch=32, checkpointing=True,
        ),
        "run": RunConfig(save_every=1, keep_last=4, trackers=("wandb",)),
    },
    "plain": {},
    "seeded": {"seed": 3},
    "split": {"seed": 3},
    "broken": {"optim": OptimConfig(max_skipped=1)},
    "flat": {"optim": OptimConfig(lr=1e-30)},  # nothing gets better
}  # fmt: skip
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "told": {"turns": "last", "packing": False, "max_steps": 1, "heldout": 0.0},
        "trained": {"epochs": 3, "batch_size": 5, "heldout": 0.5, "samples": 2, "sample_tokens": 5},
        "plain": {"samples": 0, "max_steps": 1, "heldout": 0.0},
        "seeded": {"samples": 0, "max_steps": 1, "heldout": 0.0},
        "split": {"samples": 0, "max_steps": 1, "heldout": 0.5},
        "broken": {"samples": 0, "batch_size": 2},
        "flat": {"samples": 0, "patience": 1, "epochs": 4},
    },
    "reward": {
        "told": {"center_coef": 0.7, "heads": 3, "lcb": 0.5, "normalize_samples": 2, "max_new_tokens": 6,
                 "batch_size": 4, "max_steps": 1},
        "trained": {"epochs": 3, "batch_size": 5, "heldout": 0.5},
        "plain": {"max_steps": 1, "batch_size": 4, "heldout": 0.0},
        "seeded": {"max_steps": 1, "batch_size": 4, "heldout": 0.0},
        "split": {"max_steps": 1, "heldout": 0.5},
        "broken": {"batch_size": 2},
        "flat": {"patience": 1, "epochs": 4},
    },
    "dpo": {
        "told": {"loss": "robust", "beta": 0.3, "label_smoothing": 0.2, "max_steps": 1, "batch_size": 4},
        "trained": {"epochs": 3, "batch_size": 5, "heldout": 0.5},
        "plain": {"max_steps": 1, "batch_size": 4, "heldout": 0.0},
        "seeded": {"max_steps": 1, "batch_size": 4, "heldout": 0.0},
        "split": {"max_steps": 1, "heldout": 0.5},
        "broken": {"batch_size": 2},
        "flat": {"patience": 1, "epochs": 4},
    },
    "ppo": {
        "told": {"prompts_per_step": 12},
        "trained": {"steps": 6, "epochs": 1, "minibatches": 1},
        "broken": {"steps": 4, "epochs": 1, "minibatches": 1},
    },
}  # fmt: skip
OF_PPO = {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 2, "minibatches": 1, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def seen(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Seen]:
    """`seen("sft", "told")`: that run of that trainer, made once."""
    made: dict[tuple[str, str], Seen] = {}
    folder = tmp_path_factory.mktemp("settings")
    template = folder / "template.jinja"
    template.write_text("{{ 'be ' + mood if mood else '' }}{{ strftime_now('%Y-%m-%d') }}[mine]" + CHAT_TEMPLATE)

    def find(method: str, name: str) -> Seen:
        if (method, name) in made:
            return made[method, name]
        options = {**COMMON[name], **(OF_PPO if method == "ppo" else {}), **OWN[method].get(name, {})}
        data: list[dict[str, Any]] = list(PAIRS if method in ("reward", "dpo") else ROWS)
        if name == "told":
            options["chat_template"] = str(template)
            data[0] = {**data[0], "prompt": LONG}
            data += [CONVERSATION] if method == "sft" else []
        tracked: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            calls = {"init": lambda **_: None, "log": lambda row, step: tracked.append(row), "finish": lambda: None}
            table = {"Table": lambda columns, data: None}
            patch.setitem(sys.modules, "wandb", types.SimpleNamespace(**calls, **table))  # type: ignore[arg-type]
            found = run(method, tiny_folder, folder / method / name, data, spoil=name == "broken", **options)
        found.tracked = tracked
        assert (found.error is None) == (name != "broken"), found.error
        made[method, name] = found
        return found

    return find


# What is seen of each setting: in which run, and how ------------------------------------------------------------------

Check = Callable[[Seen], None]
Table = dict[str, tuple[str, Check]]


def checked(condition: Callable[[Seen], Any], expected: Any = True) -> Check:
    def check(found: Seen) -> None:
        assert condition(found) == expected

    return check


def in_texts(text: str) -> Check:
    """All that the model read in training has it."""
    return checked(lambda found: all(text in each for each in found.texts))


def follows_the_schedule(found: Seen) -> None:
    """Three steps of warm-up, then linearly to zero."""
    expected = [3e-3 * factor for factor in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)]
    assert [update.settings["lr"] for update in found.updates] == pytest.approx(expected)
    assert [row["lr"] for row in found.steps] == pytest.approx(expected)


def is_clipped(found: Seen) -> None:
    for row, update in zip(found.steps, found.updates, strict=True):
        assert float(update.gradient.norm()) == pytest.approx(min(0.05, row["grad_norm"]), rel=1e-3)
    assert max(row["grad_norm"] for row in found.steps) > 0.06


def is_in_small_parts(found: Seen) -> None:
    longest = max(ids.shape[1] for ids in found.read)
    assert all(ids.numel() <= max(32, longest) for ids in found.read) and len(found.read) > 2 * len(found.updates)


def ends_after_two(found: Seen) -> None:
    assert isinstance(found.error, FloatingPointError) and "in 2 steps in a row, up to step 3" in str(found.error)
    assert len(found.steps) == 3


def is_cut(found: Seen) -> None:
    pad = found.trainer.tokenizer.pad_token_id
    lengths = [int((row != pad).sum()) for ids in found.read for row in ids]
    if isinstance(found.config, RewardConfig | DPOConfig):  # several responses in a row
        lengths = [len(example) for group in found.trainer.training for example in group.examples]
    if isinstance(found.config, PPOConfig):  # whose prompts leave room for a response
        lengths = [len(e.prompt) + 8 for _, rollouts in found.sampled for e in rollouts.examples()]
    assert 78 < max(lengths) <= 90


def learns_the_last_turn(found: Seen) -> None:
    learned = [
        found.trainer.tokenizer.decode([t for t, own in zip(each.input_ids, each.loss_mask, strict=True) if own])
        for row in found.trainer.training
        for each in row
    ]
    assert "assistant 1<eos>" in learned and not any("assistant 0" in text for text in learned)


def is_the_heads_lower_bound(found: Seen) -> None:
    reward = RewardModel(found.out)
    (example,) = reward.examples(["q"], ["a"])
    ids = torch.tensor([[*example.prompt, *example.response]])
    with torch.no_grad():
        by_head = reward.model(input_ids=ids).logits[0]
    assert by_head.shape == (3,)
    expected = (by_head.mean() - 0.5 * by_head.std(correction=0) - reward.mean) / reward.std
    assert reward(["q"], ["a"]) == pytest.approx([float(expected)], abs=1e-4)


def samples_are_short(found: Seen) -> None:
    counts = [len(e.response) for _, rollouts in found.sampled for e in rollouts.examples()]
    assert max(counts) == 5


def parsed(found: Seen) -> list[int]:
    """How many <user> tokens there are in what was read, of which the template writes one."""
    user = found.trainer.tokenizer.convert_tokens_to_ids("<user>")
    return [int((row == user).sum()) for ids in found.read for row in ids]


def per_epoch(found: Seen) -> int:
    return math.ceil(len(found.trainer.training) / found.config.batch_size)


def adapter(found: Seen) -> dict[str, Any]:
    folder = found.out / "checkpoints" / f"step-{found.checkpoints[-1]}"
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def frozen_dtype(found: Seen) -> torch.dtype:
    return next(p.dtype for p in found.trainer.model.parameters() if not p.requires_grad)


OF_LORA: Table = {
    "r": (
        "told",
        checked(lambda found: {p.shape[0] for p in found.updates[0].weights[:1]} | {adapter(found)["r"]}, {3}),
    ),
    "alpha": ("told", checked(lambda found: adapter(found)["lora_alpha"], 7.5)),
    "targets": ("told", checked(lambda found: set(adapter(found)["target_modules"]), {"q_proj", "up_proj"})),
}
OF_OPTIM: Table = {
    "lr": ("trained", follows_the_schedule),
    "schedule": ("trained", follows_the_schedule),
    "warmup": ("trained", follows_the_schedule),
    "weight_decay": ("trained", checked(lambda found: {u.settings["weight_decay"] for u in found.updates}, {0.2})),
    "adam_eps": ("trained", checked(lambda found: {u.settings["eps"] for u in found.updates}, {1e-3})),
    "max_grad_norm": ("trained", is_clipped),
    "max_tokens_per_microbatch": ("trained", is_in_small_parts),
    "checkpointing": ("trained", checked(lambda found: found.layers / len(found.read), 2.0)),
    "max_skipped": ("broken", ends_after_two),
}
OF_RUN: Table = {
    "save_every": ("trained", checked(lambda found: {3, 4, 5, 6} <= set(found.checkpoints))),
    "keep_last": ("trained", checked(lambda found: {3, 4, 5, 6} <= set(found.checkpoints))),
    "trackers": ("trained", checked(lambda found: [row["lr"] for row in found.tracked if "lr" in row] != [])),
}
OF_ALL: Table = {
    "chat_template": ("told", in_texts("[mine]")),
    "template_kwargs": ("told", in_texts("be kind")),
    "date": ("told", in_texts("2020-02-29")),
    "parse_special_tokens": ("told", checked(lambda found: max(parsed(found)), 2)),
    "max_length": ("told", is_cut),
    "overlong": ("told", checked(lambda found: found.result["summary"]["rows_truncated"], 1)),
    "dtype": ("told", checked(frozen_dtype, torch.bfloat16)),
}
OF_FITS: Table = {  # what SFT, reward models and DPO have besides
    "epochs": ("trained", checked(lambda found: len(found.updates), STEPS)),
    "batch_size": ("trained", checked(lambda found: len(found.updates), STEPS)),
    "max_steps": ("told", checked(lambda found: len(found.updates), 1)),
    "patience": ("flat", checked(lambda found: len(found.steps) / per_epoch(found), 2)),  # of four
}
OWN_TABLES: dict[str, Table] = {
    "sft": {
        **OF_FITS,
        "heldout": ("trained", checked(lambda found: [found.result["summary"][n] for n in ROLES], [6, 6])),
        "turns": ("told", learns_the_last_turn),
        "packing": ("told", checked(lambda found: max(len(ids) for ids in found.read) > 1)),
        "samples": ("trained", checked(lambda found: len(found.rows("samples")), 2 * (STEPS + 1))),
        "sample_tokens": ("trained", samples_are_short),
    },
    "reward": {
        **OF_FITS,
        "heldout": ("trained", checked(lambda found: found.result["summary"]["comparisons"], 6)),
        "center_coef": ("told", checked(lambda found: {call.words["center_coef"] for call in found.losses}, {0.7})),
        "heads": ("told", is_the_heads_lower_bound),
        "lcb": ("told", is_the_heads_lower_bound),
        "normalize_samples": ("told", checked(lambda found: {params.n for params, _ in found.sampled}, {2})),
        "max_new_tokens": ("told", checked(lambda found: {p.max_new_tokens for p, _ in found.sampled}, {6})),
    },
    "dpo": {
        **OF_FITS,
        "heldout": ("trained", checked(lambda found: found.result["summary"]["comparisons"], 6)),
        "loss": ("told", checked(lambda found: {call.words["loss"] for call in found.losses}, {"robust"})),
        "beta": ("told", checked(lambda found: {call.words["beta"] for call in found.losses}, {0.3})),
        "label_smoothing": (
            "told",
            checked(lambda found: {call.words["label_smoothing"] for call in found.losses}, {0.2}),
        ),
    },
    "ppo": {},  # test_settings_of_ppo.py
}
NESTED = {"lora": (LoRAConfig, OF_LORA), "optim": (OptimConfig, OF_OPTIM), "run": (RunConfig, OF_RUN)}
EVERYWHERE: Table = {**OF_ALL, **{f"{name}.{own}": row for name, (_, of) in NESTED.items() for own, row in of.items()}}
CASES = [(m, name) for m in METHODS for name in {**EVERYWHERE, **OWN_TABLES[m]}]


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.seconds(2)
def test_a_setting_reaches_what_it_names(method: str, name: str, seen: Callable[[str, str], Seen]) -> None:
    which, check = {**EVERYWHERE, **OWN_TABLES[method]}[name]
    found = seen(method, which)
    value, default = found.config, CONFIGS[method]()
    for part in name.split("."):
        value, default = getattr(value, part), getattr(default, part)
    assert value != default, "a run with the default shows nothing"
    check(found)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_other_adapters_and_other_draws(method: str, seen: Callable[[str, str], Seen]) -> None:
    """The adapter's first weights, the order of the rows, and which are held out, or how PPO samples."""
    plain, seeded = seen(method, "plain"), seen(method, "seeded")
    starts = [[p.detach() for n, p in f.trainer.model.named_parameters() if "lora_A" in n] for f in (plain, seeded)]
    assert all(float((a - b).abs().mean()) > 0.01 for a, b in zip(*starts, strict=True))
    if method == "ppo":
        assert plain.sampled[0][0].seed != seeded.sampled[0][0].seed
        assert plain.rewarded[0][0] != seeded.rewarded[0][0], "other prompts, or another order"
    else:
        assert [ids.tolist() for ids in plain.read] != [ids.tolist() for ids in seeded.read]
        assert heldout(seen(method, "split")) != heldout(seen(method, "trained"))


def heldout(found: Seen) -> set[str]:
    """What half of the rows is held out, as text."""
    return {repr(row) for row in found.trainer.heldout}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_in_a_table(method: str) -> None:
    """A new one is to be added, with what it does."""
    if method != "ppo":
        assert {f.name for f in fields(CONFIGS[method])} == {*OF_ALL, *OWN_TABLES[method], *NESTED, "seed"}
    for config, table in NESTED.values():
        assert {f.name for f in fields(config)} == set(table)
