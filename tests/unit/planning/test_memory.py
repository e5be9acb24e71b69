"""The memory that is predicted beside the memory that is there."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, GemmaConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from bench import memory as measured
from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data.batches import LONGEST_ROW
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.ops import lm_head
from rlhf_fast.planning import memory
from rlhf_fast.planning.memory import LiveBytes, TrainerConfig, predict
from rlhf_fast.rollout.model.probe import probe
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.ppo.experience import Scorer
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512)
GEMMA = GemmaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
    head_dim=24, vocab_size=512,
)  # fmt: skip
CONFIGS: list[TrainerConfig] = [  # without samples, which would be predicted, too
    SFTConfig(samples=0), SFTConfig(samples=0, packing=False), RewardConfig(), DPOConfig(), PPOConfig(),
]  # fmt: skip


def test_live_bytes_are_those_of_tensors_made_inside_and_not_yet_gone() -> None:
    held = torch.zeros(1000)
    with LiveBytes([held], "cpu") as live:
        x = torch.ones(100)
        y = x.view(10, 10).t()
        assert live.live == 400
        z = held.view(10, 100) + 1
        assert live.live == 4400
        del x, z
        assert live.live == 400, "a view keeps its memory"
        del y
        assert (live.live, live.peak) == (0, 4400)


@pytest.mark.parametrize("shape", [LLAMA, GPT2, GEMMA], ids=lambda shape: shape.model_type)
def test_keys_and_values_take_what_the_generator_gives_them(shape: PreTrainedConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = models.load(shape, dtype)
        served = probe(model, torch.device("cpu"))
        assert memory.kv_bytes_per_token(shape, dtype) == served.bytes_per_token


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.seconds(2)
def test_weights_are_those_of_the_model(r: int, dtype: Any) -> None:
    config = SFTConfig(lora=LoRAConfig(r=r), dtype=dtype)
    parts = predict(config, LLAMA).phases["training"]
    model = models.trainable(models.load(LLAMA, getattr(torch, dtype))[0], config.lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert parts["frozen weights"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert parts["trained weights"] == parts["gradients"] == sum(p.nbytes for p in trained)
    assert parts["Adam's moments"] == 8 * sum(p.numel() for p in trained)
    copies = 4 * sum(p.numel() for p in trained) if (r, dtype) == (0, "bfloat16") else 0
    assert parts["float32 copies of those"] == copies


# Checkpointing with one family alone: what it leaves out does not hang on the family.
@pytest.mark.parametrize(
    ("shape", "checkpointing"),
    [(LLAMA, False), (LLAMA, True), (GPT2, False), (GEMMA, False)],
    ids=["llama", "llama checkpointing", "gpt2", "gemma"],
)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.seconds(3)
def test_a_pass_without_memory_takes_what_the_same_pass_takes_with_it(
    config: TrainerConfig, shape: PreTrainedConfig, checkpointing: bool
) -> None:
    optim = dataclasses.replace(config.optim, checkpointing=checkpointing, max_tokens_per_microbatch=256)
    config = dataclasses.replace(config, optim=optim, max_length=64)
    predicted = predict(config, shape).phases["training"]
    made = memory.build(config, shape)
    critic = made.critic
    parameters = [*made.policy.parameters(), *([] if critic is None else critic.head.parameters())]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [x for p in parameters for x in (p, p.grad) if x is not None]
    batch = memory.full_batch(config)
    with LiveBytes(held, "cpu") as live:
        memory.loss(config, made, batch).backward()
    assert live.peak > 100_000
    assert predicted["activations"] + predicted["block of logits"] == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("r", [0, 8], ids=["trained head", "frozen head"])
def test_a_block_of_a_large_vocabulary_is_as_high_as_the_loss_makes_it(r: int) -> None:
    """Twice as high where the head has no gradient."""
    shape = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 80_000, "num_hidden_layers": 1, "hidden_size": 16})
    config = SFTConfig(lora=LoRAConfig(r=r), max_length=256, optim=OptimConfig(max_tokens_per_microbatch=256))
    predicted = predict(config, shape).phases["training"]["block of logits"]
    rows = memory.full_batch(config).response_tokens.numel()
    blocks = lm_head.whole_rows(rows, 80_000, torch.device("cpu"), frozen=r > 0)
    kept = rows * 16 * (4 + 4)  # states of the tokens that count, and their gradients
    assert predicted == max(block.logits.nbytes for block in blocks) + kept


@pytest.mark.parametrize("options", [{}, {"lag": 1}, {"critic": "separate"}, {"critic": "separate", "lag": 1}])
@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=lambda shape: shape.model_type)
@pytest.mark.seconds(4)
def test_scoring_takes_what_the_fullest_pass_of_the_scorer_takes(shape: PreTrainedConfig, options: Any) -> None:
    config = PPOConfig(max_length=64, optim=OptimConfig(max_tokens_per_microbatch=512), **options)
    predicted = predict(config, shape).phases["scoring"]
    made, batch = memory.build(config, shape), memory.full_batch(config)
    modules = [made.policy, made.reference, *(made.critic.modules if made.critic else [])]
    peaks = []
    for each in Scorer(*made, config, TokenBudget(512), shared=0).passes(config.lag):
        with torch.no_grad(), LiveBytes([p for m in modules for p in m.parameters()], "cpu") as live:
            each(batch)
        peaks.append(live.peak)
    assert len(peaks) == (2 if options else 1) and min(peaks) > 100_000
    assert predicted["activations"] + predicted["block of logits"] == pytest.approx(max(peaks), rel=0.02)


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo", "ppo"])
def test_what_is_planned_is_the_loss_that_is_trained(
    verb: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nothing is trained, and nothing planned."""

    def stop(*_: Any, **__: Any) -> Any:
        raise LookupError("the loss")

    rows = [{"prompt": f"q{i}", "completion": "yes"} for i in range(8)]
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(8)]
    ppo = PPOConfig(prompts_per_step=2, samples_per_prompt=1, minibatches=1, max_new_tokens=4, max_length=64)
    trainer = {
        "sft": lambda: SFTTrainer(tiny_folder, rows, tmp_path),
        "reward": lambda: RewardTrainer(tiny_folder, pairs, tmp_path),
        "dpo": lambda: DPOTrainer(tiny_folder, pairs, tmp_path),
        "ppo": lambda: PPOTrainer(tiny_folder, lambda _, said: [0.0] * len(said), rows, tmp_path, ppo),
    }[verb]()
    for module in ("trainers.ppo.trainer", "trainers.ppo.loss") if verb == "ppo" else (f"trainers.{verb}",):
        monkeypatch.setattr(f"rlhf_fast.{module}.batch_loss", stop)
    with pytest.raises(LookupError, match="the loss"):
        trainer.train()
    with pytest.raises(LookupError, match="the loss"):
        predict(trainer.config, LLAMA)


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.seconds(2)
def test_a_step_of_the_optimiser_takes_what_it_holds_and_works_in(r: int, dtype: Any) -> None:
    config = SFTConfig(lora=LoRAConfig(r=r), dtype=dtype)
    phase = predict(config, LLAMA).phases["optimiser step"]
    model = models.trainable(models.load(LLAMA, getattr(torch, dtype))[0], config.lora)
    optimizer = Optimizer([model], config.optim, 10)
    trained = optimizer.parameters

    def give_gradients() -> None:
        for p in trained:
            p.grad = torch.full_like(p, 0.01)

    give_gradients()
    optimizer.step()
    moments = [x for state in optimizer.adam.state.values() for name, x in state.items() if name != "step"]
    assert phase["Adam's moments"] == sum(x.nbytes for x in moments)
    copies = [m for m, p in zip(optimizer.masters, trained, strict=True) if m is not p]
    assert phase["float32 copies of those"] == sum(x.nbytes for x in copies)
    give_gradients()
    steps = [state["step"] for state in optimizer.adam.state.values()]
    given = [p.grad for p in trained if p.grad is not None]
    with LiveBytes([*trained, *optimizer.masters, *moments, *steps, *given], "cpu") as live:
        optimizer.step()
    made = sum(4 * p.numel() for p in trained if p.dtype != torch.float32)  # gradients of the copies
    assert made + phase["workspace"] == pytest.approx(live.peak, rel=0.02)
    assert phase["gradients"] == sum(4 * p.numel() for p in trained)


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=lambda shape: shape.model_type)
@pytest.mark.seconds(4)
def test_generation_takes_its_keys_and_values_and_its_fullest_step(shape: PreTrainedConfig) -> None:
    config = PPOConfig(prompts_per_step=3, samples_per_prompt=2, max_length=48)
    phase = predict(config, shape).phases["rollouts"]
    model, tokenizer = models.load(shape)
    generator = Generator(model, tokenizer, fast=False)
    params = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True)
    prompts = [[5 + i] * 40 for i in range(3)]
    generator.generate(prompts, params)
    kept = [x for cache in generator.runner.caches.values() for x in (cache.keys, cache.values)]
    assert phase["keys and values"] == sum(x.nbytes for x in kept)
    prompts = [[5 + i] * 341 for i in range(6)]  # a step of as many tokens as there may be
    params = SamplingParams(max_new_tokens=1, ignore_eos=True)
    generator.generate(prompts, params)
    kept = [x for cache in generator.runner.caches.values() for x in (cache.keys, cache.values)]
    generator._weights = None
    with LiveBytes([*model.parameters(), *model.buffers(), *kept], "cpu") as live:
        generator.generate(prompts, params)
    assert generator.statistics.steps == 1
    found = (phase["activations"] + phase["block of logits"]) / live.peak
    assert 0.99 < found < 1.25, "never too little; paged attention repeats no keys, as is assumed"


