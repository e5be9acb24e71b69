"""Settings, all of them, as frozen dataclasses with their ranges. Knows nothing of models or training.

A setting has one name everywhere: `ppo.kl_coef` is `--ppo.kl_coef 0.1` on the command line, `ppo: {kl_coef: 0.1}` in
YAML and `PPOConfig(kl_coef=0.1)` in Python. settings.py turns the first two into the third; each other file holds the
settings of a phase.
"""

from rlhf_fast.config.common import LoRAConfig, OptimConfig, RunConfig
from rlhf_fast.config.demo import DemoConfig, human_demo, tiny_demo
from rlhf_fast.config.dpo import DPOConfig
from rlhf_fast.config.evaluation import EvaluationConfig
from rlhf_fast.config.feedback import AnnotateConfig, AnnotatorConfig, ComparisonsConfig
from rlhf_fast.config.ppo import PPOConfig
from rlhf_fast.config.reward import RewardConfig
from rlhf_fast.config.sft import SFTConfig

__all__ = [
    "AnnotateConfig",
    "AnnotatorConfig",
    "ComparisonsConfig",
    "DPOConfig",
    "DemoConfig",
    "EvaluationConfig",
    "LoRAConfig",
    "OptimConfig",
    "PPOConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "human_demo",
    "tiny_demo",
]
