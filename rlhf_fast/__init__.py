"""rlhf-fast: reinforcement learning from human feedback, from a pretrained model to an evaluated policy.

`import rlhf_fast` and `import rlhf_fast.ops` need torch and nothing else; the names below are imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The folder kernels/ of a checkout is no package, but can be imported as if it were one. Up to 5.9, transformers
# takes it for that of Hugging Face, and cannot be imported for want of its version.
if "kernels" not in sys.modules and (_spec := importlib.util.find_spec("kernels")) is not None:
    _places = {os.path.realpath(place) for place in _spec.submodule_search_locations or ()}
    if _spec.origin is None and _places == {os.path.realpath(os.path.join(os.path.dirname(__file__), "kernels"))}:
        sys.modules["kernels"] = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from rlhf_fast import models, ops
    from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig
    from rlhf_fast.rollout.generator import Generator
    from rlhf_fast.rollout.rollouts import Rollouts
    from rlhf_fast.rollout.sampling import SamplingParams
    from rlhf_fast.trainers.dpo import DPOTrainer
    from rlhf_fast.trainers.ppo.trainer import PPOTrainer
    from rlhf_fast.trainers.reward import RewardTrainer
    from rlhf_fast.trainers.sft import SFTTrainer

_HOME = {
    "models": "rlhf_fast.models",
    "ops": "rlhf_fast.ops",
    "Generator": "rlhf_fast.rollout.generator",
    "Rollouts": "rlhf_fast.rollout.rollouts",
    "SamplingParams": "rlhf_fast.rollout.sampling",
    "SFTTrainer": "rlhf_fast.trainers.sft",
    "RewardTrainer": "rlhf_fast.trainers.reward",
    "DPOTrainer": "rlhf_fast.trainers.dpo",
    "PPOTrainer": "rlhf_fast.trainers.ppo.trainer",
    "LoRAConfig": "rlhf_fast.config",
    "OptimConfig": "rlhf_fast.config",
    "SFTConfig": "rlhf_fast.config",
    "RewardConfig": "rlhf_fast.config",
    "DPOConfig": "rlhf_fast.config",
    "PPOConfig": "rlhf_fast.config",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "Generator",
    "LoRAConfig",
    "OptimConfig",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "Rollouts",
    "SFTConfig",
    "SFTTrainer",
    "SamplingParams",
    "models",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    value = module if _HOME[name] == f"rlhf_fast.{name}" else getattr(module, name)
    globals()[name] = value
    return value