@pytest.mark.seconds(2)
def test_a_reference_and_reward_models_take_their_weights() -> None:
    phase = predict(PPOConfig(dtype="bfloat16"), LLAMA, rewards=[GEMMA, LLAMA]).phases["scoring"]
    scorers = []
    for shape in (GEMMA, LLAMA):
        shape = type(shape)(**{**shape.to_dict(), "num_labels": 1})
        scorers.append(AutoModelForSequenceClassification.from_config(shape, dtype=torch.bfloat16))
    assert phase["reward models"] == sum(p.nbytes for model in scorers for p in model.parameters())
    policy = models.trainable(models.load(LLAMA, torch.bfloat16)[0], PPOConfig().lora)
    assert phase["reference"] == sum(p.nbytes for p in policy.parameters() if p.requires_grad) > 0


@given(st.integers(1, 5000), st.integers(4, 3000), st.sampled_from(CONFIGS))
def test_a_full_batch_is_as_full_as_a_micro_batch_may_be(budget: int, longest: int, config: TrainerConfig) -> None:
    optim = dataclasses.replace(config.optim, max_tokens_per_microbatch=budget)
    config = dataclasses.replace(config, optim=optim, max_length=longest)
    rows, width = memory.full_batch(config).input_ids.shape
    most = max(budget, memory.longest_microbatch(config))
    assert most - rows < rows * width <= most
    assert rows == 1 or width <= max(longest, LONGEST_ROW)
    alone = isinstance(config, SFTConfig) and not config.packing  # conversations share no row then
    batch = memory.full_batch(config)
    assert not alone or (batch.mask is None and batch.segments is None and len(batch.last) == rows)


