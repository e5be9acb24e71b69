"""Adapters (LoRA through peft): adding one, loading one, and what is trained and what stays frozen."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.config import LoRAConfig
from rlhf_fast.models.checkpoint import reading_errors
from rlhf_fast.models.inner import FAILURES, trunk

# Whose kernels read the weights of "out_proj" and "conv1d" without calling them; peft refuses adapters there.
MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}

Model = Any  # PreTrainedModel or PeftModel; the type hints of neither survive .to(), .eval() or a head's attribute
ModelT = TypeVar("ModelT", bound=nn.Module)
OUTPUT = "lm_head"  # what families call their output layer


def trainable(model: Model, lora: LoRAConfig, seed: int = 0) -> Model:
    """Make a loaded policy trainable: its adapter goes on, a fresh one is added, or (`lora.r == 0`) all weights."""
    if isinstance(model, PeftModel) and lora.r == 0:
        model = model.merge_and_unload()
    if lora.r == 0:
        return model.requires_grad_(True)
    if isinstance(model, PeftModel):
        refuse_prompts_of_adapters(model)
        require_same_rank(rank_of(model.active_peft_config), lora, "the checkpoint")
        require_same_targets(getattr(model.active_peft_config, "target_modules", None), lora, "the checkpoint")
        model.requires_grad_(False)
        unfreeze_adapter(model)
        return model
    return with_adapter(model, lora, seed, task="CAUSAL_LM").eval()


def trainable_scorer(model: Model, lora: LoRAConfig, seed: int = 0, head: bool = True) -> Model:
    """Make a sequence classifier trainable as `trainable` does a policy, with its scalar head unless `head` says no."""
    if isinstance(model, PeftModel) and lora.r == 0:
        model = model.merge_and_unload()
    if lora.r > 0 and not isinstance(model, PeftModel):
        model = with_adapter(model, lora, seed, task="SEQ_CLS").eval()
    model.requires_grad_(lora.r == 0)
    if isinstance(model, PeftModel):
        unfreeze_adapter(model)
    for name, parameter in model.named_parameters():
        if not head and "score" in name.split("."):
            parameter.requires_grad_(False)
    return model


def trainable_copy(model: ModelT) -> ModelT:
    """Copy a model to be trained apart from it; frozen weights are shared, not copied."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo=shared)


def frozen_copy(model: ModelT) -> ModelT:
    """Copy a model as a frozen reference; weights that are frozen in the model are shared, not copied."""
    return trainable_copy(model).requires_grad_(False)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a model into `target`, a model of the same architecture."""
    of = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(of[name])


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").exists()


def with_saved_adapter(model: Model, folder: str, merged: bool) -> Model:
    if not is_adapter(folder):
        return model
    refuse_prompts(PeftConfig.from_pretrained(folder), folder)
    with reading_errors(folder):
        model = _quietly(lambda: PeftModel.from_pretrained(model, folder))
    return model.merge_and_unload() if merged else model


def with_policy_adapter(model: Model, folder: str) -> Model:
    """A classifier with the adapter of the policy in `folder`, its own scaling and all, beside a trainable head. What
    that has on the policy's output layer is left out, as there is none here."""
    with reading_errors(folder):
        config: Any = PeftConfig.from_pretrained(folder)
        refuse_prompts(config, folder)
        copied = [name for name in config.modules_to_save or [] if name != OUTPUT]
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", [*copied, "score"], False
        if isinstance(config.target_modules, list | set):
            config.target_modules = {name for name in config.target_modules if name != OUTPUT}
        kept = load_peft_weights(folder, device="cpu")
        kept = {name: x for name, x in kept.items() if OUTPUT not in name.split(".")}
        head = {f"base_model.model.score.{key}": value for key, value in model.score.state_dict().items()}
        with torch.random.fork_rng():
            model = _quietly(lambda: get_peft_model(model, config))
        loaded: Any = set_peft_model_state_dict(model, {**kept, **head})
    if loaded.unexpected_keys:
        raise ValueError(f"model: {folder}: the adapter does not fit: {loaded.unexpected_keys[:3]}")
    return model


