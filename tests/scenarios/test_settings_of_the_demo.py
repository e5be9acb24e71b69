"""Settings of the demo's phases, of the evaluation and of the simulated annotator reach what they name.

A setting that is in no table, and a class of settings that no test knows, fail the last test.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from rlhf_fast import config as configs
from rlhf_fast.config import (
    AnnotateConfig,
    AnnotatorConfig,
    ComparisonsConfig,
    DemoConfig,
    DPOConfig,
    EvaluationConfig,
    LoRAConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
)
from rlhf_fast.data.records import PromptRecord
from rlhf_fast.evaluation.win_rate import evaluate
from rlhf_fast.feedback.simulated import SimulatedAnnotator
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from rlhf_fast.pages import plots
from rlhf_fast.pipeline import run_demo
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import SamplingParams


class Generation(NamedTuple):
    prompts: list[Any]
    params: SamplingParams
    rollouts: Rollouts


@pytest.fixture(scope="module")
def generated() -> Iterator[list[Generation]]:
    """Filled in with what a generator is asked, and gives."""
    seen: list[Generation] = []
    original = Generator.generate

    def generate(own: Generator, prompts: Any, params: Any, *more: Any, **words: Any) -> Rollouts:
        seen.append(Generation(list(prompts), params, original(own, prompts, params, *more, **words)))
        return seen[-1].rollouts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "generate", generate)
        patch.setattr(plots, "available", lambda: False)
        yield seen


# The demo ------------------------------------------------------------------------------------------------------------

ONE = OptimConfig(max_tokens_per_microbatch=8192)
LORA = LoRAConfig(r=2)
DEMO = DemoConfig(
    sft=SFTConfig(max_steps=15, samples=0, lora=LoRAConfig(r=0), optim=OptimConfig(lr=1e-2, warmup=0.0)),
    comparisons=ComparisonsConfig(
        prompts=9, samples_per_prompt=3, max_new_tokens=40, temperature=0.8, seed=4,
        annotator=AnnotatorConfig(error_rate=0.25, tie_margin=0.0, seed=7),
    ),
    reward=RewardConfig(max_steps=1, heldout=0.4, lora=LORA, optim=ONE),
    ppo=PPOConfig(
        steps=1, prompts_per_step=2, samples_per_prompt=2, minibatches=1, max_new_tokens=6, min_reward_agreement=0.0,
        lora=LORA, optim=ONE,
    ),
    evaluation=EvaluationConfig(samples_per_prompt=1, max_new_tokens=3),
)  # fmt: skip


class Demo(NamedTuple):
    config: DemoConfig
    generations: list[Generation]  # for comparisons, in PPO, and of both policies in the evaluation

    def told(self, phase: str) -> Any:
        """The settings that a phase ran with, as it left them."""
        found = yaml.safe_load((Path(self.config.out) / phase / "config.yaml").read_text())
        return found.get(phase, found)


@pytest.fixture(scope="module")
def demo(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, generated: list[Generation]) -> Demo:
    config = dataclasses.replace(DEMO, out=str(tmp_path_factory.mktemp("demo") / "run"), model=str(tiny_folder))
    generated.clear()
    run_demo(config, say=lambda line: None)
    return Demo(config, list(generated))


def comparisons(demo: Demo) -> list[dict[str, Any]]:
    file = Path(demo.config.out) / "comparisons" / "comparisons.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def longest(generation: Generation) -> int:
    return max(len(example.response) for example in generation.rollouts.examples())


Seen = Callable[[Demo], Any]
OF_COMPARISONS: dict[str, tuple[Seen, Any]] = {
    "prompts": (lambda demo: len(demo.generations[0].prompts), 9),
    "samples_per_prompt": (lambda demo: len(demo.generations[0].rollouts) / 9, 3),
    "max_new_tokens": (lambda demo: longest(demo.generations[0]), 40),
    "temperature": (lambda demo: demo.generations[0].params.temperature, 0.8),
    "seed": (lambda demo: demo.generations[0].params.seed, 4),
    "annotator": (
        lambda demo: {row["annotator"] for row in comparisons(demo)},
        {"simulated (seed 7, error rate 0.25, tie margin 0)"},
    ),
}
OF_DEMO: dict[str, tuple[Seen, Any]] = {
    "out": (lambda demo: (Path(demo.config.out) / "report.html").exists(), True),
    "model": (lambda demo: (Path(demo.config.out) / "base").exists(), False),
    "sft": (lambda demo: (demo.told("sft")["max_steps"], demo.told("sft")["lora"]["r"]), (15, 0)),
    "comparisons": (lambda demo: demo.told("comparisons")["prompts"], 9),
    "reward": (lambda demo: (demo.told("reward")["heldout"], demo.told("reward")["max_steps"]), (0.4, 1)),
    "ppo": (lambda demo: longest(demo.generations[1]), 6),
    "evaluation": (lambda demo: [longest(each) for each in demo.generations[2:]], [3, 3]),
}


@pytest.mark.parametrize("name", OF_COMPARISONS)
def test_a_setting_of_comparisons_reaches_what_it_names(name: str, demo: Demo) -> None:
    seen, expected = OF_COMPARISONS[name]
    assert getattr(demo.config.comparisons, name) != getattr(ComparisonsConfig(), name)
    assert seen(demo) == expected


@pytest.mark.parametrize("name", OF_DEMO)
def test_a_setting_of_the_demo_reaches_what_it_names(name: str, demo: Demo) -> None:
    seen, expected = OF_DEMO[name]
    assert getattr(demo.config, name) != getattr(DemoConfig(), name)
    assert seen(demo) == expected


def test_the_demo_starts_from_its_model_or_a_random_one(demo: Demo, tiny_folder: Path, tmp_path: Path) -> None:
    told = yaml.safe_load((Path(demo.config.out) / "sft" / "config.yaml").read_text())
    assert told["model"] == str(tiny_folder)
    broken = dataclasses.replace(DEMO, out=str(tmp_path / "run"), tiny=True, model="none at all")
    broken = dataclasses.replace(broken, sft=SFTConfig(max_steps=1, samples=0, max_length=8, overlong="drop"))
    with pytest.raises(ValueError, match="no row is left"):  # that far it comes with a model of its own
        run_demo(broken, say=lambda line: None)
    assert (tmp_path / "run" / "base" / "model.safetensors").exists()


# The evaluation -------------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    config: EvaluationConfig
    generations: list[Generation]
    figures: dict[str, Any]

    @property
    def asked(self) -> list[str]:
        """All prompts as both policies read them."""
        examples = [example for each in self.generations for example in each.rollouts.examples()]
        return [byte_tokenizer().decode(example.prompt) for example in examples]


@pytest.fixture(scope="module")
def evaluation(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, generated: list[Generation]) -> Evaluation:
    template = tmp_path_factory.mktemp("templates") / "mine.jinja"
    template.write_text("[mine]{{ 'be ' + mood if mood else '' }}" + CHAT_TEMPLATE)
    config = EvaluationConfig(
        samples_per_prompt=3, max_new_tokens=5, temperature=0.7, tie_margin=1.5, chat_template=str(template),
        template_kwargs={"mood": "kind"}, parse_special_tokens=True, seed=9,
    )  # fmt: skip
    generated.clear()
    calls: list[int] = []

    def judge(prompts: list[Any], responses: list[str]) -> list[float]:
        """1 more, 2 more and 3 more for the first policy's samples."""
        calls.append(len(responses))
        return [float(i % 3 + 1) if len(calls) == 1 else 0.0 for i in range(len(responses))]

    prompts = [PromptRecord(f"a<user>b {i}") for i in range(4)]
    figures, _ = evaluate(tiny_folder, tiny_folder, prompts, config, judge=judge)
    return Evaluation(config, list(generated), figures)