@pytest.mark.seconds(6)
def test_a_critic_of_its_own_takes_what_it_is_made_of() -> None:
    shared, separate, reward = (
        predict(PPOConfig(critic=critic), LLAMA, rewards=[LLAMA]).phases["training"]  # type: ignore[arg-type]
        for critic in ("shared", "separate", "reward")
    )
    adapter = shared["reference"]
    assert separate["trained weights"] - shared["trained weights"] == adapter, "its frozen weights are the policy's"
    assert separate["frozen weights"] == shared["frozen weights"]
    assert separate["activations"] > 1.5 * shared["activations"]
    own = reward["frozen weights"] - shared["frozen weights"]
    assert own == shared["reward models"] + 4 * 64, "peft keeps the score's head twice"
    with pytest.raises(ValueError, match="starts from a reward model's checkpoint"):
        predict(PPOConfig(critic="reward"), LLAMA)
    without = predict(PPOConfig(advantage="grpo"), LLAMA, rewards=[LLAMA, LLAMA]).phases["training"]
    assert without["trained weights"] == adapter and without["reward models"] == 2 * shared["reward models"]


@pytest.mark.seconds(3)
def test_samples_for_people_and_for_the_scale_of_scores_are_phases_of_their_own() -> None:
    kv = memory.kv_bytes_per_token(LLAMA, torch.float32)
    samples = predict(SFTConfig(samples=3, max_length=1000, sample_tokens=50), LLAMA).phases["samples"]
    assert samples["keys and values"] == 3 * 1056 * kv, "in blocks of 32"
    assert "samples" not in predict(SFTConfig(samples=0), LLAMA).phases
    scale = predict(RewardConfig(normalize_samples=1, dtype="bfloat16"), LLAMA).phases["policy's samples"]
    assert 0.95 < scale["the policy"] / scale["frozen weights"] < 1.4, "both in bfloat16; the policy has a head"


