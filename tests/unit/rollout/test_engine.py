"""Blocks, scheduling and the life of requests: whatever happens, every block comes back and no response changes."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.rollout.blocks import BlockPool
from rlhf_fast.rollout.generator import Until
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import Uniforms
from rlhf_fast.rollout.scheduler import Scheduler
from rlhf_fast.rollout.sequence import Sequence

PROMPTS: list[list[int]] = [[5], list(range(20, 65)), [7, 8, 9, 10, 11], list(range(20, 60)), [70, 71, 72, 73]]
FREE = SamplingParams(max_new_tokens=24, ignore_eos=True, seed=5)


def responses(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(s.response) for s in rollouts.sequences]


def pool_of(generator: Generator) -> BlockPool:
    pool = generator._budget._pool
    assert pool is not None
    return pool


def assert_all_free(generator: Generator) -> None:
    pool = pool_of(generator)
    assert pool.free == pool.count and not any(pool._users)


def new(prompt: tuple[int, ...], **changes: Any) -> Sequence:
    params = SamplingParams(**{"max_new_tokens": 8, **changes})
    return Sequence(0, 0, prompt, params, frozenset(), Uniforms(0, 0, 0))


# --- blocks and schedule ----------------------------------------------------------------------------------------------


class Replay:
    """An engine without a model: what each place of a block was computed from, a token and all that stands before it,
    is written down, and checked when it is read."""

    def __init__(self, blocks: int, block_size: int, budget: int, at_once: int, share: bool) -> None:
        self.pool = BlockPool(blocks, block_size)
        self.scheduler = Scheduler(self.pool, budget, at_once, share)
        self.held = [[0] * block_size for _ in range(blocks)]  # 0: nothing
        self.budget, self.at_once = budget, at_once

    def step(self) -> list[Sequence]:
        work = self.scheduler.schedule()
        assert 0 < sum(w.count for w in work) <= self.budget
        assert len(self.scheduler.running) <= self.at_once
        size = self.pool.block_size
        for w in work:  # all is written before anything is read
            for at in range(w.sequence.computed, w.sequence.computed + w.count):
                self.held[w.sequence.blocks[at // size]][at % size] = hash(tuple(w.sequence.tokens(0, at + 1)))
        asking = []
        for w in work:
            samples = w.samples
            w.sequence.computed += w.count
            seen = [self.held[w.sequence.blocks[at // size]][at % size] for at in range(w.sequence.computed)]
            tokens = w.sequence.tokens(0, w.sequence.computed)
            assert seen == [hash(tuple(tokens[: at + 1])) for at in range(len(tokens))], "of something else"
            if samples:
                asking.append(w.sequence)
                for sibling, move in self.scheduler.fork(w.sequence):
                    if move:
                        self.held[move[1]] = list(self.held[move[0]])
                    asking.append(sibling)
        return asking


SAID = (500, 501, 502, 503)  # over and over, by everybody: the same blocks stand behind different ones


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    blocks=st.integers(3, 12),
    budget=st.integers(1, 40),
    at_once=st.integers(1, 6),
    share=st.booleans(),
)
@pytest.mark.seconds(2)
def test_any_schedule_computes_every_token_and_gives_all_blocks_back(
    data: st.DataObject, blocks: int, budget: int, at_once: int, share: bool
) -> None:
    size = 4
    replay = Replay(blocks, size, budget, at_once, share)
    most = blocks * size - 1
    stems = [tuple(range(100, 100 + n)) for n in (4, 8, 9)]
    prompts = data.draw(
        st.lists(
            st.one_of(
                st.integers(1, most - 1).map(lambda n: tuple(range(n))),
                st.sampled_from(stems).map(lambda s: s[: most - 1]),
                st.tuples(st.sampled_from(stems), st.integers(0, 3)).map(lambda p: (*p[0], p[1])[: most - 1]),
                st.lists(st.sampled_from([stems[0], SAID]), min_size=1, max_size=4).map(
                    lambda p: (*itertools.chain(*p), 1)[: most - 1]
                ),
            ),
            min_size=1,
            max_size=9,
        )
    )
    sequences = [new(prompt, max_new_tokens=max(1, min(6, most - len(prompt)))) for prompt in prompts]
    late = sequences[len(sequences) // 2 :]
    for sequence in sequences[: len(sequences) // 2]:
        replay.scheduler.add(sequence)
    for step in range(2000):
        if late and (replay.scheduler.is_empty() or step % 3 == 0):
            replay.scheduler.add(late.pop(0))
        if replay.scheduler.is_empty():
            break
        if step % 7 == 6:  # somebody gives up
            going = [s for s in sequences if not s.is_finished and s not in late]
            if going and data.draw(st.booleans()):
                replay.scheduler.finish(data.draw(st.sampled_from(going)), "abort")
                continue
        for sequence in replay.step():
            if sequence.is_finished:
                continue
            sequence.response.append(SAID[len(sequence.response) % size])
            if len(sequence.response) == sequence.params.max_new_tokens:
                replay.scheduler.finish(sequence, "length")
    assert all(s.is_finished for s in sequences), "starved"
    assert replay.pool.free == blocks and not any(replay.pool._users)
    for sequence in sequences:
        if sequence.finish_reason == "length":
            assert len(sequence.response) == sequence.params.max_new_tokens


def test_a_prefix_is_found_by_its_tokens_and_never_by_a_stale_number() -> None:
    pool = BlockPool(6, 4)
    first = new(tuple(range(9)))
    assert pool.grow(first, 9)
    pool.register(first, 9)
    same, other = new((*range(8), 99)), new((0, 1, 2, 99, 4, 5, 6, 7, 8))
    pool.reuse_prefix(same)
    pool.reuse_prefix(other)
    assert same.blocks == first.blocks[:2] and same.computed == 8
    assert other.blocks == [] and other.computed == 0
    short = new(tuple(range(8)))
    pool.reuse_prefix(short)
    assert short.computed == 4, "the last token is always computed: its logits are needed"
    for sequence in (first, same, short):
        pool.release(sequence)
    assert pool.free == 6
    again = new(tuple(range(9)))
    pool.reuse_prefix(again)
    assert again.computed == 8, "what nobody uses is kept until the block is needed"
    pool.release(again)
    greedy = new(tuple(range(200, 224)))
    assert pool.grow(greedy, 24)
    late = new(tuple(range(9)))
    pool.reuse_prefix(late)
    assert late.computed == 0
    pool.release(greedy)
    pool.forget_prefixes()
    assert not pool._blocks


# --- the life of a request --------------------------------------------------------------------------------------------


def test_all_blocks_are_free_after_an_exception_and_nothing_wrong_is_kept(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(*tiny)
    want = responses(generator.generate(PROMPTS, FREE))
    generator._weights = None  # forget the prefixes
    calls = iter(range(100))

    def fail(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("broken")
        return original(*arguments)

    original = generator.runner._forward
    monkeypatch.setattr(generator.runner, "_forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        generator.generate(PROMPTS, FREE)
    assert_all_free(generator)
    assert responses(generator.generate(PROMPTS, FREE)) == want


@pytest.mark.seconds(4)
def test_memory_does_not_grow_with_requests(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)

    def objects() -> int:
        gc.collect()
        return sum(isinstance(x, Sequence | torch.Tensor) for x in gc.get_objects())

    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    for i in range(20):
        generator.generate([[5 + i, 6, 7]] * 5, params)
    before, blocks = objects(), pool_of(generator).count
    for i in range(180):
        generator.generate([[5 + i, 6, 7]] * 5, params)
    assert objects() <= before and pool_of(generator).count == blocks
    assert len(pool_of(generator)._blocks) <= blocks
    assert_all_free(generator)


def test_the_keys_and_values_are_within_their_budget(tiny: tuple[Any, Any]) -> None:
    per_token = Generator(*tiny).runner.served.bytes_per_token
    generator = Generator(*tiny, kv_bytes=7 * 32 * per_token + 5)
    generator.generate(PROMPTS, SamplingParams(n=4, max_new_tokens=40, ignore_eos=True))
    used = sum(x.nbytes for cache in generator.runner.caches.values() for x in (cache.keys, cache.values))
    assert used == 7 * 32 * per_token
    generator.release_memory()
    assert not generator.runner.caches
    generator.restore_memory()
    assert sum(x.nbytes for c in generator.runner.caches.values() for x in (c.keys, c.values)) == used


def test_aborting_from_a_callback_ends_that_response_alone(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    want = generator.generate(PROMPTS, FREE)
    short = [SamplingParams(max_new_tokens=3 if i == 2 else 24, ignore_eos=True, seed=5) for i in range(5)]
    found = generator.generate(PROMPTS, short, on_finish=lambda s: generator.abort(1) if s.prompt_index == 2 else None)
    assert found.finish_reasons == ["length", "abort", "length", "length", "length"]
    assert responses(found)[1] == responses(want)[1][:3]
    for i in (0, 3, 4):
        assert responses(found)[i] == responses(want)[i]
    assert_all_free(generator)


def test_a_stream_gives_the_tokens_of_generate_and_may_be_closed(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    params = SamplingParams(n=2, max_new_tokens=10, ignore_eos=True, seed=5)
    want = generator.generate(PROMPTS[:3], params)
    got: dict[tuple[int, int], list[int]] = {}
    for piece in generator.stream(PROMPTS[:3], params):
        assert torch.is_grad_enabled()
        got.setdefault((piece.prompt_index, piece.sample), []).append(piece.token)
        assert piece.finish_reason == ("length" if len(got[piece.prompt_index, piece.sample]) == 10 else "")
    assert [tuple(got[key]) for key in sorted(got)] == responses(want)
    stream = generator.stream(PROMPTS, params)
    next(stream)
    with pytest.raises(RuntimeError, match="this generator is in use"):
        generator.generate(PROMPTS, params)
    stream.close()
    assert_all_free(generator)
    assert responses(generator.generate(PROMPTS[:3], params)) == responses(want)


@pytest.mark.parametrize("until", [Until(tokens=20), Until(share=0.3), Until(seconds=0.0)], ids=str)
def test_partial_rollouts_resume_to_what_they_would_have_been(tiny: tuple[Any, Any], until: Until) -> None:
    params = [SamplingParams(n=2, max_new_tokens=4 + 5 * i, ignore_eos=True, seed=5) for i in range(5)]
    want = Generator(*tiny).generate(PROMPTS, params)
    generator = Generator(*tiny)
    part = generator.generate(PROMPTS, params, until=until)
    assert "unfinished" in part.finish_reasons
    assert_all_free(generator)
    whole = generator.resume(part)
    assert responses(whole) == responses(want) and whole.finish_reasons == want.finish_reasons
    assert torch.equal(whole.logprobs, want.logprobs)
    if until.share:
        done = sum(reason != "unfinished" for reason in part.finish_reasons)
        assert done >= 3


def test_a_partial_rollout_may_be_resumed_by_changed_weights(tiny: tuple[Any, Any], nudge: Callable[..., None]) -> None:
    generator = Generator(*tiny)
    part = generator.generate(PROMPTS, FREE, until=Until(tokens=30))
    nudge(tiny[0].requires_grad_(True), scale=0.2)
    whole = generator.resume(part)
    versions = [s.weight_versions for s in whole.sequences]
    assert {tuple(sorted(set(v))) for v in versions} == {(1, 2)}
    assert all(v == sorted(v) for v in versions)


def test_changed_weights_forget_what_was_computed(tiny: tuple[Any, Any], nudge: Callable[..., None]) -> None:
    generator = Generator(*tiny)
    generator.generate(PROMPTS, FREE)
    generator.generate(PROMPTS, FREE)
    assert generator.statistics.reused_tokens >= 64
    nudge(tiny[0].requires_grad_(True), scale=0.2)
    changed = generator.generate(PROMPTS, FREE)
    assert responses(changed) == responses(Generator(*tiny).generate(PROMPTS, FREE))


def test_settings_may_differ_between_prompts(tiny: tuple[Any, Any]) -> None:
    every = [
        SamplingParams(temperature=0.0, max_new_tokens=3, ignore_eos=True),
        SamplingParams(n=2, top_k=5, max_new_tokens=9, ignore_eos=True, seed=9),
        SamplingParams(min_p=0.2, max_new_tokens=5, ignore_eos=True),
        SamplingParams(repetition_penalty=1.5, max_new_tokens=6, ignore_eos=True),
        SamplingParams(top_p=0.5, max_new_tokens=7, ignore_eos=True),
    ]
    together = Generator(*tiny).generate(PROMPTS, every)
    assert [len(r) for r in responses(together)] == [3, 9, 9, 5, 6, 7]
    with pytest.raises(ValueError, match="params: 2 for 5 prompts; expected one, or one for each"):
        Generator(*tiny).generate(PROMPTS, every[:2])


def test_logits_that_are_not_finite_end_that_response_and_are_told(family_config: Callable[..., Any]) -> None:
    model, tokenizer = models.load(family_config("llama"))  # an output layer of its own: nan stays with that token
    generator = Generator(model, tokenizer)
    want = responses(generator.generate(PROMPTS, FREE))
    with torch.no_grad():
        model.get_input_embeddings().weight[72] = math.nan
    sound = [i for i, r in enumerate(want) if 72 not in (*PROMPTS[i], *r)]
    assert len(sound) >= 3
    with pytest.warns(RuntimeWarning, match=r"responses ended in logits that are not finite, the first to prompt \d"):
        found = generator.generate(PROMPTS, FREE)
    assert found.finish_reasons[4] == "error" and responses(found)[4] == ()
    assert all(responses(found)[i] == want[i] for i in sound)
    with pytest.raises(ValueError, match=r"sequence \d has no response \(finish reason 'error'\)"):
        found.examples()
    assert_all_free(generator)


def test_statistics_count_what_was_done(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    generator.generate([[5, 6, 7]], SamplingParams(n=4, max_new_tokens=5, ignore_eos=True))
    seen = generator.statistics
    assert (seen.steps, seen.sampled_tokens, seen.computed_tokens) == (5, 20, 3 + 4 * 4)
    assert seen.reused_tokens == 3 * 3 and seen.preemptions == 0
    assert seen.occupancy == (1 + 4 * 4) / 5
    assert seen.kv_reads == 3 + 4 * (4 + 5 + 6 + 7)
    assert seen.tokens_per_second > 0


def test_the_share_of_the_roofline_is_that_of_the_bytes_or_of_the_products(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    generator = Generator(model, max_batch_tokens=4)
    generator.generate([[5, 6, 7, 8, 9]], SamplingParams(n=2, max_new_tokens=3, ignore_eos=True))
    statistics, config = generator.statistics, model.config
    # Chunks of 4 and 1, then two steps of two sequences; the siblings share what the prompt's last token gave.
    assert (statistics.steps, statistics.computed_tokens, statistics.kv_reads) == (4, 9, 4 + 5 + 2 * 6 + 2 * 7)
    weights = sum(p.numel() for p in model.parameters())  # the output layer is the embedding
    head = config.vocab_size * config.hidden_size
    kv = 2 * config.num_key_value_heads * 16 * 4 * config.num_hidden_layers
    assert statistics.bytes_read == 4 * 4 * weights + 35 * kv
    assert statistics.operations == 2 * ((weights - head) * 9 + head * 5)
    seconds = statistics.seconds
    assert statistics.roofline(1e9, 1e30) == pytest.approx(statistics.bytes_read / 1e9 / seconds)
    assert statistics.roofline(1e30, 1e9) == pytest.approx(statistics.operations / 1e9 / seconds)
