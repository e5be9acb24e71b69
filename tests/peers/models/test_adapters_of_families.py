"""An adapter goes on every linear layer that is one, in families that have layers of their own kinds and names."""

from __future__ import annotations

import pytest
import torch

from bench.families import adapter_is_right, tiny_config, tiny_model
from rlhf_fast import models
from rlhf_fast.config import LoRAConfig


@pytest.mark.parametrize(
    ("kind", "without", "having"),
    [
        ("llama4_text", {"router"}, {"q_proj", "down_proj"}),  # which gives two things
        ("deepseek_v4", {"o_a_proj"}, {"o_b_proj"}),  # of groups
        ("falcon", set(), {"query_key_value", "dense"}),  # of its own kind, but a product
        ("falcon_h1", {"out_proj"}, {"q_proj", "in_proj"}),  # whose weight is read without it
        ("gemma3n_text", set(), {"q_proj", "per_layer_input_gate"}),  # beside others in a list
    ],
)
def test_an_adapter_goes_where_it_can(kind: str, without: set[str], having: set[str]) -> None:
    model = tiny_model(tiny_config(kind))
    assert adapter_is_right(model) == ""
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_modules() if ".lora_A" in name}

    def has(target: str) -> bool:
        return any(f".{name}".endswith(f".{target}") for name in adapted)

    linear = {name.removesuffix(".base_layer") for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(any(f".{name}".endswith(f".{target}") for name in linear) for target in without), "there are such layers"
    assert not any(map(has, without)), adapted
    assert all(has(target) for target in having), adapted


def test_layers_known_by_number_do_not_take_others_with_them() -> None:
    policy = models.trainable(tiny_model(tiny_config("ctrl")), LoRAConfig(r=2, alpha=4))
    adapted = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert any(".ffn.0.lora_A" in name for name in adapted) and any(".ffn.2.lora_A" in name for name in adapted)