@pytest.mark.seconds(8)
def test_more_tokens_take_more_and_recomputing_takes_less() -> None:
    def activations(tokens: int, checkpointing: bool) -> int:
        optim = OptimConfig(max_tokens_per_microbatch=tokens, checkpointing=checkpointing)
        return predict(SFTConfig(max_length=256, optim=optim), LLAMA).phases["training"]["activations"]

    for checkpointing in (False, True):
        few, more = activations(1024, checkpointing), activations(2048, checkpointing)
        assert 1.8 * few < more < 2.2 * few
    assert activations(2048, True) < 0.7 * activations(2048, False)


@pytest.mark.seconds(8)
def test_ppo_on_one_trunk_takes_at_most_a_quarter_more_than_sft() -> None:
    smollm2 = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    ppo = PPOConfig(prompts_per_step=8, samples_per_prompt=2, minibatches=1, max_length=128)
    sft = SFTConfig(max_length=128)
    assert predict(ppo, smollm2).peak <= 1.25 * predict(sft, smollm2).peak


@pytest.mark.seconds(4)
def test_keys_and_values_take_at_most_half_of_what_is_free() -> None:
    config = PPOConfig(max_length=1024)
    free = predict(config, LLAMA).phases["rollouts"]
    without = sum(free.values()) - free["keys and values"]
    tight = predict(config, LLAMA, available=without + 1_000_000).phases["rollouts"]
    assert tight == {**free, "keys and values": 500_000}
    assert free["keys and values"] == 64 * 1024 * memory.kv_bytes_per_token(LLAMA, torch.float32)


@pytest.mark.seconds(4)
def test_with_cuda_graphs_keys_and_values_stay() -> None:
    phases = predict(PPOConfig(cuda_graphs=True), LLAMA).phases
    assert len({parts["keys and values"] for parts in phases.values()}) == 1
    assert "keys and values" not in predict(PPOConfig(), LLAMA).phases["training"]


@pytest.mark.seconds(2)
def test_a_gpu_has_larger_blocks_of_logits() -> None:
    wide = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 150_000, "num_hidden_layers": 1})
    parts = {device: predict(SFTConfig(), wide, device).phases["training"] for device in ("cpu", "cuda")}
    assert parts["cuda"]["block of logits"] > 5 * parts["cpu"]["block of logits"] > 0


@pytest.mark.seconds(3)
def test_a_model_that_needs_values_is_an_error_that_names_it() -> None:
    class Strange(LlamaConfig):
        model_type = "strange"

    with pytest.raises(ValueError, match=r"^model: Strange"):
        predict(SFTConfig(), Strange())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.seconds(50)
def test_runs_take_at_their_peak_what_was_predicted(tmp_path: Path) -> None:
    model = measured.random_llama(tmp_path / "model")
    runs = {verb: measured.settings(verb, tokens=512, length=64) for verb in ("sft", "reward", "dpo", "ppo")}
    for found in measured.compare(model, runs):
        assert found["measured"] > 2.5e8, found
        assert 0.95 < found["predicted"] / found["measured"] < 1.15, found
