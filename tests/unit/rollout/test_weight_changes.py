"""What was computed with other weights is forgotten, whoever changed them and however."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.config import LoRAConfig
from rlhf_fast.models.fingerprint import fingerprint

PROMPTS = [list(range(3, 60)), list(range(3, 50))]
PARAMS = SamplingParams(max_new_tokens=4, ignore_eos=True)


def step(optimizer: torch.optim.Optimizer, model: Any) -> None:
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()


def fused(model: Any) -> None:
    step(torch.optim.AdamW(model.parameters(), lr=0.05, fused=True), model)


def foreach(model: Any) -> None:
    step(torch.optim.SGD(model.parameters(), lr=0.05, foreach=True), model)


def through_data(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(3.0)


def through_numpy(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.detach().numpy()[:] *= 3.0


def load_state_dict(model: Any) -> None:
    model.load_state_dict({name: 2.0 * x for name, x in model.state_dict().items()})


def assigned(model: Any) -> None:
    model.load_state_dict({name: 2.0 * x for name, x in model.state_dict().items()}, assign=True)


def replaced(model: Any) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


def in_place_of_data(model: Any) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.weight.data = -layer.weight.data


def rows_swapped(model: Any) -> None:
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    weight.copy_(weight.flip(0))


def columns_swapped(model: Any) -> None:
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    weight.copy_(weight.flip(1))


def one_bit(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.view(torch.int32)[5, 7] ^= 1 << 30


def a_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [fused, foreach, through_data, through_numpy, load_state_dict, assigned, replaced, in_place_of_data, rows_swapped,
     columns_swapped, one_bit, a_buffer],
)  # fmt: skip
def test_a_change_of_weights_is_seen(change: Callable[[Any], None], tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    generator = Generator(model.requires_grad_(True), tokenizer)
    generator.generate(PROMPTS, PARAMS)
    generator.generate(PROMPTS, PARAMS)
    assert generator.statistics.reused_tokens >= 64 and generator.weight_version == 1
    change(model)
    changed = generator.generate(PROMPTS, PARAMS)
    assert generator.weight_version == 2
    assert torch.equal(changed.logprobs, Generator(model, tokenizer).generate(PROMPTS, PARAMS).logprobs)


TASK = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "lora": peft.LoraConfig(**TASK),
    "dora": peft.LoraConfig(use_dora=True, **TASK),
    "lokr": peft.LoKrConfig(**TASK),
    "loha": peft.LoHaConfig(**TASK),
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **TASK),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, **TASK),
    "copies": peft.LoraConfig(modules_to_save=["norm"], **TASK),
}


@pytest.mark.parametrize("use", ["switched off", "another", "folded", "scaled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_adapters_is_seen(kind: str, use: str, tiny_folder: Path) -> None:
    model, tokenizer = models.load(tiny_folder)
    model = peft.get_peft_model(model, KINDS[kind])
    model.add_adapter("other", KINDS[kind])
    for name, p in model.named_parameters():
        if "layers" not in name or ("base_layer" not in name and p.dim() and (".default" in name or ".other" in name)):
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    model.eval()
    scaled = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict) and m.scaling]
    if use == "scaled" and not scaled:
        pytest.skip("this kind has no scaling")
    generator = Generator(model, tokenizer)
    generator.generate(PROMPTS, PARAMS)
    generator.generate(PROMPTS, PARAMS)
    assert generator.statistics.reused_tokens >= 64 and generator.weight_version == 1
    if use == "switched off":
        model.base_model.disable_adapter_layers()
    elif use == "another":
        model.set_adapter("other")
    elif use == "folded":
        model.merge_adapter()
    else:
        for module in scaled:
            module.scaling["default"] *= 5.0
    changed = generator.generate(PROMPTS, PARAMS)
    assert generator.weight_version == 2
    assert torch.equal(changed.logprobs, Generator(model, tokenizer).generate(PROMPTS, PARAMS).logprobs)


def test_a_model_that_was_made_in_inference_mode_generates_and_is_watched(tiny_folder: Path) -> None:
    model, tokenizer = models.load(tiny_folder)
    with torch.inference_mode():
        model = copy.deepcopy(model)
    assert next(model.parameters()).is_inference()
    want = Generator(*models.load(tiny_folder)).generate(PROMPTS, PARAMS)
    generator = Generator(model, tokenizer)
    assert torch.equal(generator.generate(PROMPTS, PARAMS).logprobs, want.logprobs)
    with torch.inference_mode():
        assert torch.equal(generator.generate(PROMPTS, PARAMS).logprobs, want.logprobs)
        model.model.layers[1].mlp.up_proj.weight.mul_(3.0)
    changed = generator.generate(PROMPTS, PARAMS)
    assert generator.weight_version == 2 and not torch.equal(changed.logprobs, want.logprobs)


def test_what_is_loaded_in_inference_mode_can_be_trained(tiny_folder: Path) -> None:
    with torch.inference_mode():
        model, _ = models.load(tiny_folder)
    logits = models.trainable(model, LoRAConfig(r=0))(input_ids=torch.tensor([[5, 6, 7]])).logits
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1000, 3), (64, 513)])
def test_every_place_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    class Held(torch.nn.Module):
        def __init__(self, x: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("x", x)

    x = torch.ones(shape).to(dtype)
    before = fingerprint(Held(x))
    assert before == fingerprint(Held(x.clone()))
    flat, seen = x.reshape(-1), {before}
    places = sorted({0, flat.numel() // 2, flat.numel() - 1})
    for place in places:
        other = flat.clone()
        other[place] = 0
        seen.add(fingerprint(Held(other.view(shape))))
    assert len(seen) == 1 + len(places)
    if x.dim() == 2:
        assert fingerprint(Held(x.T.contiguous().T)) == before  # whatever the layout
