from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.families import tiny_config, tiny_model
from rlhf_fast import models
from rlhf_fast.models.forward import check_head
from rlhf_fast.models.logits import Logits, logits_of, measured

MADE = {  # of what, and what it comes to
    "llama": ({}, Logits(1.0, None)),
    "hyperclovax": ({"logits_scaling": 15.0}, Logits(15.0, None)),  # multiplies
    "granite": ({"logits_scaling": 8.0}, Logits(1 / 8, None)),  # divides by a setting of that name
    "cohere": ({"logit_scale": 0.0625}, Logits(0.0625, None)),
    "falcon_h1": ({"lm_head_multiplier": 0.5}, Logits(0.5, None)),
    "recurrent_gemma": ({"logits_soft_cap": 30.0}, Logits(1.0, 30.0)),
    "gemma2": ({"final_logit_softcapping": 3.0}, Logits(1.0, 3.0)),
    "minicpm3": ({"dim_model_base": 8}, Logits(0.25, None)),  # before the product
    "phi": ({}, Logits(1.0, None)),  # with a bias
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MADE)
def test_scales_and_soft_caps_are_measured_to_the_last_digit(kind: str, dtype: torch.dtype) -> None:
    changes, made = MADE[kind]
    model = tiny_model(tiny_config(kind, **changes)).to(dtype)
    assert measured(model) == made
    head = models.output_head(model)
    assert (head.logit_scale, head.softcap) == (made.scale, made.softcap)
    check_head(model)


def test_it_is_measured_once_and_goes_with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("hyperclovax"))
    models.output_head(model)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("run again")

    copy = models.frozen_copy(model)
    for one in (model, copy):
        monkeypatch.setattr(one, "forward", again)
        assert models.output_head(one).logit_scale == 4.0
    assert not any("rlhf_fast" in name for name in (*model.state_dict(), *model.config.to_dict()))


def test_an_adapter_on_the_output_layer_changes_nothing_of_it(nudge: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny_model(tiny_config("hyperclovax")), LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    )
    nudge(adapted, 0.3)
    assert measured(adapted.get_base_model()) == Logits(4.0, None)
    check_head(adapted)


def test_without_values_nothing_is_run() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("hyperclovax"))
    assert logits_of(model) == Logits()


def in_between(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)
    forward = model.forward
    layer = nn.LayerNorm(32)

    def with_a_layer(*args: Any, **kwargs: Any) -> Any:
        hook = model.lm_head.register_forward_pre_hook(lambda _, x: (layer(x[0]),), prepend=True)
        try:
            return forward(*args, **kwargs)
        finally:
            hook.remove()

    model.forward = with_a_layer


def of_some_tokens(model: Any) -> None:
    def scaled(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = output.logits * torch.linspace(0.5, 2.0, output.logits.shape[-1])
        return output

    model.register_forward_hook(scaled)


def fewer(model: Any) -> None:
    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = output.logits[..., :-4]
        return output

    model.register_forward_hook(cut)


def of_its_own(model: Any) -> None:
    model.lm_head.gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (in_between, "there are layers between its trunk and its output layer"),
        (of_some_tokens, "its logits are not the products of its output layer times a number, soft-capped or not"),
        (fewer, r"its logits have the shape \(1, 4, 316\), its output layer's products \(1, 4, 320\)"),
        (of_its_own, "its output layer has more than a weight and a bias: gain"),
    ],
)
def test_what_is_no_scale_and_no_soft_cap_is_refused_by_name(change: Any, why: str) -> None:
    model = tiny_model(tiny_config("llama"))
    check_head(model)
    change(model)
    with pytest.raises(ValueError, match=f"model: LlamaForCausalLM makes its logits in a way not known here: {why}"):
        check_head(model)


def test_tokens_that_see_what_follows_are_refused_by_name() -> None:
    model = tiny_model(tiny_config("cpmant"))
    with pytest.raises(ValueError, match="model: CpmAntForCausalLM lets tokens see what follows them, or other rows"):
        check_head(model)
