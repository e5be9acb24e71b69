"""What was computed before is used again where it is true, and nowhere else: whatever a generator has done, a request
gets from it what a fresh one that shares nothing gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.config import LoRAConfig
from rlhf_fast.rollout.blocks import BlockPool
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.scheduler import Scheduler
from rlhf_fast.rollout.sequence import Sequence
from tests.unit.rollout.test_engine import new, pool_of

SIZE = 16  # of a block
X, Y, Z = (list(range(begin, begin + SIZE)) for begin in (20, 120, 220))
PARAMS = SamplingParams(max_new_tokens=4, ignore_eos=True, seed=5)


@pytest.fixture
def lively(tiny: tuple[Any, Any], nudge: Callable[..., None]) -> tuple[Any, Any]:
    """Weights so large that a response depends on all of its prompt."""
    model, tokenizer = tiny
    nudge(model.requires_grad_(True), scale=0.2)
    return model, tokenizer


def fresh(model: Any, prompts: list[list[int]], params: SamplingParams = PARAMS) -> Rollouts:
    """From a generator that has computed nothing and shares nothing."""
    return Generator(model, block_size=SIZE, share_prefixes=False).generate(prompts, params)


def assert_same(got: Rollouts, want: Rollouts) -> None:
    assert [s.response for s in got.sequences] == [s.response for s in want.sequences]
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)


ORDERS = [
    *itertools.permutations((X, Y, Z)),
    *itertools.product((X, Y), repeat=3),
]  # the same blocks behind each other in every order, and one of them several times


@pytest.mark.parametrize("together", [True, False], ids=["in one request", "one after another"])
def test_what_stands_before_a_block_counts(lively: tuple[Any, Any], together: bool) -> None:
    prompts = [[*a, *b, *c, 7] for a, b, c in ORDERS]
    requests = [prompts] if together else [[prompt] for prompt in prompts]
    want = [fresh(lively[0], request) for request in requests]
    logprobs = torch.cat([one.logprobs[one.response_mask] for one in want])
    assert len(logprobs.unique()) > 3 * len(set(map(tuple, prompts))), "else any cache would do"
    generator = Generator(*lively, block_size=SIZE)
    for _ in range(2):  # the second time all is there
        for request, alone in zip(requests, want, strict=True):
            assert_same(generator.generate(request, PARAMS), alone)
    assert generator.statistics.reused_tokens >= 2 * SIZE


@pytest.mark.parametrize("length", [SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 3])
def test_samples_of_a_prompt_are_each_what_they_are_alone_and_so_is_what_follows_them(
    lively: tuple[Any, Any], length: int
) -> None:
    """Prompts that fill their last block, and that do not; asked twice; then each block of what was said as a prompt of
    its own, and all of it."""
    prompt = [*X, *Y, *Z][:length]
    generator = Generator(*lively, block_size=SIZE)
    generator.generate([[9, token] for token in range(100)], PARAMS)  # so many blocks that none is given away
    said: list[list[int]] = []
    for seed in (3, 4):
        params = SamplingParams(n=3, max_new_tokens=2 * SIZE + 2, ignore_eos=True, seed=seed)
        found = generator.generate([prompt], params)
        assert_same(found, fresh(lively[0], [prompt], params))
        assert generator.statistics.reused_tokens >= 2 * length
        said += [prompt + s.response for s in found.sequences]
    assert len(set(map(tuple, said))) == 6
    blocks = [[*whole[begin : begin + SIZE], 7] for whole in said for begin in range(0, len(whole) - SIZE, SIZE)]
    assert_same(generator.generate([*said, *blocks], PARAMS), fresh(lively[0], [*said, *blocks]))


def test_reused_tokens_are_those_of_this_request(lively: tuple[Any, Any]) -> None:
    generator = Generator(*lively, block_size=SIZE)
    for reused in (0, 2 * SIZE, 2 * SIZE):
        generator.generate([[*X, *Y, 7]], PARAMS)
        assert generator.statistics.reused_tokens == reused


def test_what_ran_out_of_blocks_goes_on_as_if_it_had_not(lively: tuple[Any, Any]) -> None:
    """Sequences are put off, their blocks given away, and what is left of those found again."""
    prompts = [[*X, *Y, 7], [*Y, *X, 7], [*X, *Z, 8], [9, 8, 7]]
    params = SamplingParams(n=2, max_new_tokens=40, ignore_eos=True, seed=3)
    per_block = SIZE * Generator(*lively).runner.served.bytes_per_token
    generator = Generator(*lively, block_size=SIZE, kv_bytes=9 * per_block)
    want = fresh(lively[0], prompts, params)
    for _ in range(2):
        assert_same(generator.generate(prompts, params), want)
        assert generator.statistics.preemptions > 0 and generator.statistics.reused_tokens > 0


# --- what is true no more ---------------------------------------------------------------------------------------------

LONG = [[*X, *Y, 7], [*X, *Z, 7], [*Z, 7]]


def in_the_first_layer(generator: Generator, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generator.runner.inner.model.layers[0], "forward", broken)


def in_the_last_layer(generator: Generator, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generator.runner.inner.model.layers[-1], "forward", broken)


def before_the_model(generator: Generator, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generator.runner, "_forward", broken)


def stopped_by_hand(generator: Generator, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generator.runner.inner.model.layers[0], "forward", interrupted)


def broken(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("broken")


def interrupted(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [in_the_first_layer, in_the_last_layer, before_the_model, stopped_by_hand])
@pytest.mark.parametrize("chunk", [8, 2048], ids=["of a chunk", "of all"])
def test_a_failure_in_the_first_step_leaves_nothing_behind(
    lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None], chunk: int
) -> None:
    want = fresh(lively[0], LONG)
    generator = Generator(*lively, block_size=SIZE, max_batch_tokens=chunk)
    for _ in range(2):  # the blocks hold nothing, then what is true
        with monkeypatch.context() as patch:
            fail(generator, patch)
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                generator.generate([[*Y, *X, 7], *LONG], PARAMS)
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                next(generator.stream(LONG, PARAMS))
        assert pool_of(generator).free == pool_of(generator).count
        assert_same(generator.generate(LONG, PARAMS), want)


def trained(policy: Any) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.2)


def base_changed(policy: Any) -> None:
    policy.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight.data.neg_()


def switched_off(policy: Any) -> None:
    policy.base_model.disable_adapter_layers()


def another(policy: Any) -> None:
    policy.set_adapter("other")


def scaled(policy: Any) -> None:
    policy.get_base_model().model.layers[0].self_attn.k_proj.scaling["default"] *= -3.0


def two_at_once(policy: Any) -> None:
    policy.base_model.set_adapter(["default", "other"])


def rank_scaled(policy: Any) -> None:
    for module in policy.modules():
        if hasattr(module, "set_scale") and hasattr(module, "lora_A"):
            module.set_scale("default", 4.0)


def scaled_and_merged(policy: Any) -> None:
    scaled(policy)
    policy.merge_adapter()


def deleted(policy: Any) -> None:
    policy.set_adapter("other")
    policy.delete_adapter("default")


@pytest.mark.parametrize(
    "change",
    [trained, base_changed, switched_off, another, scaled, two_at_once, rank_scaled, scaled_and_merged, deleted],
)
def test_a_changed_policy_answers_as_in_a_fresh_generator(
    tiny_folder: Path, nudge: Callable[..., None], change: Callable[[Any], None]
) -> None:
    base, tokenizer = models.load(tiny_folder)
    nudge(base.requires_grad_(True), scale=0.2)
    policy = models.trainable(base, LoRAConfig(r=4, alpha=8))
    policy.add_adapter("other", policy.peft_config["default"])
    for name, p in policy.named_parameters():
        if "lora_" in name:
            p.data += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    generator = Generator(policy, tokenizer, block_size=SIZE)
    before = generator.generate(LONG, PARAMS)
    change(policy)
    after = generator.generate(LONG, PARAMS)
    assert not torch.allclose(before.logprobs, after.logprobs), "nothing has changed"
    assert_same(after, fresh(policy, LONG))


# --- blocks -----------------------------------------------------------------------------------------------------------


def computed(pool: BlockPool, prompt: list[int]) -> Sequence:
    """A sequence whose prompt is in blocks and known as a prefix."""
    sequence = new(tuple(prompt))
    pool.reuse_prefix(sequence)
    assert pool.grow(sequence, len(prompt))
    pool.register(sequence, len(prompt))
    return sequence


def hits(pool: BlockPool, prompt: list[int]) -> int:
    """How many of a prompt's tokens, with one behind them, need not be computed."""
    sequence = new((*prompt, 999))
    pool.reuse_prefix(sequence)
    found = sequence.computed
    pool.release(sequence)
    return found


