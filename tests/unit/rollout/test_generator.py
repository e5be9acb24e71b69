from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.config import LoRAConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.data.tokenize import tokenize_prompt
from rlhf_fast.rollout.rollouts import Rollouts

Nudge = Callable[..., None]
PROMPTS: list[list[int]] = [[5], list(range(20, 45)), [7, 8, 9, 10, 11], [50, 60], [70, 71, 72, 73]]
MANY_STOPS = tuple(range(4, 30))  # a tenth of a random model's tokens: responses end early, at different times


def responses(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [example.response for example in rollouts.examples()]


@pytest.fixture
def lively(tiny: tuple[Any, Any], nudge: Nudge) -> tuple[Any, Any]:
    """The tiny model with weights large enough that its choices depend on what it reads."""
    model, tokenizer = tiny
    nudge(model.requires_grad_(True), scale=0.1)
    return model, tokenizer


def test_greedy_is_what_transformers_generates_for_prompts_of_mixed_length(family: Any) -> None:
    model, tokenizer = models.load(family)
    rollouts = Generator(model, tokenizer).generate(PROMPTS, SamplingParams(temperature=0.0, max_new_tokens=16))
    for prompt, response in zip(PROMPTS, responses(rollouts), strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert response == tuple(whole[0, len(prompt) :].tolist())
    assert len(set(responses(rollouts))) > 1


def test_logprobs_are_those_of_training(family: Any) -> None:
    model, tokenizer = models.load(family)
    params = SamplingParams(n=2, temperature=0.8, max_new_tokens=12, stop_token_ids=MANY_STOPS, seed=3)
    rollouts = Generator(model, tokenizer).generate(PROMPTS, params)
    with torch.no_grad():
        expected, _ = models.response_logprobs(model, pad(rollouts.examples()), temperature=0.8)
    torch.testing.assert_close(rollouts.logprobs[rollouts.response_mask], expected, rtol=0, atol=1e-4)
    assert (rollouts.logprobs[~rollouts.response_mask] == 0).all()


@pytest.mark.seconds(2)
def test_a_response_is_the_same_alone_and_in_any_batch(lively: tuple[Any, Any]) -> None:
    params = SamplingParams(n=3, max_new_tokens=16, stop_token_ids=MANY_STOPS, seed=11)
    whole = Generator(*lively).generate(PROMPTS, params)
    lengths = [len(response) for response in responses(whole)]
    assert min(lengths) < 8 and max(lengths) == 16, "rows must end at different times, so that batches are compacted"
    settings: list[dict[str, Any]] = [
        {"max_sequences": 1},
        {"max_sequences": 4},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 7},
        {"share_prefixes": False},
        {"kv_bytes": 4 * 32 * 2 * 2 * 2 * 16 * 4},  # four blocks
    ]
    for one in settings:
        again = Generator(*lively, **one).generate(PROMPTS, params)
        assert responses(again) == responses(whole)
        assert (again.texts, again.finish_reasons) == (whole.texts, whole.finish_reasons)
        assert torch.equal(again.logprobs, whole.logprobs), "not a bit"
        assert torch.equal(again.entropy, whole.entropy)
    for one in ({"block_size": 16}, {"fast": False}):  # sums in another order
        again = Generator(*lively, **one).generate(PROMPTS, params)
        assert responses(again) == responses(whole)
        torch.testing.assert_close(again.logprobs, whole.logprobs, rtol=0, atol=1e-5)
    alone = Generator(*lively).generate(PROMPTS[:1], params)
    assert responses(alone) == responses(whole)[:3]
    other_company = Generator(*lively).generate([PROMPTS[0], [99] * 40, [98]], params)
    assert responses(other_company)[:3] == responses(whole)[:3]
    fewer = Generator(*lively).generate(PROMPTS, SamplingParams(**{**vars(params), "n": 2}))
    assert responses(fewer) == [response for i, response in enumerate(responses(whole)) if i % 3 < 2]


def test_the_seed_decides(lively: tuple[Any, Any]) -> None:
    def sample(seed: int) -> list[tuple[int, ...]]:
        return responses(Generator(*lively).generate(PROMPTS, SamplingParams(max_new_tokens=8, seed=seed)))

    torch.manual_seed(1)
    first = sample(0)
    state = torch.random.get_rng_state()
    assert sample(0) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(a != b for a, b in zip(first, sample(1), strict=True))


def test_samples_of_a_prompt_stand_in_a_row_and_differ(lively: tuple[Any, Any]) -> None:
    rollouts = Generator(*lively).generate([[5, 6], [5, 6], [9]], SamplingParams(n=4, max_new_tokens=8))
    assert rollouts.prompt_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [example.prompt for example in rollouts.examples()] == [(5, 6)] * 8 + [(9,)] * 4
    assert len(set(responses(rollouts))) == 12
    assert len(rollouts) == len(rollouts.texts) == len(rollouts.finish_reasons) == 12


def test_packed_rollouts_are_consistent(lively: tuple[Any, Any]) -> None:
    rollouts = Generator(*lively).generate(PROMPTS, SamplingParams(max_new_tokens=6, stop_token_ids=MANY_STOPS))
    size = len(rollouts.input_ids)
    assert rollouts.input_ids.dtype == torch.int64 and rollouts.response_mask.dtype == torch.bool
    assert rollouts.logprobs.dtype == torch.float32 and rollouts.cu_seqlens.dtype == torch.int32
    assert len(rollouts.response_mask) == len(rollouts.logprobs) == int(rollouts.cu_seqlens[-1]) == size
    assert [list(example.prompt) for example in rollouts.examples()] == PROMPTS
    padded, batch = rollouts.to_padded(), pad(rollouts.examples())
    assert torch.equal(padded["input_ids"], batch.input_ids)
    assert torch.equal(padded["response_mask"].flatten().nonzero()[:, 0], batch.predicted_at + 1)
    assert torch.equal(padded["logprobs"].flatten()[batch.predicted_at + 1], rollouts.logprobs[rollouts.response_mask])


def test_values_are_those_of_the_states_that_tokens_were_drawn_from(lively: tuple[Any, Any]) -> None:
    """Also where siblings share their prompt, chunks cut it and a sequence starts over; without a head there are
    none."""
    model, tokenizer = lively
    torch.manual_seed(3)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    params = SamplingParams(n=3, max_new_tokens=40)
    for options in ({}, {"max_batch_tokens": 7, "block_size": 16, "kv_bytes": 1 << 16}):
        generator = Generator(model, tokenizer, value_head=head, **options)
        rollouts = generator.generate(PROMPTS, params)
        assert (generator.statistics.preemptions > 0) == bool(options)
        with torch.no_grad():
            expected = head(models.response_states(model, pad(rollouts.examples()))).squeeze(-1)
        assert rollouts.values is not None and expected.std() > 1e-3
        torch.testing.assert_close(rollouts.values[rollouts.response_mask], expected, rtol=0, atol=1e-5)
    assert Generator(model, tokenizer).generate(PROMPTS, params).values is None


def test_a_response_ends_at_a_stop_token_or_at_the_limit(lively: tuple[Any, Any]) -> None:
    params = SamplingParams(n=8, max_new_tokens=10, stop_token_ids=MANY_STOPS)
    rollouts = Generator(*lively).generate(PROMPTS, params)
    stops = {*MANY_STOPS, lively[1].eos_token_id}
    for response, reason in zip(responses(rollouts), rollouts.finish_reasons, strict=True):
        assert not stops & set(response[:-1])
        assert reason == ("stop" if response[-1] in stops else "length")
        assert reason == "stop" or len(response) == 10
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    one = Generator(*lively).generate(PROMPTS, SamplingParams(max_new_tokens=1))
    assert [len(response) for response in responses(one)] == [1] * len(PROMPTS)


@pytest.mark.parametrize("seed", range(4))
def test_stopping_early_is_sampling_on_and_cutting_behind_the_first_end(lively: tuple[Any, Any], seed: int) -> None:
    """Detail 5 of PPO for language models: the two ways to make responses end are one."""
    ends = {*MANY_STOPS, lively[1].eos_token_id}
    free = SamplingParams(n=2, max_new_tokens=14, seed=seed, ignore_eos=True)
    going_on = Generator(*lively).generate(PROMPTS, free)
    assert [len(response) for response in responses(going_on)] == [14] * 10
    assert set(going_on.finish_reasons) == {"length"}
    stopping = SamplingParams(n=2, max_new_tokens=14, seed=seed, stop_token_ids=MANY_STOPS)
    stopped = Generator(*lively).generate(PROMPTS, stopping)
    cut = [next((r[: i + 1] for i, t in enumerate(r) if t in ends), r) for r in responses(going_on)]
    assert responses(stopped) == cut
    assert {len(response) for response in cut} != {14}
    bounds = zip(going_on.cu_seqlens.tolist(), going_on.examples(), cut, strict=False)
    kept = [going_on.logprobs[s + len(e.prompt) :][: len(c)] for s, e, c in bounds]
    torch.testing.assert_close(stopped.logprobs[stopped.response_mask], torch.cat(kept), rtol=0, atol=1e-5)


def test_an_end_token_at_once_is_a_response_of_one_token_and_no_text(family_config: Callable[..., Any]) -> None:
    model, tokenizer = models.load(family_config("phi"))
    with torch.no_grad():
        model.lm_head.bias[tokenizer.eos_token_id] = 1000.0
    rollouts = Generator(model, tokenizer).generate(["Hello", "there"], SamplingParams(max_new_tokens=5))
    assert responses(rollouts) == [(1,), (1,)]
    assert (rollouts.texts, rollouts.finish_reasons) == (["", ""], ["stop", "stop"])
    assert rollouts.logprobs.abs().max() < 1e-6
    on = Generator(model, tokenizer).generate(["Hello"], SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert (responses(on), on.finish_reasons, on.texts) == ([(1,) * 5], ["length"], [""])


def test_prompts_may_be_text_messages_or_token_ids(lively: tuple[Any, Any]) -> None:
    _, tokenizer = lively
    params = SamplingParams(max_new_tokens=6, seed=2)
    forms = [
        "Hi",
        [{"role": "user", "content": "Hi"}],
        list(tokenize_prompt(tokenizer, "Hi")),
        tokenize_prompt(tokenizer, "Hi"),
    ]
    results = [Generator(*lively).generate([form], params) for form in forms]
    assert len({tuple(responses(result)) for result in results}) == 1
    assert results[0].examples()[0].prompt == tokenize_prompt(tokenizer, "Hi")
    assert results[0].texts == [tokenizer.decode(responses(results[0])[0], skip_special_tokens=True)]
    together = Generator(*lively).generate(forms, params)
    assert len({example.prompt for example in together.examples()}) == 1


def test_token_ids_need_no_tokenizer(lively: tuple[Any, Any]) -> None:
    model, _ = lively
    params = SamplingParams(max_new_tokens=6, stop_token_ids=(1,))
    rollouts = Generator(model).generate(PROMPTS, params)
    assert responses(rollouts) == responses(Generator(*lively).generate(PROMPTS, params))
    assert rollouts.texts == [""] * len(PROMPTS)
    with pytest.raises(ValueError, match="stop_token_ids: without a tokenizer"):
        Generator(model).generate(PROMPTS, SamplingParams(max_new_tokens=6))
    with pytest.raises(ValueError, match="prompt 1 is text, which needs a tokenizer"):
        Generator(model).generate([[5], "text"], params)
    Generator(model).generate(PROMPTS, SamplingParams(max_new_tokens=2, ignore_eos=True))


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("one string", TypeError, "got one string; expected a list"),
        ([], ValueError, "the list is empty"),
        (["fine", ""], ValueError, "prompt 1 is empty"),
        (["fine", " \n"], ValueError, "prompt 1 is empty"),
        ([[5], []], ValueError, "prompt 1 is empty"),
        ([[5] * 2045], ValueError, r"prompt 0 has 2045 tokens, .* max_new_tokens = 4 exceeds .* context of 2048"),
        ([[5], [6, 260]], ValueError, "prompt 1 has token ids outside the vocabulary of 260"),
        ([[-1]], ValueError, "prompt 0 has token ids outside the vocabulary of 260"),
        ([{"role": "user", "content": "Hi"}], TypeError, "prompt 0 is one message; expected a list of messages"),
    ],
)
def test_a_bad_prompt_is_an_error_before_anything_is_computed(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, prompts: Any, error: type[Exception], message: str
) -> None:
    def compute(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was run")

    generator = Generator(*tiny)
    monkeypatch.setattr(tiny[0].model, "forward", compute)
    with pytest.raises(error, match=message):
        generator.generate(prompts, SamplingParams(max_new_tokens=4))


def test_a_response_may_fill_the_context_to_its_end(family_config: Callable[..., Any]) -> None:
    for name in ("llama", "gpt2"):  # GPT-2 has a table of positions, and none beyond it
        generator = Generator(*models.load(family_config(name)))
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        assert len(responses(generator.generate([[5] * 120, [6]], params))[0]) == 8
        with pytest.raises(ValueError, match="context of 128"):
            generator.generate([[5] * 121], params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequences": 0}, "max_sequences: 0; expected at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: 0; expected at least 1"),
        ({"block_size": 20}, "block_size: 20; expected a multiple of 16 up to 128"),
        ({"block_size": 256}, "block_size: 256; expected a multiple of 16 up to 128"),
        ({"kv_bytes": 100}, "kv_bytes: 100; expected at least one block, "),
    ],
)
def test_a_setting_out_of_range_is_named(tiny: tuple[Any, Any], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generator(*tiny, **options)


def test_too_little_memory_for_one_sequence_says_how_much_is_needed(tiny: tuple[Any, Any]) -> None:
    block = 32 * Generator(*tiny).runner.served.bytes_per_token
    generator = Generator(*tiny, kv_bytes=3 * block)
    assert len(generator.generate([[5] * 80], SamplingParams(max_new_tokens=16, ignore_eos=True)).input_ids) == 96
    with pytest.raises(ValueError, match=f"needs {4 * block:,} bytes of keys and values, and there are {3 * block:,}"):
        generator.generate([[5] * 81], SamplingParams(max_new_tokens=16))


def test_progress_counts_to_the_end(tiny: tuple[Any, Any]) -> None:
    seen: list[tuple[int, int]] = []
    params = SamplingParams(n=2, max_new_tokens=2)
    Generator(*tiny, max_sequences=4).generate(PROMPTS, params, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(
    family_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, training: bool, fails: bool
) -> None:
    model, tokenizer = models.load(family_config("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5))
    model.requires_grad_(True).lm_head.weight.requires_grad_(False)
    params = SamplingParams(max_new_tokens=6, temperature=0.0)
    expected = responses(Generator(model, tokenizer).generate(PROMPTS, params))
    model.train(training)
    model.transformer.h[0].eval()

    def state() -> Any:
        return (
            [(module.training, sorted(vars(module))) for module in model.modules()],
            model.config._attn_implementation,
            [parameter.requires_grad for parameter in model.parameters()],
            model.config.to_dict(),
            model.generation_config.to_dict(),
            torch.is_grad_enabled(),
        )

    before, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        monkeypatch.setattr("rlhf_fast.ops.sample", lambda *a: (_ for _ in ()).throw(KeyError()))
        with pytest.raises(KeyError):
            Generator(model, tokenizer).generate(PROMPTS, params)
    else:
        assert responses(Generator(model, tokenizer).generate(PROMPTS, params)) == expected, "dropout was on"
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_policy_samples_with_its_adapter(tiny_folder: Path, nudge: Nudge, tmp_path: Path) -> None:
    base, tokenizer = models.load(tiny_folder)
    params = SamplingParams(temperature=0.0, max_new_tokens=8)
    without = responses(Generator(base, tokenizer).generate(PROMPTS, params))
    policy = models.trainable(base, LoRAConfig(r=4, alpha=8))
    assert responses(Generator(policy, tokenizer).generate(PROMPTS, params)) == without
    nudge(policy, scale=0.2)
    rollouts = Generator(policy, tokenizer).generate(PROMPTS, params)
    assert responses(rollouts) != without
    with torch.no_grad():
        expected, _ = models.response_logprobs(policy, pad(rollouts.examples()))
    torch.testing.assert_close(rollouts.logprobs[rollouts.response_mask], expected, rtol=0, atol=1e-4)
    with policy.disable_adapter():
        assert responses(Generator(policy, tokenizer).generate(PROMPTS, params)) == without
