"""Models by name: policies, reward models, and what makes either trainable."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from rlhf_fast.config import LoRAConfig
from rlhf_fast.models.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from rlhf_fast.models.checkpoint import resolve
from rlhf_fast.models.forward import check_head

Model = Any  # PreTrainedModel or PeftModel; the type hints of neither survive .to(), .eval() or a head's attribute
ModelT = TypeVar("ModelT", bound=nn.Module)


def load(
    name: str | Path | PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    merged: bool = False,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode (no dropout, in training neither).

    Args:
        name: a model folder, a run folder (its newest checkpoint), a hub name, `smollm2-135m`, or a transformers
            config, which gives random weights (from `seed`) and the byte tokenizer.
        dtype: of the weights.
        device: defaults to the accelerator that torch finds, else the CPU.
        merged: fold an adapter into the weights: faster for a model that is only read, equal up to rounding.

    Raises:
        FileNotFoundError: the name is nothing known.
        ValueError: the model cannot be used here; the message says why.
    """
    if isinstance(name, PreTrainedConfig):
        model, tokenizer = _random(name, seed, dtype)
    else:
        folder = resolve(name)
        tokenizer = _tokenizer(folder)
        if is_adapter(folder) and _adapter_config(folder).get("task_type") == "SEQ_CLS":
            raise ValueError(f"model: {name} is a reward model, not a language model")
        model = _with_saved_adapter(_pretrained(AutoModelForCausalLM, folder, dtype), folder, merged)
    model = model.to(device or default_device()).eval()
    check_head(model)
    return model, tokenizer


def load_reward(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    merged: bool = False,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a reward model: a sequence classifier of transformers with one label, whole or as an adapter.

    Arguments and errors as for `load`.
    """
    folder = resolve(name)
    adapter = is_adapter(folder)
    if adapter and _adapter_config(folder).get("task_type") != "SEQ_CLS":
        raise ValueError(f"model: {name} is no reward model: its adapter has no scalar head")
    missing_ok = ("score.",) if adapter else ()  # an adapter brings the head with it
    model = _pretrained(AutoModelForSequenceClassification, folder, dtype, missing_ok, num_labels=1)
    model = _with_saved_adapter(model, folder, merged)
    return model.to(device or default_device()).eval(), _tokenizer(folder)


def reward_from(
    name: str | Path, lora: LoRAConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Model, PreTrainedTokenizerBase]:
    """A new trainable reward model that starts from a policy: its weights, its adapter if any, and a fresh head.

    The head starts at standard deviation 1 / sqrt(H + 1) (arXiv 2009.01325), so that first scores are of order one.
    """
    folder = resolve(name)
    tokenizer = _tokenizer(folder)
    model = _pretrained(AutoModelForSequenceClassification, folder, dtype, ("score.",), num_labels=1)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if not hasattr(model, "score"):
        raise ValueError(f"model: {name} has no scalar head in transformers; choose a decoder such as Llama or Qwen")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        spread = (model.config.hidden_size + 1) ** -0.5
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator) * spread)
    if is_adapter(folder):
        _require_same_rank(_adapter_rank(folder), lora, str(name))
        model = _with_policy_adapter(model, folder)
        if lora.r == 0:
            model = model.merge_and_unload()
    if lora.r > 0 and not isinstance(model, PeftModel):
        model = _with_adapter(model, lora, seed, task="SEQ_CLS")
    model.requires_grad_(lora.r == 0)
    if isinstance(model, PeftModel):
        _unfreeze_adapter(model)
    return model.to(default_device()).eval(), tokenizer


def trainable(model: Model, lora: LoRAConfig, seed: int = 0) -> Model:
    """Make a loaded policy trainable: its adapter goes on, a fresh one is added, or (`lora.r == 0`) all weights."""
    if isinstance(model, PeftModel) and lora.r == 0:
        model = model.merge_and_unload()
    if lora.r == 0:
        return model.requires_grad_(True)
    if isinstance(model, PeftModel):
        config: Any = model.peft_config["default"]
        _require_same_rank(config.r, lora, "the checkpoint")
        model.requires_grad_(False)
        _unfreeze_adapter(model)
        return model
    return _with_adapter(model, lora, seed, task="CAUSAL_LM").eval()


def frozen_copy(model: ModelT) -> ModelT:
    """A copy that stays as the model is now. Weights that nobody trains are shared with it, not copied."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo=shared).requires_grad_(False)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").exists()


