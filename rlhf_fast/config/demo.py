"""The settings of the demo: all phases, one after another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rlhf_fast.config.common import LoRAConfig, OptimConfig, check
from rlhf_fast.config.evaluation import EvaluationConfig
from rlhf_fast.config.feedback import AnnotatorConfig, ComparisonsConfig
from rlhf_fast.config.ppo import PPOConfig
from rlhf_fast.config.reward import RewardConfig
from rlhf_fast.config.settings import Settings
from rlhf_fast.config.sft import SFTConfig


@dataclass(frozen=True)
class DemoConfig(Settings):
    """The demo: an assistant for an agency's client messages, from SmolLM2-135M to a policy trained by PPO.

    The sampled replies are compared by a simulated annotator, a written rule. With --human you compare them: a page is
    served on this machine, its link is printed, and the demo goes on by itself once --pairs are judged. What is judged
    is kept at once, and the same command goes on after Ctrl-C or a kill. docs/annotate.md shows it. Twenty
    pairs show how it goes; whether the reward model is any good takes hundreds.
    """

    out: str = "runs/demo"  # folder of the run
    tiny: bool = False  # a random model over bytes, in under a minute
    human: bool = False  # people compare the replies, on a page whose link is printed
    pairs: int = 20  # with human: judged pairs after which the demo goes on
    port: int = 0  # with human: of the page; 0 finds a free one
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(optim=OptimConfig(lr=5e-4)))
    comparisons: ComparisonsConfig = field(default_factory=lambda: ComparisonsConfig(prompts=96, max_new_tokens=72))
    reward: RewardConfig = field(
        default_factory=lambda: RewardConfig(batch_size=8, heldout=0.2, optim=OptimConfig(lr=3e-4))
    )
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=6,
            prompts_per_step=8,
            max_new_tokens=72,
            epochs=1,
            optim=OptimConfig(lr=5e-4, schedule="constant", warmup=0.0),
        )
    )
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(max_new_tokens=72))

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, four="pairs", port="port")


def tiny_demo() -> DemoConfig:
    """Make the settings of the tiny demo: all phases on a random model of 0.1 million weights, which learns little."""
    optim = OptimConfig(lr=3e-3, max_tokens_per_microbatch=8192)
    lora = LoRAConfig(r=4, alpha=8.0)
    return DemoConfig(
        tiny=True,
        model="random",
        sft=SFTConfig(epochs=3, lora=LoRAConfig(r=0), optim=optim),
        comparisons=ComparisonsConfig(prompts=24, max_new_tokens=48, annotator=AnnotatorConfig(tie_margin=0.0)),
        reward=RewardConfig(lora=lora, optim=optim),
        ppo=PPOConfig(
            steps=3,
            prompts_per_step=8,
            minibatches=2,
            max_new_tokens=48,
            min_reward_agreement=0.0,  # a random model learns no preferences worth the name
            lora=lora,
            optim=replace(optim, lr=1e-3, schedule="constant", warmup=0.0),
        ),
        evaluation=EvaluationConfig(samples_per_prompt=1, max_new_tokens=48),
    )


def human_demo(base: DemoConfig) -> DemoConfig:
    """The same with people: two replies to a prompt, so that each pair is of another one, and no gate before PPO.

    Agreement on the few pairs that are held out is so uncertain that the gate would close by chance alone.
    """
    return replace(
        base,
        human=True,
        comparisons=replace(base.comparisons, prompts=96, samples_per_prompt=2),
        ppo=replace(base.ppo, min_reward_agreement=0.0),
    )
