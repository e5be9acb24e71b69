from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from rlhf_fast.rollout.sampling import SamplingParams, Uniforms, uniforms


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n: 0 "),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_p": 0.0}, r"top_p: 0\.0"),
        ({"top_p": 1.5}, r"top_p: 1\.5"),
        ({"top_p": math.nan}, "top_p: nan"),
        ({"top_k": -1}, "top_k: -1"),
        ({"seed": -1}, "seed: -1"),
        ({"min_p": 1.0}, r"min_p: 1\.0"),
        ({"min_p": -0.1}, r"min_p: -0\.1"),
        ({"min_new_tokens": 200}, "min_new_tokens: 200; expected 0 to max_new_tokens = 128"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: 0\.0"),
        ({"presence_penalty": math.nan}, "presence_penalty: nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty: inf"),
        ({"logit_bias": {5: math.nan}}, "logit_bias: expected finite numbers"),
        ({"stop": ("",)}, "stop: an empty text"),
        ({"bad_words": ((),)}, "bad_words: an empty text"),
        ({"temperature": 0.0, "n": 2}, r"n: 2 responses at temperature 0\.0 would all be the same"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


def test_one_text_in_place_of_a_tuple_of_texts_is_one() -> None:
    for name in ("stop", "bad_words"):
        assert SamplingParams(**{name: "end"}) == SamplingParams(**{name: ("end",)})


def test_random_numbers_can_be_had_without_those_before_them() -> None:
    numbers = uniforms(1, 2, 3, 300)
    np.testing.assert_array_equal(numbers[64:128], uniforms(1, 2, 3, 64, start=64))
    stream = Uniforms(1, 2, 3)
    assert [stream[i] for i in (299, 0, 63, 64, 128)] == [numbers[i] for i in (299, 0, 63, 64, 128)]


def test_random_numbers_depend_on_seed_prompt_sample_and_position_only() -> None:
    numbers = uniforms(1, 2, 3, 50)
    assert numbers.dtype == np.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    np.testing.assert_array_equal(numbers, uniforms(1, 2, 3, 50))
    np.testing.assert_array_equal(numbers[:20], uniforms(1, 2, 3, 20))
    others = [uniforms(*key, 50) for key in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1), (2, 1, 3), (0, 0, 0))]
    rows = np.stack([numbers, *others])
    assert len(np.unique(rows)) == rows.size


def test_no_two_responses_share_random_numbers_whatever_the_size_of_their_seeds() -> None:
    """Among them those by which PPO answers prompts that stand in for others: a step's, and rounds from bit 32 on."""
    seeds = [low + (high << 32) for low in range(4) for high in (0, 1, 2, 3, 1 << 32, 1 << 64)]
    first = [uniforms(seed, prompt, sample, 1)[0] for seed in seeds for prompt in range(4) for sample in range(4)]
    assert len(set(first)) == len(first)


def test_random_numbers_are_uniform_over_responses_too() -> None:
    first = np.array([uniforms(0, prompt, sample, 1)[0] for prompt in range(60) for sample in range(50)])
    assert chisquare(np.histogram(first, bins=20, range=(0, 1))[0]).pvalue > 1e-4
