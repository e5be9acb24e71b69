"""Measure what a run really takes at its fullest moment, beside what `rlhf-fast doctor --config` predicts.

    python -m bench.memory                           SFT, reward, DPO and PPO on a random Llama of 23 million weights
    python -m bench.memory --model smollm2-135m --verbs sft ppo

Each trains for two steps in a process of its own, after a run of a tiny model that lets everything be loaded. On a GPU
the peak is that of PyTorch's allocator, on a CPU that of the resident pages (Linux), both beyond what was there before
the trainer was made; the loading of the weights is left out. The allocator of the C library is told to give every large
block back at once: what it would otherwise keep of freed blocks is its own matter.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerBase

from bench import harness
from rlhf_fast import cli, models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.config.settings import flatten, from_flat, to_dict
from rlhf_fast.data.tokenize import tokenize_example, tokenize_prompt
from rlhf_fast.ops import compiled
from rlhf_fast.planning import memory
from rlhf_fast.planning.forecast import CONFIGS
from rlhf_fast.runs.files import write_atomic
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def random_llama(folder: Path, layers: int = 6, hidden: int = 512, vocabulary: int = 8192) -> Path:
    """A model whose activations weigh as much as its weights."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    model, tokenizer = models.load(config)
    models.save(folder, model, tokenizer)
    return folder


def settings(verb: str, tokens: int, length: int, r: int = 16) -> memory.TrainerConfig:
    """Make settings of a run whose micro-batches have so many tokens in sequences of one length."""
    optim = OptimConfig(max_tokens_per_microbatch=tokens)
    lora, at_once = LoRAConfig(r=r), 2 * tokens // length
    if verb == "sft":
        return SFTConfig(epochs=1, batch_size=at_once, max_length=length, lora=lora, optim=optim)
    if verb == "reward":
        return RewardConfig(batch_size=at_once // 2, max_length=length, lora=lora, optim=optim)
    if verb == "dpo":
        return DPOConfig(batch_size=at_once // 2, max_length=length, lora=lora, optim=optim)
    return PPOConfig(
        steps=2, prompts_per_step=at_once // 2, samples_per_prompt=2, max_new_tokens=length // 2, epochs=1,
        minibatches=1, max_length=length, min_reward_agreement=0.0, lora=lora, optim=optim,
    )  # fmt: skip


def compare(model: str | Path, runs: dict[str, memory.TrainerConfig]) -> Iterator[dict[str, Any]]:
    """Of a run of each verb, the bytes that were predicted, phase by phase, and those that were taken."""
    device: memory.Device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = AutoConfig.from_pretrained(models.resolve(model))
    for (verb, config), measured in zip(runs.items(), measure(model, runs), strict=True):
        predicted = memory.predict(config, shape, device)
        phases = {phase: predicted.total(phase) for phase in predicted.phases}
        yield {
            "verb": verb, "device": device, "measured": measured, "predicted": predicted.peak,
            "ratio": round(predicted.peak / measured, 3), "phases": phases,
        }  # fmt: skip


def rendered(page: str) -> str:
    """A page with what each of its `$ rlhf-fast doctor` commands prints now, up to the end of its block."""

    def answer(match: re.Match[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            cli.main(shlex.split(match["command"].replace("\\\n", " "))[1:])
        return f"$ {match['command']}\n{out.getvalue()}```"

    return re.sub(r"\$ (?P<command>rlhf-fast doctor (?:[^\n]*\\\n)*[^\n]*)\n.*?```", answer, page, flags=re.DOTALL)


def measure(model: str | Path, runs: dict[str, memory.TrainerConfig]) -> list[int]:
    """The bytes that two steps of each verb take, one after the other in a process of their own."""
    given = json.dumps({"model": str(model), "runs": {verb: to_dict(config) for verb, config in runs.items()}})
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--child", given],
        env={**os.environ, **ENVIRONMENT}, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"bench.memory: {', '.join(runs)} on {model} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    return [int(line) for line in done.stdout.splitlines()[-len(runs) :]]


def _child(model: str, verb: str, config: memory.TrainerConfig) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tiny = random_llama(Path(folder) / "tiny", layers=1, hidden=64, vocabulary=512)
        _trainer(verb, tiny, settings(verb, 256, 64), Path(folder) / "warm-up").train()
        _give_back()
        before = _now()
        trainer = _trainer(verb, model, config, Path(folder) / "run")
        _give_back()
        _forget_peak()
        trainer.train()
        return _peak() - before


def _trainer(verb: str, model: Any, config: Any, out: Path) -> Any:
    _, tokenizer = models.load(model) if isinstance(model, Path) else (None, _tokenizer(model))
    length = config.max_length
    if verb == "sft":
        texts = [_text(tokenizer, f"{i:04}", length) for i in range(2 * config.batch_size + 1)]
        rows = [{"prompt": f"{i:04}", "completion": text} for i, text in enumerate(texts)]
        return SFTTrainer(model, rows, out, dataclasses.replace(config, heldout=1 / len(rows)))
    if verb == "ppo":
        room = length - config.max_new_tokens
        filler = "c" * room
        while len(tokenize_prompt(tokenizer, f"0000{filler}")) > room:
            filler = filler[:-1]
        prompts = [{"prompt": f"{i:04}{filler}"} for i in range(config.prompts_per_step)]
        return PPOTrainer(model, lambda prompts, texts: [0.5] * len(texts), prompts, out, config)
    number = 2 * config.batch_size + 2
    pairs = [
        {"prompt": f"{i:04}", "chosen": text, "rejected": text[::-1]}
        for i, text in enumerate(_text(tokenizer, f"{i:04}", length) for i in range(number))
    ]
    config = dataclasses.replace(config, heldout=2 / number)
    return {"reward": RewardTrainer, "dpo": DPOTrainer}[verb](model, pairs, out, config)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.resolve(model))


def _text(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> str:
    """The longest response of one word after the other with which `prompt` has at most `length` tokens."""
    words = length
    while len(tokenize_example(tokenizer, prompt, "ab" + "c" * words)) > length:
        words -= 1
    return "ab" + "c" * words


# The memory of this process -----------------------------------------------------------------------------------------


def _give_back() -> None:
    """Free all memory that nobody holds."""
    gc.collect()
    compiled.release_memory()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _now() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else harness.status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else harness.status("VmHWM")


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder, run or smollm2-135m; empty: a random Llama")
    parser.add_argument("--verbs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapter; 0: all weights are trained")
    parser.add_argument("--docs", action="store_true", help="renew the figures of docs/cost.md, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.child:
        task = json.loads(given.child)
        for verb, config in task["runs"].items():
            print(_child(task["model"], verb, from_flat(CONFIGS[verb], flatten(config))))
        return
    if given.docs:
        page = Path(__file__).resolve().parents[1] / "docs" / "cost.md"
        write_atomic(page, rendered(page.read_text(encoding="utf-8")))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or random_llama(Path(folder) / "model")
        runs = {verb: settings(verb, given.tokens, given.length, given.r) for verb in given.verbs}
        rows = []
        for row in compare(model, runs):
            rows.append(row)
            print(json.dumps(row), flush=True)
    taken = {row["verb"]: row["measured"] for row in rows}
    if "sft" in taken and "ppo" in taken:
        print(f"PPO takes {taken['ppo'] / taken['sft']:.3f} times the memory of SFT")


if __name__ == "__main__":
    main()
