"""Generator: responses to prompts, from the weights that a trainer holds."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_fast.config.settings import Settings
from rlhf_fast.data.templates import added_tokens
from rlhf_fast.data.tokenize import decode_response
from rlhf_fast.models.adapters import Model
from rlhf_fast.rollout.engine import Engine, Statistics
from rlhf_fast.rollout.memory import Budget
from rlhf_fast.rollout.model.runner import ModelRunner
from rlhf_fast.rollout.requests import Params, Prompts, sequences_for
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.scheduler import Scheduler
from rlhf_fast.rollout.sequence import Sequence
from rlhf_fast.rollout.shown import Shown

Progress = Callable[[int, int], None]
# What trainers sample with.
MAX_BATCH_TOKENS, MAX_SEQUENCES, BLOCK_SIZE = 2048, 256, 32


@dataclass(frozen=True)
class Until(Settings):
    """Limit at which to stop before all is finished, whichever comes first; what is not finished can be resumed."""

    tokens: int | None = None  # sampled, over all sequences
    seconds: float | None = None
    share: float | None = None  # of the sequences that are finished, from 0 to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is None and self.seconds is None and self.share is None:
            raise ValueError("until: nothing is given; expected tokens, seconds or share")
        if self.share is not None and not 0.0 < self.share <= 1.0:
            raise ValueError(f"until.share: {self.share}; expected more than 0.0 and at most 1.0")


@dataclass(frozen=True)
class Piece:
    """Piece of a stream: one token of one response."""

    prompt_index: int
    sample: int
    token: int
    text: str  # the response so far, without special tokens: what is certain of it, which the next piece begins with
    logprob: float
    finish_reason: str  # empty while it goes on


class Generator:
    """Samples responses from a model by continuous batching over paged keys and values.

    The model's weights are shared, not copied, and the model is left as it was found; between generations it may be
    trained or have adapters switched, and what was kept of it is then forgotten. It must not be used elsewhere while it
    generates.

    Args:
        model: a causal language model of transformers, or one wrapped by peft (its adapter is used).
        tokenizer: may be None when prompts are token ids and `stop_token_ids` says where responses end.
        max_batch_tokens: tokens computed in a step, prompts' and responses' together.
        max_sequences: sequences in a step at most.
        block_size: positions in a block of keys and values: a multiple of 16, at most 128.
        kv_bytes: memory for keys and values; by default as much as the requests need, up to half of what is free.
        share_prefixes: compute a prompt, or the beginning that prompts have in common, once.
        fast: compute the model's layers in faster ways where they come to the same: with this project's kernels
            (float32 on a CPU), else with few launches.
        value_head: from states (S, H) in float32 to values (S, 1); the rollouts then have each token's value.
        cuda_graphs: record the layers' kernels for steps of one token a sequence, and launch them all at once. A
            model that cannot be recorded goes on without, with a warning.

    Raises:
        ValueError: the model cannot be served; says why.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        block_size: int = BLOCK_SIZE,
        kv_bytes: int | None = None,
        share_prefixes: bool = True,
        fast: bool = True,
        value_head: nn.Module | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_sequences", max_sequences)):
            if value < 1:
                raise ValueError(f"{name}: {value}; expected at least 1")
        if block_size % 16 or not 16 <= block_size <= 128:
            raise ValueError(f"block_size: {block_size}; expected a multiple of 16 up to 128")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.share_prefixes = share_prefixes
        self.runner = ModelRunner(model, fast, value_head, cuda_graphs)
        if max_batch_tokens > self.runner.served.longest_step:
            raise ValueError(
                f"max_batch_tokens: {max_batch_tokens}, but {type(self.runner.inner).__name__} counts the tokens of a "
                f"step by itself; expected at most {self.runner.served.longest_step}"
            )
        if cuda_graphs and self.runner.device.type != "cuda":
            raise ValueError(f"cuda_graphs: the model is on {self.runner.device}; expected a CUDA device, or False")
        self.statistics = Statistics()
        self.weight_version = 0
        self._budget = Budget(self.runner, block_size, kv_bytes)
        self._weights: object = None
        self._engine: Engine | None = None

    # Asking -----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        params: Params = None,
        progress: Progress | None = None,
        until: Until | None = None,
        on_finish: Callable[[Sequence], None] | None = None,
    ) -> Rollouts:
        """Sample `params.n` responses for each prompt (text, message lists or token ids).

        Args:
            params: for all prompts, or one for each; `SamplingParams`, or a dict of what they are.
            progress: `progress(done, total)` is called as sequences end.
            until: stop early; `resume` goes on.
            on_finish: called with each sequence as it ends.

        Raises:
            ValueError: an empty prompt, one that leaves no room for an answer in the model's context or in `kv_bytes`,
                or token ids outside the model's vocabulary.
            TypeError: `prompts` is one prompt instead of a list of them.
        """
        sequences = sequences_for(self.model, self.tokenizer, prompts, params, self.runner.served.longest)
        return self._finish(sequences, progress, until, on_finish)

    def resume(
        self,
        rollouts: Rollouts,
        progress: Progress | None = None,
        until: Until | None = None,
        on_finish: Callable[[Sequence], None] | None = None,
    ) -> Rollouts:
        """Go on with the unfinished sequences of `rollouts`; returns all of them, the finished ones as they were."""
        return self._finish(list(rollouts.sequences), progress, until, on_finish)

    def stream(self, prompts: Prompts, params: Params = None) -> Iterator[Piece]:
        """Yield each token as it comes. Closing the iterator early ends the generation.

        The text of a piece is never taken back: what is no whole character yet, or may become a stop text, comes later.
        """
        sequences = sequences_for(self.model, self.tokenizer, prompts, params, self.runner.served.longest)
        shown = {id(sequence): Shown(self.tokenizer, sequence) for sequence in sequences} if self.tokenizer else {}
        with self._engine_for(sequences) as engine:
            for step in engine.steps():
                for sequence in step:
                    if sequence.response:
                        text = shown[id(sequence)].grown() if shown else ""
                        last = sequence.response[-1], text, sequence.logprobs[-1]
                        yield Piece(sequence.prompt_index, sequence.sample, *last, sequence.finish_reason)

    def abort(self, prompt_index: int, sample: int | None = None) -> None:
        """End the running responses to a prompt, or one of them; for use from callbacks and between streamed tokens."""
        engine = self._engine
        if engine is None:
            return
        for sequence in [s for s in self._sequences if s.prompt_index == prompt_index]:
            if sample is None or sequence.sample == sample:
                engine.scheduler.finish(sequence, "abort")

    def text(self, sequence: Sequence) -> str:
        """Decode the response so far, up to a stop text."""
        return decode_response(self.tokenizer, sequence.response)[: sequence.text_end] if self.tokenizer else ""

    # Memory -----------------------------------------------------------------------------------------------------------

    def release_memory(self) -> None:
        """Give the memory of keys and values back, for training; the next generation takes it again."""
        self._budget.release()

    def restore_memory(self) -> None:
        """Take the memory that was released again, now rather than at the next generation."""
        self._budget.restore()

    # Doing ------------------------------------------------------------------------------------------------------------

    def _finish(
        self,
        sequences: list[Sequence],
        progress: Progress | None,
        until: Until | None,
        on_finish: Callable[[Sequence], None] | None,
    ) -> Rollouts:
        total, done, started = len(sequences), 0, time.monotonic()
        with self._engine_for(sequences) as engine:
            for step in engine.steps():
                for sequence in step:
                    if sequence.is_finished and on_finish:
                        on_finish(sequence)
                finished = sum(s.is_finished for s in sequences)
                if progress and finished > done:
                    progress(finished, total)
                done = finished
                if until and _reached(until, engine.statistics, finished / total, time.monotonic() - started):
                    break
        return Rollouts.of(sequences, [self.text(s) for s in sequences], self.runner.device)

    @contextlib.contextmanager
    def _engine_for(self, sequences: list[Sequence]) -> Iterator[Engine]:
        """An engine with these sequences in it; at the end, however it comes, no block is in use."""
        if self._engine is not None:
            raise RuntimeError("this generator is in use: finish or close the stream first")
        going = [s for s in sequences if not s.is_finished]
        pool = self._budget.pool_for(going, self.max_sequences)
        weights = self.runner.weight_version()
        if weights != self._weights:
            pool.forget_prefixes()
            self._weights, self.weight_version = weights, self.weight_version + 1
        scheduler = Scheduler(pool, self.max_batch_tokens, self.max_sequences, self.share_prefixes)
        engine = self._engine = Engine(self.runner, scheduler, self._stop_text)
        engine.weight_version = self.weight_version
        self.statistics, self._sequences = engine.statistics, going
        for sequence in going:
            sequence.waiting_siblings = []
            scheduler.add(sequence)
        try:
            with self.runner.ready():
                yield engine
        except BaseException:
            pool.forget_prefixes()  # blocks were promised that may not have been computed
            raise
        finally:
            self._engine = None
            for sequence in going:
                pool.release(sequence)
            _warn_of_errors(going)

    def _stop_text(self, sequence: Sequence) -> int | None:
        """Find where the first stop text of a response begins, if it has one that does not end too early."""
        assert self.tokenizer is not None
        least = sequence.params.min_new_tokens
        if len(sequence.response) <= least:
            return None
        # Looked for in the last tokens first: one that ends here has at most four to a character, as bytes have, and
        # special tokens, which no text has.
        window = 4 * max(map(len, sequence.stop_texts)) + 4
        special = added_tokens(self.tokenizer).special_ids
        last = [*itertools.islice((i for i in reversed(sequence.response) if i not in special), window)]
        end = decode_response(self.tokenizer, last[::-1])
        if not any(stop in end for stop in sequence.stop_texts):
            return None
        text = decode_response(self.tokenizer, sequence.response)
        first = decode_response(self.tokenizer, sequence.response[:least])
        early = len(first)
        while not text.startswith(first[:early]):  # its last character may be half of one
            early -= 1
        places = (text.find(stop, max(early - len(stop) + 1, 0)) for stop in sequence.stop_texts)
        return min((at for at in places if at >= 0), default=None)


def _reached(until: Until, statistics: Statistics, share: float, seconds: float) -> bool:
    return (
        (until.tokens is not None and statistics.sampled_tokens >= until.tokens)
        or (until.seconds is not None and seconds >= until.seconds)
        or (until.share is not None and share >= until.share)
    )


def _warn_of_errors(sequences: list[Sequence]) -> None:
    failed = [s for s in sequences if s.finish_reason == "error"]
    if failed:
        first = failed[0]
        warnings.warn(
            f"{len(failed)} of {len(sequences)} responses ended in logits that are not finite, the first to prompt "
            f"{first.prompt_index} (sample {first.sample}) at token {len(first.response)} of the response; "
            "their finish reason is 'error'",
            RuntimeWarning,
            stacklevel=4,
        )
