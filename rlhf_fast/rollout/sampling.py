"""Sampling of a response: the settings of a request, and its random numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rlhf_fast.config.settings import Settings
from rlhf_fast.ops.options import LEAST_TEMPERATURE


@dataclass(frozen=True)
class SamplingParams(Settings):
    """Settings of sampling. Same seed, same prompt at the same place, same samples: whatever else is in the batch.

    Logits are changed by penalties, `logit_bias`, `bad_words` and `min_new_tokens` first, then divided by the
    temperature, then cut by top_k, by top_p of what that leaves, and by min_p.

    Args:
        n: responses for each prompt.
        temperature: divides the logits; 0.0 takes the likeliest token.
        top_k: keep only the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this share of the probability; 1.0 keeps all.
        min_p: keep only tokens at least this many times as likely as the likeliest; 0.0 keeps all.
        repetition_penalty: logits of tokens in the prompt or the response so far are divided by it where positive and
            multiplied where negative (Keskar et al. 2019, arXiv 1909.05858); 1.0 for none.
        presence_penalty: taken from the logits of tokens in the response so far.
        frequency_penalty: taken from them once for each time they are there.
        logit_bias: token id -> added to its logit.
        bad_words: texts or token-id sequences that must not be completed; a text also within a longer word. One text
            may stand without a tuple, here as in `stop`.
        max_new_tokens: a response that has not ended by then is cut, with finish reason "length".
        min_new_tokens: no end token before that many tokens, and no stop text that ends before.
        stop_token_ids: tokens that end a response, besides those of the model, its tokenizer and its chat template
            (models.end_tokens).
        stop: texts that end a response; the text stops before them, the tokens are kept as they were sampled. The text
            of a special token means that token.
        ignore_eos: only stop_token_ids and stop end a response.
        seed: of the random numbers.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            if isinstance(getattr(self, name), str):  # one text
                object.__setattr__(self, name, (getattr(self, name),))
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n: {self.n} responses were asked for; expected at least 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: {self.min_new_tokens}; expected 0 to max_new_tokens = {self.max_new_tokens}"
            )
        if not 0.0 <= self.temperature < math.inf or 0.0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature: {self.temperature}; expected 0.0 (greedy) or at least {LEAST_TEMPERATURE:.1e}, which is "
                "the smallest positive number of float32"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p}; expected more than 0.0 and at most 1.0")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p: {self.min_p}; expected at least 0.0 and less than 1.0")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}; expected 0 or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}; expected 0 (all tokens) or a positive number")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty: {self.repetition_penalty}; expected a positive number, 1.0 for none")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)}; expected a finite number, 0.0 for none")
        if any(math.isnan(x) or x == math.inf for x in self.logit_bias.values()):
            raise ValueError("logit_bias: expected finite numbers, or -inf to ban a token")
        for name in ("stop", "bad_words"):
            if not all(len(each) for each in getattr(self, name)):
                raise ValueError(f"{name}: an empty text is among them")
        if self.temperature == 0.0 and self.n > 1:
            raise ValueError(f"n: {self.n} responses at temperature 0.0 would all be the same; expected 1")

    @property
    def changes_logits(self) -> bool:
        """Return whether the logits of some step are changed before they are sampled from."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.bad_words
            or self.min_new_tokens
        )


_CHUNK = 64  # numbers made at a time


def uniforms(seed: int, prompt: int, sample: int, count: int, start: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` in [0, 1), one for each position of one response.

    A counter-based stream (Philox; Salmon et al. 2011): every response has a key of its own, so its numbers do not
    depend on the batch that it is sampled in, and any of them can be had without those before it. `start` is a
    multiple of 4, the numbers of one count.
    """
    bits = np.random.Philox(key=_key(seed, prompt, sample))
    return np.random.Generator(bits.advance(start // 4)).random(count)


@functools.lru_cache(maxsize=4096)
def _key(seed: int, prompt: int, sample: int) -> np.ndarray:
    # Numbers are strung together in words of 32 bits, and zeros follow: what a seed has beyond its first word comes
    # last, where no prompt or sample is.
    entropy = (seed % 2**32, prompt, sample, seed // 2**32)
    return np.random.SeedSequence(entropy=entropy).generate_state(2, np.uint64)


class Uniforms:
    """The random numbers of one response, made as they are needed."""

    def __init__(self, seed: int, prompt: int, sample: int) -> None:
        self._whose = (seed, prompt, sample)
        self._made: list[float] = []

    def __getitem__(self, position: int) -> float:
        while position >= len(self._made):
            self._made += uniforms(*self._whose, _CHUNK, len(self._made)).tolist()
        return self._made[position]
