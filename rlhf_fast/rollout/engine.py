"""schedule -> run -> sample -> postprocess: one step of generation, over and over."""

from __future__ import annotations

import math
import time
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rlhf_fast import ops
from rlhf_fast.ops.sample import Samples
from rlhf_fast.rollout.model.runner import ModelRunner
from rlhf_fast.rollout.processors import process
from rlhf_fast.rollout.scheduler import Scheduler, Work
from rlhf_fast.rollout.sequence import Sequence


@dataclass
class Statistics:
    """Counts of what has been done since these were made."""

    steps: int = 0
    computed_tokens: int = 0  # that went through the model
    sampled_tokens: int = 0
    seconds: float = 0.0  # inside steps
    sequences: int = 0  # that ran, summed over steps
    kv_reads: int = 0  # positions that attention read, summed over sequences and steps
    bytes_read: int = 0  # of all weights in each step, and of the keys and values of those positions
    operations: int = 0  # of the products with weights: 2 for each weight and token
    reused_tokens: int = 0  # whose keys and values were there already
    preemptions: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.sampled_tokens / max(self.seconds, 1e-9)

    @property
    def occupancy(self) -> float:
        """Sequences in a step, on average."""
        return self.sequences / max(self.steps, 1)

    def roofline(self, bytes_per_second: float, operations_per_second: float) -> float:
        """The time that a machine of these rates needs for the bytes or the products, whichever is longer, as a share
        of the time that it took."""
        least = max(self.bytes_read / bytes_per_second, self.operations / operations_per_second)
        return least / max(self.seconds, 1e-9)


class Engine:
    """Steps of a model over all the sequences that were added."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, stop_text: Callable[[Sequence], int | None]) -> None:
        self.runner, self.scheduler, self._stop_text = runner, scheduler, stop_text
        self.statistics = Statistics()
        self.weight_version = 0

    @torch.no_grad()  # here and not around all steps: between streamed tokens the caller's own mode holds
    def step(self) -> list[Sequence]:
        """Compute one step; returns the sequences that got a token, or failed."""
        started = time.monotonic()
        work = self.scheduler.schedule()
        logits, values = self.runner.run(work)  # (S, V), (S,)
        self._count(work)
        asking = self._postprocess(work)
        if asking:
            rows = torch.tensor([row for row, _ in asking], device=logits.device)
            if len(rows) != len(logits):  # siblings share a row
                logits, values = logits[rows], None if values is None else values[rows]
            self._sample(logits, values, [sequence for _, sequence in asking])
        self.statistics.seconds += time.monotonic() - started
        return [sequence for _, sequence in asking]

    def steps(self) -> Iterator[list[Sequence]]:
        """Step until nothing waits or runs."""
        while not self.scheduler.is_empty():
            yield self.step()

    def _postprocess(self, work: list[Work]) -> list[tuple[int, Sequence]]:
        """Note what was computed; returns who samples, each with its row of logits: siblings share their prompt's."""
        asking: list[tuple[int, Sequence]] = []
        moves: list[tuple[int, int]] = []
        row = 0
        for each in work:
            each.sequence.computed += each.count
            if each.samples:
                asking.append((row, each.sequence))
                if not each.sequence.response:  # the prompt is computed
                    for sibling, move in self.scheduler.fork(each.sequence):
                        asking.append((row, sibling))
                        moves += [] if move is None else [move]
                row += 1
        self.runner.copy(moves)
        return asking

    def _sample(self, logits: torch.Tensor, values: torch.Tensor | None, sequences: abc.Sequence[Sequence]) -> None:
        """Draw a token for each sequence and give it to it."""
        changed = [row for row, sequence in enumerate(sequences) if sequence.params.changes_logits]
        raw = logits[changed] if changed else logits
        if changed:
            logits = logits.clone()  # siblings may share a row's memory, and the raw ones are needed
            for row in changed:
                process(logits[row], sequences[row])
        samples = self._draw(logits, sequences)
        logprobs = samples.logprobs
        if changed:  # as training computes them: nothing penalised
            whose = torch.tensor(changed, device=logits.device)
            ours, _ = ops.token_logprobs(
                raw, samples.tokens[whose].clamp(min=0), temperature=self._temperatures(sequences, changed)
            )
            logprobs = logprobs.index_copy(0, whose, ours.float())
        sampled = samples.logprobs - samples.kept.log()
        results = (samples.tokens, logprobs, sampled, samples.entropy, *(() if values is None else (values,)))
        for sequence, *drawn in zip(sequences, *(result.tolist() for result in results), strict=True):  # one wait
            self._take(sequence, *drawn)

    def _draw(self, logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> Samples:
        params, device = [s.params for s in sequences], logits.device
        alike = all(each is params[0] for each in params)

        def setting(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            if alike:  # nothing to send
                return torch.full((len(params),), getattr(params[0], name), dtype=dtype, device=device)
            return torch.tensor([getattr(each, name) for each in params], dtype=dtype, device=device)

        uniforms = [s.uniforms[len(s.response)] for s in sequences]
        return ops.sample(
            logits,
            torch.tensor(uniforms, dtype=torch.float64, device=device),
            setting("temperature"),
            setting("top_k", torch.int32),
            setting("top_p"),
            setting("min_p"),
        )

    def _temperatures(self, sequences: abc.Sequence[Sequence], rows: list[int]) -> torch.Tensor:
        temperatures = [sequences[row].params.temperature or 1.0 for row in rows]
        return torch.tensor(temperatures, device=self.runner.device)

    def _take(
        self, sequence: Sequence, token: int, logprob: float, sampled: float, entropy: float, value: float | None = None
    ) -> None:
        if token < 0 or math.isnan(logprob):
            self.scheduler.finish(sequence, "error")
            return
        sequence.response.append(token)
        sequence.logprobs.append(logprob)
        sequence.sampled_logprobs.append(sampled)
        sequence.entropies.append(entropy)
        if value is not None:
            sequence.values.append(value)
        sequence.weight_versions.append(self.weight_version)
        self.statistics.sampled_tokens += 1
        if sequence.stop_texts:
            sequence.text_end = self._stop_text(sequence)
        if sequence.text_end is not None or token in sequence.stop_token_ids:
            self.scheduler.finish(sequence, "stop")
        elif len(sequence.response) >= sequence.params.max_new_tokens:
            self.scheduler.finish(sequence, "length")

    def _count(self, work: list[Work]) -> None:
        statistics = self.statistics
        statistics.steps += 1
        statistics.sequences += len(work)
        tokens, reads = sum(w.count for w in work), sum(w.sequence.computed + w.count for w in work)
        statistics.computed_tokens += tokens
        statistics.kv_reads += reads
        runner = self.runner
        statistics.bytes_read += runner.weight_bytes + reads * runner.served.bytes_per_token
        rows = sum(w.samples for w in work)
        statistics.operations += 2 * (runner.trunk_weights * tokens + runner.head_weights * rows)
        statistics.reused_tokens, statistics.preemptions = self.scheduler.reused, self.scheduler.preemptions
