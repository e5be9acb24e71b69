"""Greedy tokens are those of transformers' own generate, and log-probabilities those of a plain forward pass, for each
family of models and under everything that the engine does to them; what cannot be served is refused by name."""

from __future__ import annotations

import contextlib
import copy
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from rlhf_fast import Generator, SamplingParams, models, ops
from rlhf_fast.data.batches import pad
from rlhf_fast.models.forward import Head
from rlhf_fast.ops import compiled
from rlhf_fast.rollout.model import layers
from rlhf_fast.rollout.rollouts import Rollouts

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 300, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2}
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied, biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama of one key head": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 20}),
    "llama of heads wider than the kernels take": ("LlamaConfig", {"head_dim": 272}),
    "llama with scaled positions": (
        "LlamaConfig",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 with windows in the upper layers": (
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 16,
                                "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 9, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", {"sliding_window": 30, "partial_rotary_factor": 0.5}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "olmo": ("OlmoConfig", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "glm": ("GlmConfig", {"head_dim": 8}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 9}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3 moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16,
                                    "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 9}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {**GPT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "gptj": ("GPTJConfig", {**GPT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 4}),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("FalconConfig", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2,
                                "num_attention_heads": 4}),
    "bloom": ("BloomConfig", {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "deepseek": ("DeepseekV3Config", {
        **SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    }),
}  # fmt: skip
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 33, 47)  # one token, and the edges of blocks of 16 and 32


def built(kind: str, options: dict[str, Any]) -> Any:
    config = getattr(transformers, kind)(**(options if "n_embd" in options else {**SMALL, **options}))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=SERVED)
def model(request: pytest.FixtureRequest) -> Any:
    return built(*SERVED[request.param])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in LENGTHS]
    return [*drawn, [*drawn[-1][:40], 9, 8]]  # the last begins like another


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "chunks of 7, blocks of 16": {"max_batch_tokens": 7, "block_size": 16},
    "little memory": {"blocks": 8, "block_size": 16},
    "layers with torch's products": {"torch": True},  # as on a GPU
    "without our layers": {"fast": False},
}


def generator(model: Any, blocks: int = 0, torch: bool = False, **options: Any) -> Generator:
    with mock.patch.object(layers, "compiled_for", lambda states: False) if torch else contextlib.nullcontext():
        return in_blocks(model, blocks, **options)


def in_blocks(model: Any, blocks: int, **options: Any) -> Generator:
    made = Generator(model, **options)
    if blocks:
        made = Generator(model, kv_bytes=blocks * options["block_size"] * made.runner.served.bytes_per_token, **options)
    return made


