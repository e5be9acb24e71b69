"""Fixtures that several rooms share. Nothing here, and no test, needs a network."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait busily slow all others down

import torch
from torch import nn

if importlib.util.find_spec("hypothesis") is None:
    from tests import no_hypothesis

    sys.modules["hypothesis"], sys.modules["hypothesis.strategies"] = no_hypothesis, no_hypothesis.strategies  # type: ignore[assignment]

if sanitized := os.environ.get("RLHF_FAST_TEST_MODULE"):  # `make asan`: in place of the compiled module of the package
    import rlhf_fast

    spec = importlib.util.spec_from_file_location("rlhf_fast._C", sanitized)
    assert spec is not None and spec.loader is not None and "rlhf_fast._C" not in sys.modules
    sys.modules["rlhf_fast._C"] = rlhf_fast._C = importlib.util.module_from_spec(spec)  # type: ignore[attr-defined]
    spec.loader.exec_module(sys.modules["rlhf_fast._C"])

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which no test module has done yet


def pytest_collection_finish() -> None:
    """Takes all that is imported out of sight of the garbage collector, for which it is much to look through: trainers
    collect after each error for too little memory."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look at exit whether all of theirs is gone


SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # wide enough for logits that differ, so that a missing scale or soft cap shows
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 1.5},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 260,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "granite": ("GraniteConfig", {**SMALL, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "cohere": ("CohereConfig", {**SMALL, "logit_scale": 0.25, "eos_token_id": 1}),
    "phi": ("PhiConfig", {**SMALL, "num_key_value_heads": 4}),  # its output layer has a bias
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of two layers with random weights and the byte tokenizer."""
    from rlhf_fast import models
    from rlhf_fast.pipeline import tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "base"
    with torch.random.fork_rng():  # the same model whichever test is the first to ask
        torch.manual_seed(0)
        models.save(folder, *models.load(tiny_model()))
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer), loaded anew from `tiny_folder`."""
    from rlhf_fast import models

    return models.load(tiny_folder)


@pytest.fixture
def family_config() -> Callable[..., Any]:
    """`family_config("qwen2", **changes)`: the config of a tiny model of that family."""
    import transformers

    def make(name: str, **changes: Any) -> Any:
        kind, options = FAMILIES[name]
        return getattr(transformers, kind)(**{**options, **changes})

    return make


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, family_config: Callable[..., Any]) -> Any:
    """The config of a tiny model, one of each family in turn."""
    return family_config(request.param)


@pytest.fixture
def nudge() -> Callable[..., None]:
    """`nudge(model, scale=0.02)`: noise on all trainable weights, as if the model had been trained."""

    @torch.no_grad()
    def add_noise(model: nn.Module, scale: float = 0.02) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))

    return add_noise
