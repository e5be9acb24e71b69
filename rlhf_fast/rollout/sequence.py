"""State of one response being sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_fast.rollout.sampling import SamplingParams, Uniforms


@dataclass(eq=False)
class Sequence:
    """A prompt, the response so far, and where its keys and values are."""

    prompt_index: int
    sample: int  # which of the n responses to the prompt
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    uniforms: Uniforms
    bad_words: tuple[tuple[int, ...], ...] = ()

    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # of a generator with a value head
    stop_texts: tuple[str, ...] = ()
    finish_reason: str = ""
    text_end: int | None = None  # where a stop text cuts the text
    weight_versions: list[int] = field(default_factory=list)  # of the weights that sampled each token

    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # leading tokens whose keys and values are in the blocks
    registered: int = 0  # leading blocks that the prefix cache knows
    content: int = 0  # what the prefix cache calls the registered blocks
    family: object = None  # sequences of one family were asked the same prompt
    waiting_siblings: list[Sequence] = field(default_factory=list)  # they share the prompt once it is computed

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Return the tokens from `begin` to `end` of prompt and response."""
        size = len(self.prompt)
        if begin >= size:
            return self.response[begin - size : end - size]
        return [*self.prompt[begin:end], *self.response[: max(end - size, 0)]]

    @property
    def is_finished(self) -> bool:
        return self.finish_reason != ""
