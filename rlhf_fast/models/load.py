"""Models by name: policies, reward models, and what makes either trainable."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rlhf_fast.config import LoRAConfig
from rlhf_fast.models.adapters import (
    Model,
    adapter_config,
    adapter_rank,
    is_adapter,
    require_same_rank,
    require_same_targets,
    trainable_scorer,
    with_policy_adapter,
    with_saved_adapter,
)
from rlhf_fast.models.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from rlhf_fast.models.checkpoint import read_extra, reading_errors, resolve
from rlhf_fast.models.forward import check_head, unwrapped
from rlhf_fast.ops import compiled
from rlhf_fast.runs.model_names import require_reachable, require_whole


@torch.inference_mode(False)  # else nobody could train what is loaded inside of it
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
        model, tokenizer = _random(name, seed, dtype, device)
    else:
        folder = _whole(name)
        tokenizer = _tokenizer(folder)
        if is_adapter(folder) and adapter_config(folder).get("task_type") == "SEQ_CLS":
            raise ValueError(f"model: {name} is a reward model, not a language model")
        model = with_saved_adapter(_pretrained(AutoModelForCausalLM, folder, dtype), folder, merged)
    model = _placed(model, device)
    check_head(model)
    return model, tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model alone; names and errors as for `load`."""
    return _tokenizer(resolve(name))


