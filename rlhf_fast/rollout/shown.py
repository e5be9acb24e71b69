"""Show a response while it comes: whole characters, none of which is taken back."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.tokenize import decode_response
from rlhf_fast.rollout.sequence import Sequence

HALF = "\ufffd"  # what a decoder puts in place of a character whose bytes are not all there


class Shown:
    """The text of one sequence, which only grows.

    Each token is decoded behind the few before it, whose text is known, so that a long response costs no more a token
    than a short one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence: Sequence) -> None:
        self.tokenizer, self.sequence = tokenizer, sequence
        self._text = ""  # of the first `_read` tokens
        self._begin = self._read = 0  # the tokens that the next one is decoded behind
        self._certain = 0  # characters that have been shown

    def grown(self) -> str:
        """Return the text so far that can no longer change."""
        sequence = self.sequence
        if sequence.is_finished:
            text = decode_response(self.tokenizer, sequence.response)[: sequence.text_end]
            return text if text.startswith(self._text[: self._certain]) else self._text[: self._certain]
        self._grow(sequence.response)
        self._certain = max(self._certain, len(self._text) - self._may_stop())
        return self._text[: self._certain]

    def _grow(self, ids: list[int]) -> None:
        known = decode_response(self.tokenizer, ids[self._begin : self._read])
        text = decode_response(self.tokenizer, ids[self._begin :])
        if len(text) > len(known) and not text.endswith(HALF):
            self._text += text[len(known) :]
            self._begin, self._read = self._read, len(ids)

    def _may_stop(self) -> int:
        """Count the characters at the end with which a stop text may have begun."""
        most = (min(len(stop) - 1, len(self._text)) for stop in self.sequence.stop_texts)
        sizes = (
            size
            for stop, longest in zip(self.sequence.stop_texts, most, strict=True)
            for size in range(longest, 0, -1)
            if self._text.endswith(stop[:size])
        )
        return max(sizes, default=0)
