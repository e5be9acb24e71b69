"""Models whose layers are not all of one dtype: a trunk that is narrower or wider than the output layer, or layers of a
dtype of their own. Sampled, and the log-probabilities are those of the same weights in plain PyTorch. In a process of
its own: what once wrote past its memory would take this one with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_fast.ops import compiled
from tests import processes

PROGRAM = """
import torch, transformers
from rlhf_fast import Generator, SamplingParams

for trunk, head, bias in CASES:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(trunk)
    model.lm_head = torch.nn.Linear(32, 260, bias=bias is not None, dtype=head)
    if bias is not None:
        model.lm_head.bias.data = model.lm_head.bias.data.to(bias)
    params = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
    made = Generator(model, None).generate([[3, 4, 5, 6], [7, 8]], params)
    for b in range(2):
        begin, end = made.cu_seqlens[b : b + 2].tolist()
        ids, found, counts = (x[begin:end] for x in (made.input_ids, made.logprobs, made.response_mask))
        with torch.no_grad():
            states = model.model(ids[None]).last_hidden_state[0].float()
            weight, bias_of = model.lm_head.weight.float(), model.lm_head.bias
            logits = states @ weight.T + (0 if bias_of is None else bias_of.float())
        truth = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        error = (found[1:] - truth)[counts[1:]].abs().max()
        assert error < 0.02, f"{trunk}, {head}, {bias}: {error}"  # of bfloat16, near -4
"""
CASES = [
    (torch.bfloat16, torch.float32, None),
    (torch.float16, torch.float32, None),
    (torch.float32, torch.bfloat16, None),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]


@pytest.mark.skipif(compiled.cpu is None, reason="rlhf_fast._C was not built")
def test_a_trunk_and_an_output_layer_of_two_dtypes(tmp_path: Path) -> None:
    processes.code(f"import torch\nCASES = {CASES!r}\n{PROGRAM}", tmp_path)