OF_EVALUATION: dict[str, tuple[Callable[[Evaluation], Any], Any]] = {
    "samples_per_prompt": (lambda seen: [len(each.rollouts) for each in seen.generations], [12, 12]),
    "max_new_tokens": (lambda seen: [longest(each) for each in seen.generations], [5, 5]),
    "temperature": (lambda seen: [each.params.temperature for each in seen.generations], [0.7, 0.7]),
    "tie_margin": (lambda seen: [seen.figures[name] for name in ("wins", "ties", "losses")], [8, 4, 0]),
    "chat_template": (lambda seen: all(text.startswith("[mine]") for text in seen.asked), True),
    "template_kwargs": (lambda seen: all("be kind" in text for text in seen.asked), True),
    "parse_special_tokens": (
        lambda seen: {e.prompt.count(2) for each in seen.generations for e in each.rollouts.examples()},
        {2},  # the template's <user> and the text's
    ),
    "seed": (lambda seen: [each.params.seed for each in seen.generations], [9, 9]),
}


@pytest.mark.parametrize("name", OF_EVALUATION)
def test_a_setting_of_the_evaluation_reaches_what_it_names(name: str, evaluation: Evaluation) -> None:
    seen, expected = OF_EVALUATION[name]
    assert getattr(evaluation.config, name) != getattr(EvaluationConfig(), name)
    assert seen(evaluation) == expected


