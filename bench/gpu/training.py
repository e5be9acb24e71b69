"""Generation and PPO on random weights of shapes that people use; in a rehearsal, on a model of 0.1 million."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen3Config

from bench import harness
from bench.gpu.steps import Context
from bench.rollout import run as rollout
from rlhf_fast import LoRAConfig, OptimConfig, PPOConfig, PPOTrainer, models
from rlhf_fast.machine import product_rate
from rlhf_fast.runs.folder import RunFolder

QWEN3 = Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
QWEN2_0_5B = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
QWEN2_1_5B = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
QWEN2_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
QWEN3_8B = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
TINY = Qwen2Config(
    vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


SHAPES = {"Qwen3-0.6B": QWEN3, "Qwen2.5-1.5B": QWEN2_1_5B, "Qwen3-8B": QWEN3_8B}


def rollouts(context: Context) -> None:
    shapes = {"tiny": TINY} if context.rehearse else SHAPES
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    about, rates = harness.environment(context.device), harness.rates(context.device)
    rates = dataclasses.replace(rates, product=product_rate(context.device, dtype))
    for name, config in shapes.items():
        model, _ = models.load(config, dtype=dtype, device=context.device)
        for case in cases(config.vocab_size, context):
            few = case.prompts[:2]
            rollout.ours(dataclasses.replace(case, prompts=few, new_tokens=[4] * len(few)), model)()  # compiles
            least = rollout.limit(case, model, rates)
            runs = {"rlhf-fast": rollout.ours(case, model)}
            if case.n == 1 and name in ("tiny", "Qwen3-0.6B") and len(set(case.new_tokens)) == 1:
                runs["generate_batch"] = rollout.generate_batch(case, model)
            records = rollout.timed(case, runs, least, about, rates, rounds=1)
            if context.device.type == "cuda":
                runs.clear()  # and the memory of their keys and values
                torch.cuda.empty_cache()
                records.append(_with_graphs(case, model, least, about, rates, records[0]["seconds"]))
            for record in records:
                context.record(**{**record, "op": f"rollout: {name}, {case.name}"})
        del model
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _with_graphs(
    case: rollout.Case, model: Any, least: float, about: dict[str, Any], rates: harness.Rates, plain: float
) -> dict[str, Any]:
    """The record of a second call, beside the `plain` seconds of one without graphs: what the first call records serves
    it, as from step to step of PPO."""
    run = rollout.ours(case, model, cuda_graphs=True)
    run()
    (record,) = rollout.timed(case, {"rlhf-fast, CUDA graphs": run}, least, about, rates, rounds=1)
    return {**record, "speedup": record["seconds"] / plain}


def cases(vocabulary: int, context: Context) -> list[rollout.Case]:
    generator = torch.Generator().manual_seed(0)
    count, least, most = (4, 4, 12) if context.rehearse else (256, 100, 1024)

    def sizes(number: int) -> list[int]:
        lengths: list[int] = torch.randint(least, most + 1, (number,), generator=generator).tolist()
        return lengths

    def prompts(lengths: list[int]) -> list[list[int]]:
        return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]

    flat = rollout.Case(
        f"{count} prompts of {most // 2}, {most // 4} new", prompts([most // 2] * count), [most // 4] * count
    )
    ragged = rollout.Case(f"{count} prompts, {least} to {most} new", prompts(sizes(count)), sizes(count))
    groups = rollout.Case(
        f"{count // 4} prompts of {most // 2} x 8", prompts([most // 2] * (count // 4)), [most // 4] * (count // 4), n=8
    )
    return [flat, ragged, groups]


def ppo(context: Context) -> None:
    shapes = {"Qwen2.5-0.5B": QWEN2_0_5B, "Qwen2.5-1.5B": QWEN2_1_5B, "Qwen2.5-7B": QWEN2_7B}
    if context.rehearse:
        shapes = {"tiny": TINY}
    about = harness.environment(context.device)
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            for record in _steps(context, name, shape, Path(folder)):
                context.record(**record, **about)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _steps(context: Context, name: str, shape: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Steps of PPO with adapters on frozen weights, in bfloat16 on a GPU."""
    small, cuda = context.rehearse, context.device.type == "cuda"
    config = PPOConfig(
        steps=3, prompts_per_step=2 if small else 32, samples_per_prompt=2 if small else 8, minibatches=2,
        max_new_tokens=8 if small else 256, epochs=1, lora=LoRAConfig(r=16), min_reward_agreement=0.0,
        dtype="bfloat16" if cuda else "float32", cuda_graphs=cuda,
        optim=OptimConfig(max_tokens_per_microbatch=1024 if small else 16384),
    )  # fmt: skip
    prompts = [
        {"prompt": f"{i}: " + "a question of some length. " * (1 if small else 8)}
        for i in range(config.prompts_per_step)
    ]

    def by_length(prompts: list[Any], responses: list[str]) -> list[float]:
        return [float(len(text)) for text in responses]

    started = time.monotonic()
    # Random weights, which no adapter could be saved beside; so it does steps alone, and never ends.
    trainer = PPOTrainer(shape, by_length, prompts, folder / "ppo", config)
    run = RunFolder(folder / "ppo", "ppo", "")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for n in range(1, config.steps + 1):
        row = trainer.step(run, n)
        if n == 1:  # warms up
            continue
        sequences = config.prompts_per_step * config.samples_per_prompt
        parts = {part: row[f"seconds_{part}"] for part in ("rollout", "scoring", "training")}
        yield {
            "op": f"ppo: {name}", "case": f"{sequences} samples, step {n}", "provider": "rlhf-fast",
            "seconds": sum(parts.values()), "parts": parts, "tokens": sequences * row["response_tokens"],
            **{key: row.get(key) for key in ("training_utilisation", "decode_roofline", "busy")},
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        }  # fmt: skip
    print(f"{name}: {config.steps} steps, with loading, in {time.monotonic() - started:.1f} s")
