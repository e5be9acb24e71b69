from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from bench.families import CHUNK, ORIGINAL, WINDOW, tiny_config, tiny_model
from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.data.batches import LONGEST_ROW, Example, pad
from rlhf_fast.models.sight import Sight, longest_row, reach_of, sights

ALL, SOME, CHUNKS = Sight(), Sight(window=WINDOW), Sight(longest=CHUNK)


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("llama", {}, [ALL] * 4),
        ("mistral", {}, [SOME] * 4),
        ("mistral", {"sliding_window": 4096}, [Sight(window=4096)] * 4),
        ("gemma2", {}, [SOME, ALL] * 2),
        ("gemma3_text", {"num_hidden_layers": 6}, [SOME] * 5 + [ALL]),
        ("gemma4_text", {}, [SOME, ALL] * 2),  # the upper layers are given a view of the masks
        ("llama4_text", {}, [CHUNKS] * 3 + [ALL]),
        ("bloom", {}, []),  # attends by itself
    ],
)
def test_windows_and_chunks_are_those_of_the_masks(kind: str, changes: dict[str, Any], found: list[Sight]) -> None:
    model = tiny_model(tiny_config(kind, **changes))
    before = model.config._attn_implementation
    assert list(sights(model).values()) == found
    assert model.config._attn_implementation == before


def test_a_window_that_only_the_mask_knows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is told of none: packed, shared and generated as the mask has it all the same."""
    from transformers.models.mistral import modeling_mistral

    told = modeling_mistral.ALL_ATTENTION_FUNCTIONS

    class Untold:
        def get_interface(self, *args: Any) -> Any:
            function = told.get_interface(*args)
            return lambda *x, sliding_window=None, **options: function(*x, **options)

    monkeypatch.setattr(modeling_mistral, "ALL_ATTENTION_FUNCTIONS", Untold())
    model = tiny_model(tiny_config("mistral"))
    assert models.longest_packed(model) == models.longest_shared(model) == WINDOW
    rollouts = Generator(model).generate([list(range(5, 45))], SamplingParams(max_new_tokens=12, ignore_eos=True))
    with torch.no_grad():
        want, _ = models.response_logprobs(model, pad(rollouts.examples()))
    torch.testing.assert_close(rollouts.logprobs[rollouts.response_mask], want, rtol=0, atol=1e-4)


def test_masks_that_cannot_be_asked_are_refused_by_name() -> None:
    model = tiny_model(tiny_config("doge"))
    said = "model: DogeForCausalLM makes a mask of its own for layer 0, of which no window can be known"
    with pytest.raises(ValueError, match=said):
        Generator(model)
    assert models.longest_packed(model) == models.longest_shared(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_length_from_which_on_rows_change_each_other_is_found(dtype: torch.dtype) -> None:
    assert reach_of(tiny_model(tiny_config("phi3, LongRoPE")).to(dtype)) == ORIGINAL
    assert reach_of(tiny_model(tiny_config("llama, dynamic NTK")).to(dtype)) == ORIGINAL - 1
    for kind in ("llama", "llama, YaRN", "gpt2", "gemma3_text", "bloom", "mamba"):
        assert reach_of(tiny_model(tiny_config(kind)).to(dtype)) == sys.maxsize, kind


def test_beyond_it_models_are_refused_by_name_before_anything_is_done(tmp_path: Any) -> None:
    from rlhf_fast import SFTConfig, SFTTrainer

    model, tokenizer = models.load(tiny_config("phi3, LongRoPE"))
    said = r"model: Phi3ForCausalLM rotates all .* \(LongRoPE, dynamic NTK\); got max_length {}, expected at most 24"
    with pytest.raises(ValueError, match=said.format(25)):
        models.response_logprobs(model, pad([Example(tuple(range(5, 25)), (3, 4, 5, 6, 7)), Example((5,), (6,))]))
    with pytest.raises(ValueError, match="exceeds the model's context of 24 here"):
        Generator(model).generate([[5] * 20], SamplingParams(max_new_tokens=5, ignore_eos=True))
    models.save(tmp_path / "base", model, tokenizer)
    rows = [{"prompt": "a", "completion": "b"}] * 8
    with pytest.raises(ValueError, match=said.format(512)):
        SFTTrainer(tmp_path / "base", rows, tmp_path / "sft", SFTConfig(max_length=512))
    assert not (tmp_path / "sft").exists()


def test_ppo_says_at_once_how_long_responses_may_be(tmp_path: Any) -> None:
    from rlhf_fast import PPOConfig, PPOTrainer

    models.save(tmp_path / "base", *models.load(tiny_config("llama4_text")))
    config = PPOConfig(prompts_per_step=2, samples_per_prompt=2, max_new_tokens=4, max_length=40)
    said = "ppo.max_length: 40, but Llama4ForCausalLM generates rightly up to 16 tokens only"
    with pytest.raises(ValueError, match=said):
        PPOTrainer(tmp_path / "base", lambda *_: [0.0], [{"prompt": "a"}] * 2, tmp_path / "ppo", config)
    assert not (tmp_path / "ppo").exists()


def test_padding_takes_no_positions_that_no_sequence_has() -> None:
    """Else a wide row would be one long sequence to a rotation that goes by the longest."""
    examples = [Example((5, 6, 7), response) for response in ((8, 9, 10), (11,), (12, 13))]
    batch = pad([*examples, Example((5, 6), (7,))], longest_shared=8)
    assert batch.positions is not None and int(batch.positions.max()) == 5


def test_places_in_a_row_matter_to_whoever_counts_by_itself() -> None:
    assert longest_row(tiny_model(tiny_config("llama4_text", floor_scale=8192))) == 8191
    assert models.longest_shared(tiny_model(tiny_config("llama4_text", floor_scale=LONGEST_ROW))) == 0
    for kind in ("llama", "gemma2", "ministral3", "gpt2", "mixtral"):
        assert longest_row(tiny_model(tiny_config(kind))) == sys.maxsize, kind