def test_a_block_is_known_once_it_is_full_and_behind_what_it_stood_behind() -> None:
    pool = BlockPool(12, 4)
    a, b = [1, 2, 3, 4], [5, 6, 7, 8]
    computed(pool, [*a, *b, 9, 9, 9])
    assert hits(pool, [*a, *b, 9, 9, 9]) == 8, "the third is not full"
    assert hits(pool, [*a, *b, 9, 9, 9, 9]) == 8
    assert hits(pool, [*b, *a]) == hits(pool, b) == 0
    assert hits(pool, [*a, *a]) == 4
    assert hits(pool, [*a, *b[:3], 0]) == 4
    computed(pool, [*b, *a])
    assert hits(pool, [*b, *a, *b]) == 8 and hits(pool, [*a, *b, *a]) == 8


def kept(pool: BlockPool, tokens: list[int]) -> int:
    """Leading blocks of a prompt that are known; none is used by it."""
    content = count = 0
    while (block := pool._blocks.get((content, tuple(tokens[4 * count : 4 * count + 4])))) is not None:
        content, count = pool._contents[block], count + 1
    return count


def test_what_was_used_last_is_kept_longest_and_the_beginning_of_a_prefix_longer_than_its_end() -> None:
    old, young = list(range(12)), list(range(20, 29))  # three blocks, and two and a quarter
    for used_again, left in (
        (False, [(3, 2), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]),
        (True, [(3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]),
    ):
        pool = BlockPool(6, 4)
        for sequence in [computed(pool, prompt) for prompt in (old, young)]:
            pool.release(sequence)
        if used_again:
            assert hits(pool, old) == 12
        found = [(pool.take(), (kept(pool, old), kept(pool, young))) for _ in range(6)]
        assert sorted(block for block, _ in found) == list(range(6))
        assert [one for _, one in found] == left, "first the block that holds no prefix"


def test_a_sequence_that_was_put_off_finds_its_blocks_again() -> None:
    """Those of its response as well; what was given away meanwhile, and all behind it, is computed again."""
    pool = BlockPool(7, 4)
    scheduler = Scheduler(pool, 100, 4)
    first, second = new(tuple(range(8)), max_new_tokens=12), new(tuple(range(50, 58)), max_new_tokens=12)
    for sequence in (first, second):
        scheduler.add(sequence)
    counts = []
    for _ in range(30):
        for work in scheduler.schedule():
            work.sequence.computed += work.count
            counts.append((work.sequence is first, work.count))
            if work.samples:
                work.sequence.response.append(100 + len(work.sequence.response))
        for sequence in (first, second):
            if len(sequence.response) == 12:
                scheduler.finish(sequence, "length")
        if scheduler.is_empty():
            break
    assert scheduler.preemptions == 1 and first.finish_reason == second.finish_reason == "length"
    again = [count for is_first, count in counts[1:] if not is_first and count > 1]
    assert again == [8, 5], "of 13 tokens, the last block was given away"
    assert pool.free == 7 and scheduler.reused == 8, "however often it was tried"