@torch.inference_mode(False)
def load_reward(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    merged: bool = False,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a reward model: a sequence classifier of transformers with a label for each head, whole or as an adapter.

    Arguments and errors as for `load`. A checkpoint that does not say how many heads it has is taken to have one.
    """
    folder = _whole(name)
    adapter = is_adapter(folder)
    if adapter and adapter_config(folder).get("task_type") != "SEQ_CLS":
        raise ValueError(f"model: {name} is no reward model: its adapter has no scalar head")
    missing_ok = ("score.",) if adapter else ()  # an adapter brings the head with it
    heads = read_extra(folder).get("heads", 1)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"model: {name}: rlhf_fast.json says heads: {heads!r}; expected a whole number from 1")
    model = _pretrained(AutoModelForSequenceClassification, folder, dtype, missing_ok, num_labels=heads)
    model = with_saved_adapter(model, folder, merged)
    return _placed(model, device), _tokenizer(folder)


@torch.inference_mode(False)
def reward_from(
    name: str | Path, lora: LoRAConfig, seed: int = 0, dtype: torch.dtype = torch.float32, heads: int = 1
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Make a trainable reward model that starts from a policy: its weights, its adapter if any, and new heads.

    A head starts at standard deviation 1 / sqrt(H + 1) (arXiv 2009.01325), so that first scores are of order one.
    """
    folder = _whole(name)
    tokenizer = _tokenizer(folder)
    model = _pretrained(AutoModelForSequenceClassification, folder, dtype, ("score.",), num_labels=heads)
    if not hasattr(model, "score"):
        raise ValueError(f"model: {name} has no scalar head in transformers; choose a decoder such as Llama or Qwen")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        spread = (model.config.hidden_size + 1) ** -0.5
        for weight in model.score.weight:  # one after the other: the first is the same however many there are
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    if is_adapter(folder):
        require_same_rank(adapter_rank(folder), lora, str(name))
        require_same_targets(adapter_config(folder).get("target_modules"), lora, str(name))
        model = with_policy_adapter(model, folder)
    return _placed(trainable_scorer(model, lora, seed), None), tokenizer


@torch.inference_mode(False)
def critic_from(
    name: str | Path, lora: LoRAConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Model, nn.Linear, PreTrainedTokenizerBase]:
    """Make a critic's model and head (H -> 1, float32), whose first values are a reward model's normalised scores.

    The model's own adapter is trained on if it has one; otherwise it gets one, or (`lora.r == 0`) is trained whole.
    """
    folder = _whole(name)
    model, tokenizer = load_reward(name, dtype)
    score = unwrapped(model).score
    extra = read_extra(folder)
    mean, std = extra.get("score_mean", 0.0), extra.get("score_std", 1.0)
    head = nn.Linear(score.weight.shape[1], 1, device=score.weight.device)
    with torch.no_grad():
        head.weight.copy_(score.weight.mean(dim=0, keepdim=True) / std)  # of all heads
        head.bias.fill_(-mean / std)
    return trainable_scorer(model, lora, seed, head=False), head, tokenizer  # `head` is in the place of its own


def from_shape(shape: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Model:
    """Build a causal language model from a config alone, with random weights, or within `torch.device("meta")` with
    shapes and no memory."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=dtype, trust_remote_code=False).eval()


def reward_from_shape(shape: PreTrainedConfig, dtype: torch.dtype = torch.float32, heads: int = 1) -> Model:
    """Build a reward model from a config alone, with weights as those of `from_shape`."""
    shape = copy.deepcopy(shape)
    shape.num_labels = heads
    return AutoModelForSequenceClassification.from_config(shape, dtype=dtype, trust_remote_code=False).eval()


def _whole(name: str | Path) -> str:
    """The folder or hub name that a name means, with all that a model needs in it as far as the files show."""
    folder = resolve(name)
    if Path(folder).is_dir():
        require_whole(Path(folder))
    else:
        require_reachable(folder)
    return folder


def _placed(model: Model, device: str | torch.device | None) -> Model:
    """Move a model to its device, in evaluation mode; on a CPU the weights move out of the mapped file, which can then
    go, into huge pages, from which a step of generation reads them a fifth faster."""
    model = model.to(device or default_device()).eval()
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            weight = parameter.data
            parameter.data = compiled.new(weight.shape, weight.dtype, weight.device, large=1 << 20).copy_(weight)
    return model


def default_device() -> torch.device:
    """Return the device that `RLHF_FAST_DEVICE` (on the command line `--device`) names, else the GPU, if there is one.

    Raises:
        ValueError: it says something else than a device that is here.
    """
    name = os.environ.get("RLHF_FAST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind != "cuda" or not (number or "0").isdigit():
        raise ValueError(f"device: {name!r}; expected cpu, cuda or cuda:N")
    if int(number or 0) >= count:
        raise ValueError(f"device: {name}, but torch {torch.__version__} sees {count} CUDA devices here")
    return torch.device(name)


def _pretrained(
    auto_class: Any, folder: str, dtype: torch.dtype, missing_ok: tuple[str, ...] = (), **options: Any
) -> Model:
    """The model of `folder`, or the base model of the adapter in it. Code from a model's folder is never run.

    Weights that the folder lacks are an error, not random numbers, unless their names begin as `missing_ok` says.
    """
    if is_adapter(folder):
        base = adapter_config(folder).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"model: the adapter in {folder} does not name the model that it belongs to")
        try:
            base = _whole(base)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"model: the base model of the adapter in {folder} is missing: {error}") from error
        return _pretrained(auto_class, base, dtype, missing_ok, **options)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the fresh head that a new reward model has on purpose
    try:
        with reading_errors(folder):
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


def _tokenizer(folder: str) -> PreTrainedTokenizerBase:
    with reading_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer of {folder} names no end-of-sequence token")
    return tokenizer


def _random(
    config: PreTrainedConfig, seed: int, dtype: torch.dtype, device: str | torch.device | None
) -> tuple[Model, PreTrainedTokenizerBase]:
    if config.vocab_size < VOCAB_SIZE:
        raise ValueError(f"config.vocab_size: {config.vocab_size} is less than the byte tokenizer's {VOCAB_SIZE}")
    tokenizer = byte_tokenizer()
    config = copy.deepcopy(config)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = None
    with torch.random.fork_rng(), torch.device(device or default_device()):  # billions are drawn faster on a GPU
        torch.manual_seed(seed)
        # .to(dtype) would round the rotary frequencies too, which stay in float32 when a checkpoint is loaded.
        return from_shape(config, dtype), tokenizer