def _pretrained(
    auto_class: Any, folder: str, dtype: torch.dtype, missing_ok: tuple[str, ...] = (), **options: Any
) -> Model:
    """The model of `folder`, or the base model of the adapter in it. Code from a model's folder is never run.

    Weights that the folder lacks are an error, not random numbers, unless their names begin as `missing_ok` says.
    """
    if is_adapter(folder):
        base = _adapter_config(folder).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"model: the adapter in {folder} does not name the model that it belongs to")
        try:
            base = resolve(base)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"model: the base model of the adapter in {folder} is missing: {error}") from error
        return _pretrained(auto_class, base, dtype, missing_ok, **options)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the fresh head that a new reward model has on purpose
    try:
        with _named_errors(folder):
            model, info = auto_class.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
            )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(missing_ok))
    if auto_class is AutoModelForCausalLM and any(key.startswith("score.") for key in info["unexpected_keys"]):
        raise ValueError(f"model: {folder} is a reward model, not a language model")
    if missing:
        raise ValueError(f"model: {folder} has no weights for {', '.join(missing[:3])} ({len(missing)} missing)")
    return model


@contextlib.contextmanager
def _named_errors(folder: str) -> Iterator[None]:
    """The many errors of transformers, safetensors and torch on what they cannot read, as one that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to open it all the same
            reason = "its weights are a pickle of more than tensors, which is not opened"
        if Path(folder).is_dir():
            raise ValueError(
                f"model: {folder} cannot be read ({reason}); if it is damaged, save or download it again"
            ) from error
        if isinstance(error, OSError):
            raise FileNotFoundError(f"model: {folder!r} was not found, or cannot be reached: {reason}") from error
        raise ValueError(f"model: {folder!r} cannot be used ({reason})") from error


def _tokenizer(folder: str) -> PreTrainedTokenizerBase:
    with _named_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {folder} names no end-of-sequence token")
    return tokenizer


def _random(config: PreTrainedConfig, seed: int, dtype: torch.dtype) -> tuple[Model, PreTrainedTokenizerBase]:
    if config.vocab_size < VOCAB_SIZE:
        raise ValueError(f"config.vocab_size: {config.vocab_size} is less than the byte tokenizer's {VOCAB_SIZE}")
    tokenizer = byte_tokenizer()
    config = copy.deepcopy(config)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # .to(dtype) would round the rotary frequencies too, which stay in float32 when a checkpoint is loaded.
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False), tokenizer


def _with_saved_adapter(model: Model, folder: str, merged: bool) -> Model:
    if not is_adapter(folder):
        return model
    with _named_errors(folder):
        model = _quietly(lambda: PeftModel.from_pretrained(model, folder))
    return model.merge_and_unload() if merged else model


def _with_policy_adapter(model: Model, folder: str) -> Model:
    """A classifier with the adapter of the policy in `folder`, its own scaling and all, beside a trainable head."""
    with _named_errors(folder):
        config: Any = LoraConfig.from_pretrained(folder)
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], False
        head = {f"base_model.model.score.{key}": value for key, value in model.score.state_dict().items()}
        with torch.random.fork_rng():
            model = _quietly(lambda: get_peft_model(model, config))
        loaded: Any = set_peft_model_state_dict(model, {**load_peft_weights(folder, device="cpu"), **head})
    if loaded.unexpected_keys:
        raise ValueError(f"model: {folder}: the adapter does not fit: {loaded.unexpected_keys[:3]}")
    return model


def _quietly(make: Callable[[], Model]) -> Model:
    """Call into peft without its warning about a property that transformers is renaming."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make()


def _with_adapter(model: Model, lora: LoRAConfig, seed: int, task: str) -> Model:
    trunk = model.base_model
    targets = sorted({n.rpartition(".")[2] for n, m in trunk.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only multiplies by it
        lora_dropout=0.0,  # dropout would make the ratio of PPO's first step differ from one
        target_modules=targets,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in trunk.modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _quietly(lambda: get_peft_model(model, config))


def _unfreeze_adapter(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.requires_grad_(True)


def _adapter_config(folder: str) -> dict[str, Any]:
    with _named_errors(folder):
        config: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def _adapter_rank(folder: str) -> int:
    return int(_adapter_config(folder)["r"])


def _require_same_rank(found: int, lora: LoRAConfig, name: str) -> None:
    if lora.r not in (0, found):
        raise ValueError(
            f"lora.r: {lora.r} does not fit the adapter of {name}, which has rank {found}; "
            f"set lora.r to {found}, or to 0 to merge it and train all weights"
        )