def responses(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [example.response for example in rollouts.examples()]


@pytest.fixture(scope="module")
def expected(model: Any, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """What transformers generates for each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=1, pad_token_id=0
        )
        found.append(tuple(whole[0, len(prompt) :].tolist()))
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_tokens_and_logprobs(
    model: Any, prompts: list[list[int]], expected: list[tuple[int, ...]], settings: str
) -> None:
    made = generator(model, **SETTINGS[settings])
    greedy = made.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=20, stop_token_ids=(1,)))
    assert responses(greedy) == expected
    if settings == "little memory":
        assert made.statistics.preemptions > 0
    if settings == "as it comes":
        assert made.statistics.reused_tokens >= 32, "two prompts begin alike"
    again = made.generate(prompts, SamplingParams(n=3, temperature=0.9, max_new_tokens=12, stop_token_ids=(1,), seed=2))
    for rollouts, temperature in ((greedy, 1.0), (again, 0.9)):
        with torch.no_grad():
            truth, entropy = models.response_logprobs(model, pad(rollouts.examples()), temperature=temperature)
        for name, want in (("logprobs", truth), ("entropy", entropy)):
            off = (getattr(rollouts, name)[rollouts.response_mask] - want).abs()
            assert off.max() < 1e-4 and off.mean() < 1e-5, f"{name}: {off.max():.1e}, {off.mean():.1e} on average"


@pytest.mark.skipif(compiled.cpu is None, reason="rlhf_fast._C was not built")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "LlamaDecoderLayer LlamaRMSNorm"),
        ("llama tied, biased", "LlamaDecoderLayer LlamaRMSNorm"),
        ("qwen2", "Qwen2DecoderLayer Qwen2RMSNorm"),
        ("qwen3", "Qwen3DecoderLayer Qwen3RMSNorm"),
        ("mistral", "MistralDecoderLayer MistralRMSNorm"),
        ("gemma2", "Gemma2Attention Gemma2MLP Gemma2RMSNorm"),  # its layers have two norms more
        ("llama of heads wider than the kernels take", "LlamaMLP LlamaRMSNorm Linear"),
        ("cohere", "CohereMLP Linear"),  # rotates pairs, not halves
        ("gpt-neox", "Linear"),
    ],
)
def test_the_layers_of_ours_that_serve_are_used_and_taken_away_again(name: str, expected: str) -> None:
    model = built(*SERVED[name])

    def replaced() -> set[str]:
        inside = model.base_model.modules()  # the output layer is called through its weight
        return {type(module).__name__ for module in inside if "forward" in vars(module)}

    with Generator(model).runner.ready():
        assert replaced() == set(expected.split())
    assert replaced() == set()


@pytest.mark.parametrize("strided", ["", "weight", "a", "b", "bias"])
def test_an_output_layer_s_tensors_may_lie_in_memory_as_they_like(strided: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"weight": (40, 32), "bias": (40,), "a": (4, 32), "b": (40, 4)}
    tensors = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    if strided:
        of = tensors[strided]
        tensors[strided] = of.repeat_interleave(2, 0)[::2] if strided == "bias" else of.t().contiguous().t()
        assert not tensors[strided].is_contiguous()
    lora = (tensors["a"], tensors["b"], 0.5)
    head = Head(tensors["weight"], tensors["bias"], lora, None, 2.0)
    hidden = torch.randn(3, 32, generator=generator)
    with mock.patch.object(layers, "output_head", lambda model: head):
        logits = layers.head(None)(hidden)  # type: ignore[arg-type]
    weight, bias, a, b = (tensors[name].double() for name in ("weight", "bias", "a", "b"))
    states = hidden.double()
    want = 2.0 * (states @ weight.t() + bias + 0.5 * states @ a.t() @ b.t())
    assert torch.allclose(logits.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "LlamaAttention LlamaRMSNorm"),
        ("qwen3", "Qwen3Attention Qwen3RMSNorm"),
        ("olmo2", "Olmo2Attention Olmo2RMSNorm"),
        ("gemma2", "Gemma2Attention"),  # its norms add 1 to their weights
        ("cohere", ""),  # rotates pairs, not halves, and its norms take the mean away
        ("gpt2", ""),
    ],
)
def test_layers_with_few_launches_are_those_that_compute_the_same(name: str, expected: str) -> None:
    model = built(*SERVED[name]).bfloat16()  # in which neither would show in the states
    with Generator(model).runner.ready():
        found = {type(m).__name__ for m in model.base_model.modules() if "forward" in vars(m)}
    assert found == set(expected.split())


def test_in_bfloat16_they_are_as_near_to_float32_as_the_models_own(prompts: list[list[int]]) -> None:
    whole = built(*SERVED["qwen3"])
    half = copy.deepcopy(whole).bfloat16()
    params = SamplingParams(n=4, max_new_tokens=16, ignore_eos=True, seed=2)
    found = []
    for fast in (True, False):
        rollouts = Generator(half, fast=fast).generate(prompts, params)
        with torch.no_grad():
            truth, _ = models.response_logprobs(whole, pad(rollouts.examples()))
        found.append((rollouts.logprobs[rollouts.response_mask] - truth).abs().mean())
    assert found[0] <= 1.1 * found[1] and found[1] < 0.02


def test_a_backend_that_was_asked_for_is_the_one_that_generates(prompts: list[list[int]]) -> None:
    model = built(*SERVED["llama"])
    generator = Generator(model)
    with ops.use_backend("reference"), generator.runner.ready():
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(name: str) -> None:
    refused = built(*REFUSED[name])
    why = {"deepseek": "keys of 8 and values of 12 dimensions"}.get(name, "")
    with pytest.raises(ValueError, match=f"model: {type(refused).__name__} .*{why}"):
        Generator(refused)


def test_an_encoder_decoder_is_refused_by_name() -> None:
    config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="model: T5ForConditionalGeneration is an encoder-decoder"):
        Generator(transformers.T5ForConditionalGeneration(config))
