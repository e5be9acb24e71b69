"""Settings and prompts that are given in Python: taken as they are meant, or refused in words."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_fast import Generator, SamplingParams
from rlhf_fast import config as configs
from rlhf_fast.config import DemoConfig, DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RunConfig, SFTConfig
from rlhf_fast.config.settings import from_flat, keys, to_dict

CLASSES = [
    one for one in vars(configs).values() if isinstance(one, type) and dataclasses.is_dataclass(one)
]  # every configuration

WRONG = {  # by the type of a field: values that it is not, and what is expected
    "int": (["3", True, 2.5, None, [1]], "a whole number"),
    "float": (["0.1", False, None, 1j], "a number"),
    "str": ([3, None, True], "text"),
    "bool": ([1, "true", None], "True or False"),
    "int | None": (["3", True, 2.5], "a whole number or None"),
    "float | None": (["3", True], "a number or None"),
    "str | None": ([3, False], "text or None"),
    "tuple[int, ...]": (["1", 1, (1.5,), ("1",)], "a tuple of whole numbers"),
    "tuple[str, ...]": (["wandb", 1, (1,)], "a tuple of texts"),
    "dict[str, Any]": ([1, "a", [("a", 1)], {1: 2}], "a dict with texts as keys"),
}
FIELDS = [(cls, item.name, item.type) for cls in [*CLASSES, SamplingParams] for item in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "name", "kind"), FIELDS, ids=lambda one: getattr(one, "__name__", str(one)))
def test_a_value_of_another_type_is_named_with_the_field_and_what_was_expected(cls: Any, name: str, kind: str) -> None:
    values, expected = WRONG.get(kind, ([], ""))
    if kind.startswith("Literal"):
        values, expected = ["no such thing", 3, []], "expected "
    if kind.endswith("Config"):
        values, expected = [{"r": 1}, None, 3], f"{kind}("
    if cls is SamplingParams and kind == "tuple[str, ...]":
        values = [value for value in values if not isinstance(value, str)]  # taken as one
    assert values or kind.startswith(("Mapping", "tuple[str | tuple"))
    for value in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            cls(**{name: value})
        said = str(caught.value)
        assert said.startswith(f"{name}: ") and repr(value) in said and expected in said, said
        assert type(value).__name__ in said or kind.startswith("Literal")


def test_the_words_for_the_commonest_mistakes() -> None:
    for wrong, words in (
        (lambda: PPOConfig(steps="3"), "steps: '3' (str); expected a whole number"),  # type: ignore[arg-type]
        (lambda: SFTConfig(packing="no"), "packing: 'no' (str); expected True or False"),  # type: ignore[arg-type]
        (lambda: RunConfig(trackers="wandb"), "trackers: 'wandb' (str); expected a tuple of texts"),  # type: ignore[arg-type]
        (
            lambda: PPOConfig(lora={"r": 8}),  # type: ignore[arg-type]
            "lora: {'r': 8} (dict); expected LoRAConfig(r=8)",
        ),
        (
            lambda: PPOConfig(advantage="grpoo"),  # type: ignore[arg-type]
            "advantage: 'grpoo'; expected 'gae', 'grpo', 'dr_grpo', 'rloo', 'reinforce++' or 'remax', of which "
            "'grpo' is the nearest",
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            wrong()
        assert str(caught.value) == words


def test_a_setting_that_does_not_exist_names_the_nearest() -> None:
    for cls, name, words in (
        (PPOConfig, "lr", "PPOConfig: there is no setting 'lr'; the nearest one is optim=OptimConfig(lr=...)"),
        (DPOConfig, "rank", "DPOConfig: there is no setting 'rank'; the nearest one is "),
        (PPOConfig, "kl_coeff", "PPOConfig: there is no setting 'kl_coeff'; the nearest one is kl_coef"),
        (DemoConfig, "keep_last", "DemoConfig: there is no setting 'keep_last'; the nearest one is sft=SFTConfig("),
        (
            SamplingParams,
            "max_tokens",
            "SamplingParams: there is no setting 'max_tokens'; the nearest one is max_new_t",
        ),
    ):
        with pytest.raises(TypeError) as caught:
            cls(**{name: 1})
        assert str(caught.value).startswith(words), caught.value


def test_what_is_right_stays_right() -> None:
    config = PPOConfig(
        steps=np.int64(3),  # type: ignore[arg-type]
        kl_coef=1,
        reward_clip=math.inf,
        stop_token_ids=[1, 2],  # type: ignore[arg-type]
        kl_target=None,
        template_kwargs={"enable_thinking": False},
        lora=LoRAConfig(r=np.int32(4)),  # type: ignore[arg-type]
        optim=OptimConfig(lr=np.float32(0.5)),  # type: ignore[arg-type]
    )
    assert config.stop_token_ids == (1, 2)  # a list is taken for what it holds
    for one in (config, DemoConfig()):
        assert copy.deepcopy(one) == one and pickle.loads(pickle.dumps(one)) == one
        assert dataclasses.replace(one) == one
    flat = {"ppo.steps": 3, "ppo.kl_coef": 1, "ppo.optim.lr": 0.5}
    assert from_flat(DemoConfig, flat).ppo.steps == 3
    assert all(key.split(".")[0] in to_dict(DemoConfig()) for key in keys(DemoConfig))


# The generator -------------------------------------------------------------------------------------------------------


def test_a_dict_is_taken_for_params(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    params = SamplingParams(n=2, max_new_tokens=4, seed=3)
    expected = generator.generate(["a", "b"], params).texts
    given = {"n": 2, "max_new_tokens": 4, "seed": 3}
    assert generator.generate(["a", "b"], given).texts == expected
    assert generator.generate(["a", "b"], [given, params]).texts == expected
    assert len(list(generator.stream(["a"], {"max_new_tokens": 2, "ignore_eos": True}))) == 2
    with pytest.raises(
        TypeError, match="SamplingParams: there is no setting 'max_length'; the nearest one is max_new_t"
    ):
        generator.generate(["a"], {"max_length": 2})
    with pytest.raises(TypeError, match=r"params: got str; expected SamplingParams, or a dict such as \{'n': 2\}"):
        generator.generate(["a"], ["n=2"])  # type: ignore[list-item]


def test_a_single_stop_text_is_taken_as_one(tiny: tuple[Any, Any]) -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
    assert SamplingParams(bad_words="no").bad_words == ("no",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop: an empty text is among them"):
        SamplingParams(stop="")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message", [{"from": "human", "value": "hi"}, {"content": "hi"}, {"role": None, "content": "hi"}, {"role": "user"}]
)
def test_a_message_of_another_form_is_refused_in_words_or_taken(tiny: tuple[Any, Any], message: dict[str, Any]) -> None:
    generator = Generator(*tiny)
    try:
        generator.generate([[message]], {"max_new_tokens": 1})
    except ValueError as error:
        assert str(error).startswith("prompts: prompt 0: ") and ("role" in str(error) or "content" in str(error))
    else:
        assert "from" in message  # the one form of these that says all
    with pytest.raises(TypeError, match="prompts: prompt 0 is one message; expected a list of messages"):
        generator.generate([message], {"max_new_tokens": 1})  # type: ignore[list-item]


def test_rollouts_are_shown_by_counts(tiny: tuple[Any, Any]) -> None:
    rollouts = Generator(*tiny).generate(["a", "b"], SamplingParams(n=3, max_new_tokens=4, ignore_eos=True))
    prompt = int((~rollouts.response_mask).sum())
    assert repr(rollouts) == f"Rollouts(6 responses to 2 prompts: 6 length; {prompt} + 24 tokens)"


def test_texts_and_messages_are_prompts_of_ppo_as_they_are_the_generators(tiny_folder: Path, tmp_path: Path) -> None:
    from rlhf_fast import PPOTrainer
    from rlhf_fast.data.records import RecordError, read_prompts

    messages = [{"role": "user", "content": "c"}]
    found = read_prompts(["a", "b", messages, {"prompt": "d", "category": "e"}])  # type: ignore[list-item]
    assert [one.prompt for one in found] == ["a", "b", messages, "d"]
    assert [one.name for one in found] == ["row 0", "row 1", "row 2", "row 3"] and found[3].category == "e"
    for wrong, words in ((["a", 3], "row 1: expected"), (["a", ""], "row 1: prompt is empty")):
        with pytest.raises(RecordError, match=words):
            read_prompts(wrong)  # type: ignore[arg-type]
    trainer = PPOTrainer(
        policy=tiny_folder,
        reward=lambda prompts, responses: [0.0] * len(prompts),
        prompts=["a", "b"],  # type: ignore[list-item]
        out=tmp_path / "run",
        config=PPOConfig(steps=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=4, minibatches=1),
    )
    assert [one.prompt for one in trainer.prompts] == ["a", "b"]


# Trainers ------------------------------------------------------------------------------------------------------------


def test_a_dict_is_taken_for_a_trainers_settings_and_those_of_another_are_refused() -> None:
    """Before anything is read: there is no such model and no such file."""
    from rlhf_fast import DPOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
    from rlhf_fast.evaluation.win_rate import evaluate

    def ppo(config: Any) -> None:
        PPOTrainer("no/model", "no/reward", "no.jsonl", "no/run", config)

    calls: list[tuple[str, Any]] = [("PPOConfig", ppo)]
    for trainer in (SFTTrainer, RewardTrainer, DPOTrainer):
        name = trainer.__name__.replace("Trainer", "Config")
        calls.append((name, lambda config, trainer=trainer: trainer("no/model", "no.jsonl", "no/run", config)))
    calls.append(("EvaluationConfig", lambda config: evaluate("no/model", "no/model", [], config)))
    for name, call in calls:
        with pytest.raises(TypeError, match=rf"config: got LoRAConfig; expected {name}\(\.\.\.\), or a dict of its"):
            call(LoRAConfig())
        with pytest.raises(TypeError, match=f"{name}: there is no setting 'sead'; the nearest one is seed"):
            call({"sead": 1})
        with pytest.raises(TypeError, match="seed: '1'"):
            call({"seed": "1"})


def test_settings_in_a_dict_are_those_of_the_class(tiny_folder: Path, tmp_path: Path) -> None:
    from rlhf_fast import SFTTrainer

    rows = [{"prompt": str(i), "completion": "yes"} for i in range(4)]
    trainer = SFTTrainer(tiny_folder, rows, tmp_path / "run", {"epochs": 3, "lora": LoRAConfig(r=2)})
    assert trainer.config == SFTConfig(epochs=3, lora=LoRAConfig(r=2))


def test_when_to_stop_is_a_number(tiny: tuple[Any, Any]) -> None:
    from rlhf_fast.rollout.generator import Until

    with pytest.raises(TypeError, match=r"tokens: '5' \(str\); expected a whole number or None"):
        Until(tokens="5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Until: there is no setting 'token'; the nearest one is tokens"):
        Until(token=5)  # type: ignore[call-arg]