def _quietly(make: Callable[[], Model]) -> Model:
    """Call into peft without its warning about a property that transformers is renaming."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make()


def with_adapter(model: Model, lora: LoRAConfig, seed: int, task: str) -> Model:
    inside = trunk(model)
    within = set(inside.modules())
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m in within}
    others = {_target(n) for n, m in linear.items() if not _is_product(m)}  # a router, for instance
    if model.config.model_type in MAMBA:
        others |= {"out_proj", "conv1d"}
    targets = sorted({_target(n) for n in linear} - others)
    if unknown := sorted(set(lora.targets) - set(targets)):
        raise ValueError(f"lora.targets: {unknown[0]!r} is no linear layer of this model; it has {', '.join(targets)}")
    targets = sorted(lora.targets) or targets
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only multiplies by it
        lora_dropout=0.0,  # dropout would make the ratio of PPO's first step differ from one
        target_modules=targets,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in inside.modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _quietly(lambda: get_peft_model(model, config))


def _target(name: str) -> str:
    """Name what peft finds a layer by: the last part of its name, unless that is a number, which others have too."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def _is_product(layer: Any) -> bool:
    """Return whether a linear layer gives what linear layers give; families have kinds of their own."""
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    try:
        with torch.no_grad():
            made = layer(layer.weight.new_zeros(1, layer.in_features))
    except FAILURES:
        return False
    return isinstance(made, torch.Tensor) and made.shape == (1, layer.out_features)


def unfreeze_adapter(model: PeftModel) -> None:
    """Unfreeze what an adapter of whatever kind has beside the model's own weights, copies of whole layers too."""
    tuner: Any = model.base_model
    own = (tuner.prefix, "modules_to_save", "trainable_tokens_")
    for name, parameter in model.named_parameters():
        if any(part in name for part in own) and parameter.is_floating_point():
            parameter.requires_grad_(True)


def adapter_config(folder: str) -> dict[str, Any]:
    with reading_errors(folder):
        config: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def adapter_rank(folder: str) -> int | None:
    return rank_of(PeftConfig.from_pretrained(folder))


def rank_of(config: PeftConfig) -> int | None:
    """Return an adapter's rank, None for one of a kind that has none."""
    rank = getattr(config, "r", None)
    return rank if isinstance(rank, int) and rank > 0 else None


def uses_of_adapters(model: nn.Module) -> tuple[Any, ...]:
    """Describe the adapters of every layer that has any, of whatever kind: which are used, which are folded in, and
    how they are scaled."""
    return tuple(
        (
            layer._disable_adapters,
            tuple(layer.active_adapters),
            tuple(getattr(layer, "merged_adapters", ())),
            tuple(sorted(getattr(layer, "scaling", {}).items())),
        )
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )


def refuse_prompts_of_adapters(model: nn.Module) -> None:
    """Refuse a model with an adapter that puts something before each prompt: it would be left out in silence.

    Raises:
        ValueError: names the adapter's kind.
    """
    for name, config in (model.peft_config if isinstance(model, PeftModel) else {}).items():
        refuse_prompts(config, f"its adapter {name!r}")


def refuse_prompts(config: PeftConfig, of: str) -> None:
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"model: {of} is an adapter of the kind {kind}, which puts learned states before every prompt; expected "
            "one that changes layers, such as LoRA"
        )


def require_same_targets(targets: Any, lora: LoRAConfig, name: str) -> None:
    layers = sorted(targets) if isinstance(targets, list | set | tuple) else [str(targets)]
    if lora.targets and lora.r and layers != sorted(lora.targets):
        raise ValueError(
            f"lora.targets: {', '.join(lora.targets)} does not fit the adapter of {name}, which is on "
            f"{', '.join(layers)}; leave lora.targets out, or set lora.r to 0 to merge it and train all weights"
        )


def require_same_rank(rank: int | None, lora: LoRAConfig, name: str) -> None:
    if rank is not None and lora.r not in (0, rank):
        raise ValueError(
            f"lora.r: {lora.r} does not fit the adapter of {name}, which has rank {rank}; "
            f"set lora.r to {rank}, or to 0 to merge it and train all weights"
        )
