"""What an output layer multiplies by: the gradients that the layer itself gives, and no wait for the device."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from rlhf_fast.models.output_layer import product_of

H, V = 6, 20


def layer_with(bias: bool = False, **options: Any) -> Any:
    """A linear layer under two adapters at once, which product_of cannot tell by their factors."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["head"], **options)
    model = peft.get_peft_model(torch.nn.ModuleDict({"head": torch.nn.Linear(H, V, bias=bias)}), settings, "first")
    model.add_adapter("second", settings)
    model.base_model.set_adapter(["first", "second"])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.base_model.model["head"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_gradients_are_those_of_the_layer_from_the_first_step_on(bias: bool, options: dict[str, Any]) -> None:
    """A bias that an adapter trains starts at 0, where its values do not show that it is one."""
    layer = layer_with(bias, **options)
    states, upstream = torch.randn(5, H), torch.randn(5, V)
    trained = dict(layer.named_parameters())
    outputs = layer(states)
    want = torch.autograd.grad((outputs * upstream).sum(), list(trained.values()), allow_unused=True)
    weight, offset, factors = product_of(layer)
    assert factors is None and (offset is None) == (not bias and "lora_bias" not in options)
    got_outputs = states @ weight.T + (0.0 if offset is None else offset)
    torch.testing.assert_close(got_outputs, outputs, rtol=0, atol=1e-5)
    got = torch.autograd.grad((got_outputs * upstream).sum(), list(trained.values()), allow_unused=True)
    for name, mine, its in zip(trained, got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4, msg=name)


def test_values_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each look would wait for all that it has to do."""
    looks: list[torch.Tensor] = []
    count = torch.count_nonzero
    monkeypatch.setattr(torch, "count_nonzero", lambda x: looks.append(x) or count(x))
    layer = layer_with()
    first, second = product_of(layer)[0], product_of(layer)[0]
    assert torch.equal(first, second) and len(looks) == 1
    layer.set_adapter(["second"])
    product_of(layer)
    layer.set_adapter(["second", "first"])
    product_of(layer)
    assert len(looks) == 2
