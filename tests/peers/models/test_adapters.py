"""Adapters of every kind that peft makes, on the output layer too: the numbers are those that peft computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn.utils import parametrize

from rlhf_fast import Generator, SamplingParams, SFTTrainer, models
from rlhf_fast.config import LoRAConfig, PPOConfig, SFTConfig
from rlhf_fast.data.batches import Example, pad
from rlhf_fast.models import adapters
from rlhf_fast.trainers.ppo.trainer import PPOTrainer

TARGETS = ["q_proj", "down_proj", "lm_head"]
TASK = {"task_type": "CAUSAL_LM"}
KINDS = {
    "lora": peft.LoraConfig(target_modules=TARGETS, **TASK),
    "rslora": peft.LoraConfig(target_modules=TARGETS, use_rslora=True, **TASK),
    "dora": peft.LoraConfig(target_modules=TARGETS, use_dora=True, **TASK),
    "lora_bias": peft.LoraConfig(target_modules=TARGETS, lora_bias=True, **TASK),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], **TASK),
    "ia3 before": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["lm_head"], **TASK),
    "lokr": peft.LoKrConfig(target_modules=TARGETS, **TASK),
    "loha": peft.LoHaConfig(target_modules=TARGETS, **TASK),
    "oft": peft.OFTConfig(target_modules=TARGETS, r=0, oft_block_size=4, **TASK),
    "vera": peft.VeraConfig(target_modules=["q_proj", "v_proj", "o_proj"], d_initial=1.0, **TASK),
    "copied head": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **TASK),
    "copied layers": peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"], **TASK
    ),
    "new tokens": peft.TrainableTokensConfig(token_indices=[5, 6, 7], target_modules=["embed_tokens"], **TASK),
}
EXAMPLE = Example((5, 6, 7), (8, 9, 200, 13))
IDS = torch.tensor([EXAMPLE.prompt + EXAMPLE.response])


def adapted(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """With an adapter that does something."""
    model, tokenizer = models.load(folder, dtype)
    model = peft.get_peft_model(model, KINDS[kind]).eval()
    generator = torch.Generator().manual_seed(0)
    size = 0.05 if "lora" in kind else 0.3  # of factors that multiply each other
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model, tokenizer


def by_peft(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Log-probability of each token but the first."""
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_and_what_is_sampled_is_what_peft_computes(
    kind: str, dtype: torch.dtype, tiny_folder: Path
) -> None:
    """Values and gradients. On a bfloat16 model peft keeps adapters in float32."""
    model, tokenizer = adapted(tiny_folder, kind, dtype)
    with torch.no_grad():
        plain = by_peft(models.load(tiny_folder, dtype)[0])
    near = 1e-5 if dtype == torch.float32 else 1e-2
    found, _ = models.response_logprobs(model, pad([EXAMPLE], torch.device("cpu")))
    want = by_peft(model)[2:]
    assert float((want.detach() - plain[2:]).abs().max()) > 2 * near  # the adapter does something
    torch.testing.assert_close(found, want, rtol=near, atol=near)  # of bfloat16, which has 8 bits
    trained = [p for p in model.parameters() if p.requires_grad]
    got, expected = (torch.autograd.grad(x.sum(), trained, allow_unused=True) for x in (found, want))
    assert [x is None for x in got] == [x is None for x in expected]
    for a, b in ((a, b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None):
        assert float((a - b).float().norm()) <= 3 * near * float(b.float().norm())

    rollouts = Generator(model, tokenizer).generate([[5, 6, 7]], SamplingParams(max_new_tokens=24, ignore_eos=True))
    with torch.no_grad():
        want = by_peft(model, rollouts.input_ids[None])[2:]
        exact = by_peft(model.float(), rollouts.input_ids[None])[2:]  # the same weights
    error, peft_error = (float((x - exact).square().mean().sqrt()) for x in (rollouts.logprobs[3:], want))
    assert error <= max(2 * peft_error, near)


@pytest.mark.parametrize("kind", ["lora", "dora", "lora_bias", "ia3", "lokr", "copied layers"])
def test_an_adapter_of_any_kind_is_loaded_trained_and_saved(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    adapted(tiny_folder, kind)[0].save_pretrained(str(tmp_path / "policy"))
    tokenizer = models.load(tiny_folder)[1]
    tokenizer.save_pretrained(tmp_path / "policy")
    data = [{"prompt": f"Say {i}", "completion": "yes"} for i in range(8)]
    config = SFTConfig(epochs=1, batch_size=4, heldout=0.25, lora=LoRAConfig(r=8))
    trainer = SFTTrainer(tmp_path / "policy", data, tmp_path / "sft", config)
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("base_layer" not in name for name in trained)
    trainer.train()
    ours = models.load(tmp_path / "sft")[0]
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], before) for name, before in trained.items())
    with torch.no_grad():
        torch.testing.assert_close(by_peft(ours), by_peft(trainer.model), rtol=0, atol=1e-5)

    ppo = PPOConfig(steps=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=4, minibatches=2, epochs=1,
                    lora=LoRAConfig(r=8))  # fmt: skip
    prompts = [{"prompt": f"Say {i}"} for i in range(4)]
    policy = PPOTrainer(tmp_path / "sft", lambda p, r: [float(len(x)) for x in r], prompts, tmp_path / "ppo", ppo)
    policy.train()  # whose first update checks that sampling, reference and training agree
    assert (tmp_path / "ppo" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
], ids=lambda config: config.peft_type.value)  # fmt: skip
def test_an_adapter_that_puts_something_before_the_prompt_is_refused(
    config: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = models.load(tiny_folder)
    model = peft.get_peft_model(model, config)
    message = f"model: .* of the kind {config.peft_type.value}, which puts learned states before every prompt; expected"
    for use in (
        lambda: Generator(model, tokenizer),
        lambda: models.response_logprobs(model, pad([EXAMPLE], torch.device("cpu"))),
        lambda: models.trainable(model, LoRAConfig(r=8)),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.reward_from(tmp_path, LoRAConfig(r=8))


# Reward models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "copied layers", "dora", "ia3"])
def test_a_reward_model_from_any_adapter_scores_the_same_live_and_from_its_checkpoint(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    policy, tokenizer = adapted(tiny_folder, kind)
    policy.save_pretrained(str(tmp_path / "policy"))
    tokenizer.save_pretrained(tmp_path / "policy")
    batch = pad([EXAMPLE], torch.device("cpu"))
    model, _ = models.reward_from(tmp_path / "policy", LoRAConfig(r=8))
    with torch.no_grad():  # it begins in the policy's states
        torch.testing.assert_close(
            models.hidden_states(model, batch.input_ids), models.hidden_states(policy, batch.input_ids),
            rtol=0, atol=1e-5,
        )  # fmt: skip
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert any("score" in name for name in trained)
        assert kind != "copied layers" or any("embed_tokens" in name for name in trained)
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        live = models.score_last(model, batch)
        models.save(tmp_path / "reward", model, tokenizer, extra={"heads": 1})
        for merged in (False, True) if kind != "dora" else (False,):
            loaded, _ = models.load_reward(tmp_path / "reward", merged=merged)
            torch.testing.assert_close(models.score_last(loaded, batch), live, rtol=0, atol=1e-5)


# Listeners ------------------------------------------------------------------------------------------------------------


def test_hooks_inside_layers_fire_while_it_generates(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    plain = Generator(model, tokenizer).generate([[5, 6, 7]], params)
    fired: dict[str, int] = {}
    handles = []
    for name, module in model.model.named_modules():
        if name:
            handles.append(
                module.register_forward_hook(lambda *_, name=name: fired.update({name: fired.get(name, 0) + 1}))
            )
    generator = Generator(model, tokenizer)
    fired.clear()
    heard = generator.generate([[5, 6, 7]], params)
    expected = {
        name for name, module in model.model.named_modules() if name and not isinstance(module, torch.nn.ModuleList)
    }
    assert set(fired) == expected
    assert all(count == 4 for count in fired.values())
    assert torch.equal(heard.input_ids, plain.input_ids)
    torch.testing.assert_close(heard.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    for handle in handles:
        handle.remove()


def test_a_hook_that_changes_what_a_layer_says_is_obeyed(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, given, output: output * 3.0)
    rollouts = Generator(model, tokenizer).generate([[5, 6, 7]], SamplingParams(max_new_tokens=4, ignore_eos=True))
    with torch.no_grad():
        want = by_peft(model, rollouts.input_ids[None])[2:]
    torch.testing.assert_close(rollouts.logprobs[3:], want, rtol=0, atol=1e-5)


def test_hooks_on_the_output_layer_are_refused(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    for use in (
        lambda: Generator(model, tokenizer),
        lambda: models.response_logprobs(model, pad([EXAMPLE], torch.device("cpu"))),
    ):
        with pytest.raises(ValueError, match="model: its output layer has hooks, or a forward of its own"):
            use()
    handle.remove()
    Generator(model, tokenizer)


def test_a_weight_that_is_computed_is_computed_anew(tiny: tuple[Any, Any]) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2.0 * weight

    model, tokenizer = tiny
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Doubled())
    rollouts = Generator(model, tokenizer).generate([[5, 6, 7]], SamplingParams(max_new_tokens=4, ignore_eos=True))
    with torch.no_grad():
        want = by_peft(model, rollouts.input_ids[None])[2:]
    torch.testing.assert_close(rollouts.logprobs[3:], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("task", "whole"), [("CAUSAL_LM", set()), ("SEQ_CLS", {"score", "classifier"})])
def test_what_is_trained_whole_beside_an_adapter_is_the_head_of_scores(
    task: str, whole: set[str], tiny: tuple[Any, Any]
) -> None:
    """As adapter_config.json has it, by which other libraries load it; peft adds another name for the head."""
    model = copy.deepcopy(tiny[0])
    if task == "SEQ_CLS":
        model = transformers.LlamaForSequenceClassification(model.config)
    config = adapters.with_adapter(model, LoRAConfig(r=2), 0, task).peft_config["default"]
    assert set(config.modules_to_save or ()) == whole and config.task_type == task
