"""Steps that are recorded and replayed give what computing them gives.

Without a GPU a recorder stands in for CUDA's: it writes every operation down with the very tensors and numbers that it
was called with, and repeats them. As with a CUDA graph, what Python decided while it was recorded is decided for good,
and whoever reads a value from the device fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.config import LoRAConfig, PPOConfig
from rlhf_fast.data.records import PromptRecord
from rlhf_fast.ops import compiled
from rlhf_fast.rewards.model import resolve_reward
from rlhf_fast.rollout.model import graphs, layers
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.trainers.ppo import sampler

PROMPTS: list[list[int]] = [[5], list(range(20, 45)), [7, 8, 9, 10, 11], [50, 60], [70, 71, 72, 73]]
MANY_STOPS = tuple(range(4, 30))
PARAMS = SamplingParams(n=3, max_new_tokens=20, stop_token_ids=MANY_STOPS, seed=11)


class Recorder(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` is on a GPU."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
            raise RuntimeError("operation not permitted when stream is capturing")
        out = function(*args, **(kwargs or {}))
        found = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        fresh = all(x.alias_info is None for x in function._schema.returns)  # no view, and nothing in place
        self.calls.append((function, args, kwargs or {}, found if fresh else []))
        return out

    def replay(self) -> None:
        Recorder.replays += 1
        for function, args, kwargs, out in self.calls:
            new = function(*args, **kwargs)
            for mine, x in zip(out, new if isinstance(new, tuple | list) else [new], strict=bool(out)):
                mine.copy_(x)


class Kernels:
    """The compiled kernels, whose calls are no operations of torch."""

    def __init__(self, kernels: Any, recorder: Recorder) -> None:
        self.kernels, self.recorder = kernels, recorder

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)

        def call(*args: Any) -> Any:
            kernel(*args)
            self.recorder.calls.append((lambda *args: (kernel(*args), ())[1], args, {}, []))

        return call if callable(kernel) else kernel


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Generator], Generator]:
    if compiled.cpu is None:
        pytest.skip("needs the compiled kernels")

    def record(compute: Callable[[], torch.Tensor], others: list[Any]) -> tuple[Any, torch.Tensor]:
        recorder = Recorder()
        with monkeypatch.context() as patch, recorder:
            patch.setattr(compiled, "module", lambda backend: Kernels(compiled.cpu, recorder))
            hidden = compute()
        hidden.zero_()  # what is read must come from a replay
        return recorder, hidden

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(layers, "compiled_for", lambda states: False)  # as on a GPU
    Recorder.replays = 0

    def of(generator: Generator) -> Generator:
        generator.runner.graphs = graphs.Graphs(generator.runner.device)
        return generator

    return of


def assert_same(found: Rollouts, want: Rollouts) -> None:
    assert [s.response for s in found.sequences] == [s.response for s in want.sequences]
    torch.testing.assert_close(found.logprobs, want.logprobs, rtol=0, atol=1e-5)  # torch multiplies more rows


@pytest.mark.filterwarnings("ignore:no CUDA graphs")
@pytest.mark.parametrize(
    "options",
    [{}, {"fast": False}, {"max_sequences": 4}, {"max_batch_tokens": 7}, {"share_prefixes": False}, {"block_size": 16}],
    ids=lambda options: next(iter(options), "default"),
)
def test_replayed_steps_give_the_same_tokens(family: Any, recorded: Any, options: dict[str, Any]) -> None:
    model, tokenizer = models.load(family)
    want = Generator(model, tokenizer, **options).generate(PROMPTS, PARAMS)
    generator = recorded(Generator(model, tokenizer, **options))
    assert_same(generator.generate(PROMPTS, PARAMS), want)
    if family.model_type == "gpt2":  # looks for padding among its tokens
        assert "not permitted when stream is capturing" in generator.runner.graphs.refused
    else:
        assert Recorder.replays > 10 and not generator.runner.graphs.refused


def test_steps_of_several_sizes_share_few_recordings(tiny: tuple[Any, Any], recorded: Any) -> None:
    generator = recorded(Generator(*tiny))
    generator.generate(PROMPTS, PARAMS)
    sizes = list(generator.runner.graphs.recordings)
    assert {size.sequences for size in sizes} <= set(graphs.SIZES) and max(size.sequences for size in sizes) == 16
    assert {size.shares for size in sizes} == {False}, "no prompt fills a block"
    count, before = len(sizes), Recorder.replays
    generator.generate(PROMPTS, PARAMS)
    assert len(generator.runner.graphs.recordings) == count and Recorder.replays > before


def test_prompts_of_several_blocks_are_shared_in_recordings(tiny: tuple[Any, Any], recorded: Any) -> None:
    prompts = [list(range(20, 90)), list(range(100, 140)), [5, 6], list(range(20, 85))]
    want = Generator(*tiny).generate(prompts, PARAMS)
    generator = recorded(Generator(*tiny))
    assert_same(generator.generate(prompts, PARAMS), want)
    assert {size.shares for size in generator.runner.graphs.recordings} == {False, True}


def test_trained_weights_are_seen_and_switched_adapters_are_recorded_anew(
    tiny: tuple[Any, Any], recorded: Any, nudge: Callable[..., None]
) -> None:
    model = models.trainable(tiny[0], LoRAConfig(r=4))
    nudge(model)
    plain, generator = Generator(model, tiny[1]), recorded(Generator(model, tiny[1]))
    first = generator.generate(PROMPTS, PARAMS)
    made = dict(generator.runner.graphs.recordings)
    nudge(model)
    assert_same(generator.generate(PROMPTS, PARAMS), want := plain.generate(PROMPTS, PARAMS))
    assert [s.response for s in first.sequences] != [s.response for s in want.sequences]
    assert made.items() <= generator.runner.graphs.recordings.items(), "weights that are trained stay where they are"
    with model.disable_adapter():
        assert_same(generator.generate(PROMPTS, PARAMS), plain.generate(PROMPTS, PARAMS))
    assert not set(map(id, made.values())) & set(map(id, generator.runner.graphs.recordings.values()))


def test_memory_that_is_given_back_takes_the_recordings_with_it(tiny: tuple[Any, Any], recorded: Any) -> None:
    generator = recorded(Generator(*tiny))
    want = generator.generate(PROMPTS, PARAMS)
    generator.release_memory()
    assert generator.runner.graphs.recordings == {}
    generator.restore_memory()
    assert_same(generator.generate(PROMPTS, PARAMS), want)


def test_a_model_that_reads_from_the_device_goes_on_without(
    tiny: tuple[Any, Any], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    want = Generator(model, tokenizer).generate(PROMPTS, PARAMS)
    generator = recorded(Generator(model, tokenizer))
    norm = model.base_model.norm
    original = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: original(x) if float(x.sum()) < 1e9 else x)
    with pytest.warns(RuntimeWarning, match="no CUDA graphs: .*operation not permitted when stream is capturing"):
        assert_same(generator.generate(PROMPTS, PARAMS), want)
    assert Recorder.replays == 0


def test_without_a_gpu_graphs_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="cuda_graphs: the model is on cpu; expected a CUDA device"):
        Generator(*tiny, cuda_graphs=True)


def test_a_sampler_with_graphs_keeps_the_memory_that_they_read(
    tiny: tuple[Any, Any], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sampler, "Generator", lambda *args, cuda_graphs, **options: recorded(Generator(*args, **options))
    )
    reward = resolve_reward(lambda prompts, responses: [1.0] * len(responses), 0.0, 64)
    prompts = [PromptRecord(f"{i}", f"prompt {i}") for i in range(2)]
    for cuda_graphs in (True, False):
        config = PPOConfig(prompts_per_step=2, samples_per_prompt=2, max_new_tokens=8, cuda_graphs=cuda_graphs)
        drawing = sampler.Sampler(*tiny, reward, prompts, config)
        drawing.take(1)
        assert bool(drawing.generator.runner.graphs.recordings) == cuda_graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu_give_the_tokens_of_plain_steps(family: Any) -> None:
    model, tokenizer = models.load(family, device=torch.device("cuda"))
    greedy = SamplingParams(temperature=0.0, max_new_tokens=20, ignore_eos=True)
    want = Generator(model, tokenizer).generate(PROMPTS, greedy)
    generator = Generator(model, tokenizer, cuda_graphs=True)
    found = generator.generate(PROMPTS, greedy)
    assert family.model_type == "gpt2" or generator.runner.graphs.recordings
    assert [s.response for s in found.sequences] == [s.response for s in want.sequences]
    torch.testing.assert_close(found.logprobs, want.logprobs, rtol=0, atol=1e-4)  # products of other sizes