# The annotator --------------------------------------------------------------------------------------------------------

ASKED = "Could you change the phone number in our footer?"
REPLIES = [
    f"{'We can change the phone number in your footer. ' * k}{end}"
    for k in (1, 2, 3)
    for end in ("I will call you on Monday.", "Maybe.", "Great!!!", "I guarantee it.")
]


def answers(**settings: Any) -> dict[frozenset[str], str]:
    """The chosen reply of each pair that is not a tie."""
    annotator = SimulatedAnnotator(AnnotatorConfig(**{"error_rate": 0.0, "tie_margin": 0.0, **settings}))
    found = annotator.compare_all(ASKED, "simple", REPLIES)
    return {frozenset((pair.chosen, pair.rejected)): pair.chosen for pair in found}


def error_rate() -> None:
    right, wrong = answers(), answers(error_rate=0.4)
    assert right.keys() == wrong.keys()
    assert 0.2 < sum(right[pair] != wrong[pair] for pair in right) / len(right) < 0.6


def tie_margin() -> None:
    assert 0 < len(answers(tie_margin=0.3)) < len(answers())


def seed() -> None:
    assert answers(error_rate=0.4, seed=1) != answers(error_rate=0.4, seed=2)


OF_ANNOTATOR = {"error_rate": error_rate, "tie_margin": tie_margin, "seed": seed}


@pytest.mark.parametrize("name", OF_ANNOTATOR)
def test_a_setting_of_the_annotator_does_what_it_names(name: str) -> None:
    OF_ANNOTATOR[name]()


# All of them ----------------------------------------------------------------------------------------------------------


OF_ANNOTATE = {
    "judgements": 2,
    "lease": 60.0,
    "gold_share": 0.1,
    "repeat_share": 0.2,
    "repeat_after": 7,
    "random_share": 0.3,
    "least_seconds": 1.5,
    "reports": 2,
    "dispute_below": 0.5,
    "disputed": "discard",
    "samples_per_model": 2,
    "max_new_tokens": 3,
    "temperature": 0.75,
    "seed": 5,
    "warnings": {"b": "of a fight"},
}


def test_every_setting_is_in_a_table() -> None:
    """A new one is to be added, with what it does; those of the trainers are in unit/trainers/test_settings*.py, of
    annotate in feedback/test_annotate_verb.py, of a demo with people in feedback/test_demo_human.py."""
    here: dict[Any, set[str]] = {
        ComparisonsConfig: {*OF_COMPARISONS},
        DemoConfig: {*OF_DEMO, "tiny", "human", "pairs", "port"},
        EvaluationConfig: {*OF_EVALUATION},
        AnnotatorConfig: {*OF_ANNOTATOR},
        AnnotateConfig: {*OF_ANNOTATE},
    }
    for config, names in here.items():
        assert {f.name for f in dataclasses.fields(config)} == names
    there = {SFTConfig, RewardConfig, DPOConfig, PPOConfig, LoRAConfig, OptimConfig, RunConfig}
    classes = {one for one in vars(configs).values() if isinstance(one, type) and dataclasses.is_dataclass(one)}
    assert classes == there | set(here)
