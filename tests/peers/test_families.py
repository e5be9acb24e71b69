"""A few of the families that `python -m bench.families` tries, those in which something was wrong among them; and its
page, which names no wrong one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench import families
from rlhf_fast import Generator, SamplingParams, models

RIGHT = ("right", "right")
FAMILIES: dict[str, tuple[str, str, str]] = {  # training, generation, and a word of why
    "llama": (*RIGHT, ""),
    "hyperclovax": (*RIGHT, ""),  # multiplies by what others divide by
    "falcon_h1": ("right", "refused", "does not attend through transformers' attention interface"),
    "recurrent_gemma": ("right", "refused", "1 of its 4 layers attend"),
    "gemma3n_text": (*RIGHT, ""),  # layers share keys and values
    "gemma4_text": (*RIGHT, ""),
    "llama4_text": ("right", "right, short", "exceeds the model's context of 16 here"),
    "llama4_text, scaled from the 8th token on": ("right", "refused", "its states come out different"),
    "ministral3, scaled from the 24th position on": (*RIGHT, ""),
    "phi3, LongRoPE": ("right, short", "right, short", "got max_length 60, expected at most 24"),
    "llama, dynamic NTK": ("right, short", "right, short", "got max_length 60, expected at most 23"),
    "qwen2, windows in some layers": (*RIGHT, ""),
    "deepseek_v4": ("right", "refused", "makes a mask of its own for layer 3"),
    "gpt_neo": ("right", "refused", "does not attend through"),  # windows of its own, which no shared row may lose
    "cpmant": ("refused", "refused", "lets tokens see what follows them"),
    "dory": ("refused", "refused", "its output layer has more than a weight and a bias: logit_scale"),
    "opt": (*RIGHT, ""),  # calls only a part of its trunk
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_right_or_refused_by_name(kind: str) -> None:
    row = families.tried(kind)
    training, generation, why = FAMILIES[kind]
    assert (row.training, row.generation) == (training, generation), row.why
    assert why in row.why and (not why or f"model: {row.name}" in row.why or "prompts: " in row.why)


def test_what_is_wrong_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the sweep would find nothing: a rotation that is off by a position, in training and in generation."""
    model = families.tiny_model(families.tiny_config("llama"))
    plain = families.plain

    def off(model: Any, example: Any) -> torch.Tensor:
        return plain(model, example) + 1e-2

    monkeypatch.setattr(families, "plain", off)
    training, generation, _, why = families.judged(model)
    assert (training, generation) == ("WRONG", "WRONG") and "off by 1.0e-02" in why


def test_the_page_names_no_wrong_class_and_what_it_was_made_with() -> None:
    text = families.PAGE.read_text(encoding="utf-8")
    made = re.search(r"with transformers (\S+) and torch (\S+)\. Do not edit", text)
    assert made, "the page names its versions"
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    rows = rows[1:]  # below the heading
    results = {"right", "right, short", "refused", "not made", "-"}
    assert all(len(row) == 6 and {row[2], row[3]} <= results for row in rows), "no class is wrong"
    assert all(row[5] for row in rows if {"refused", "not made"} & {row[2], row[3]}), "and it says why"
    listed = {row[0] for row in rows}
    assert set(families.VARIANTS) <= listed
    if made[1] == transformers.__version__:
        assert listed == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *families.VARIANTS}


def test_neighbours_change_not_a_bit_where_the_page_says_so() -> None:
    listed = re.findall(r"^\| (.+?) \| .+? \| .+? \| right(?:, short)? \| (yes|no) \|", families.PAGE.read_text(), re.M)
    said = dict(listed)
    assert {said[kind] for kind in ("llama", "qwen2", "mistral", "gemma2", "phi3", "olmo2")} == {"yes"}
    for kind in ("glm", "mixtral", "gemma3n_text"):
        assert families.tried(kind).same_bits == said[kind], kind


def test_a_model_that_counts_the_tokens_of_a_step_takes_no_larger_ones() -> None:
    """Llama 4 scales queries by their place in the row that it is given, which is a step of many sequences."""
    model = families.tiny_model(families.tiny_config("llama4_text", floor_scale=100))
    said = r"max_batch_tokens: 2048, but Llama4ForCausalLM counts the tokens of a step by itself; expected at most 99"
    with pytest.raises(ValueError, match=said):
        Generator(model)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    rollouts = Generator(model, max_batch_tokens=99).generate([[5, 6, 7], [8]], params)
    want = torch.cat([families.plain(model, example) for example in rollouts.examples()])
    torch.testing.assert_close(rollouts.logprobs[rollouts.response_mask], want, rtol=0, atol=1e-4)
    assert models.longest_packed(model) == 0, "nor is a row packed, in which places are not positions"
