"""`python -m bench.training`: steps an hour of PPO here, with a critic, beside TRL's RLOO trainer, which has none.

Each side trains an adapter of rank 16 on SmolLM2-135M, on the same 8 prompts with 4 responses of at most 48 tokens
each, in float32, and makes one optimiser step of a batch. It is a process of its own, so that its peak memory is its
own; the processes wait for each other, and a round has one step of each, beginning with another one every time. TRL
first tries several settings, and the fastest one takes part. TRL is no dependency: `pip install trl`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from bench import harness
from rlhf_fast.runs.files import write_atomic

PROMPTS, SAMPLES, NEW_TOKENS, RANK, KL, LR = 8, 4, 48, 16, 0.05, 1e-4
MODEL = "smollm2-135m"
OURS = ["PPO, ours", "RLOO, ours"]  # the first is what the others are measured against
PEERS = [f"RLOO, TRL, {rows} rows at once" for rows in (4, 8, 16, 32)] + ["RLOO, TRL, 8 rows, continuous batching"]
DOCS = harness.ROOT / "docs" / "trl.md"
Wait = Callable[[], bool]  # until the next step may begin; False: there is none
Tell = Callable[[float, float], None]  # seconds and mean response tokens of the step that was just made


def distinct_words(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that takes no time: the share of words that are not repeated."""
    return [len(set(text.split())) / max(len(text.split()), 1) for text in completions]


def prompts() -> list[str]:
    lines = (harness.ROOT / "rlhf_fast" / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:PROMPTS]]


# Sides: each makes its trainer and then a step whenever it may -----------------------------------------------------


def ours(name: str, out: Path, wait: Wait, tell: Tell) -> None:
    from rlhf_fast import LoRAConfig, OptimConfig, PPOConfig, PPOTrainer
    from rlhf_fast.runs.folder import RunFolder

    config = PPOConfig(
        prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS, epochs=1, minibatches=1,
        kl_coef=KL, advantage="rloo" if name.startswith("RLOO") else "gae", lora=LoRAConfig(r=RANK, alpha=2.0 * RANK),
        optim=OptimConfig(lr=LR, schedule="constant", warmup=0.0),
    )  # fmt: skip
    trainer = PPOTrainer(MODEL, distinct_words, [{"prompt": text} for text in prompts()], out, config)
    run, step = RunFolder(out, "ppo", trainer.config_yaml), 0
    while wait():
        step += 1
        started = time.perf_counter()
        row = trainer.step(run, step)
        run.log({"step": step, **row})
        tell(time.perf_counter() - started, row["response_tokens"])


def theirs(name: str, out: Path, wait: Wait, tell: Tell) -> None:
    """A step is what lies between TRL's two calls of a callback: generation, scoring, gradients, optimiser."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from rlhf_fast import models

    match = re.search(r"(\d+) rows", name)
    assert match is not None
    rows, started, taken = int(match[1]), 0.0, False

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            nonlocal started, taken
            taken = wait()
            if not taken:
                control.should_training_stop = True
            started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> Any:
            if not taken:  # nobody waits for this one
                os._exit(0)
            tell(time.perf_counter() - started, trainer._metrics["train"]["completions/mean_length"][-1])

    config = RLOOConfig(
        output_dir=str(out), per_device_train_batch_size=rows, gradient_accumulation_steps=PROMPTS * SAMPLES // rows,
        num_generations=SAMPLES, max_completion_length=NEW_TOKENS, beta=KL, learning_rate=LR, max_steps=10_000,
        lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        gradient_checkpointing=False,  # the default, which computes twice to save memory, would slow it down
        use_transformers_continuous_batching="continuous" in name, disable_tqdm=True, logging_steps=10_000,
    )  # fmt: skip
    model, tokenizer = models.load(MODEL)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in prompts()])
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return distinct_words(prompts, [message[-1]["content"] for message in completions])

    trainer = RLOOTrainer(
        model, reward, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter,
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()


def side(name: str) -> None:
    """The process of one side: a line comes in, a step is made, a line goes out."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

    def tell(seconds: float, tokens: float) -> None:
        answer = {"seconds": seconds, "tokens": tokens, "peak_mib": harness.status("VmHWM") / 2**20}
        print(json.dumps(answer), file=out, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        (ours if "ours" in name else theirs)(name, Path(folder) / "run", lambda: bool(sys.stdin.readline()), tell)


# The run ------------------------------------------------------------------------------------------------------------


class Side:
    """A side's process, which has made its first step: that one warms up and is not counted."""

    def __init__(self, name: str, log: IO[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.training", "--side", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=harness.ROOT,
        )  # fmt: skip
        self.steps: list[dict[str, float]] = []
        self.step()
        self.steps.clear()

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is told below
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        self.steps.append(json.loads(line))
        print(f"  {self.name:45} {self.steps[-1]['seconds']:7.2f} s", flush=True)
        return self.steps[-1]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def fastest(names: Sequence[str], log: IO[str]) -> str:
    """The one of TRL's settings with the shortest step; those that fail are told of."""
    times: dict[str, float] = {}
    for name in names:
        try:
            side = Side(name, log)
        except RuntimeError as error:
            print(f"  left out: {error}; {log.name} says why")
            continue
        times[name] = min(side.step()["seconds"] for _ in range(2))
        side.stop()
    if not times:
        raise SystemExit(f"TRL made no step; is it installed (pip install trl)? {log.name} says what it printed")
    return min(times, key=lambda name: times[name])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side that count")
    parser.add_argument("--peer", choices=PEERS, help="take this one of TRL's settings, and try no other")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "bench" / "results" / "training-cpu.jsonl")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.side:
        side(given.side)
        return
    with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as log:
        print("A step of each to warm up:")
        sides = [Side(name, log) for name in OURS]
        try:
            if given.peer is None:
                print("TRL's settings, a step each to warm up and two more:")
                given.peer = fastest(PEERS, log)
            sides.append(Side(given.peer, log))
            print(f"{given.rounds} rounds:")
            for i in range(given.rounds):
                for j in range(len(sides)):
                    sides[(i + j) % len(sides)].step()
        finally:
            for one in sides:
                one.stop()
    records = [record(one, sides[0]) for one in sides]
    harness.write_records(records, given.out)
    text = DOCS.read_text(encoding="utf-8")
    write_atomic(DOCS, re.sub(r"(?<=<!-- steps -->\n).*?(?=<!-- end of steps -->)", table(records), text, flags=re.S))
    print(table(records))


def record(side: Side, first: Side) -> dict[str, Any]:
    import trl

    return {
        "op": "training step", "case": f"SmolLM2-135M, {PROMPTS * SAMPLES} responses of at most {NEW_TOKENS} tokens",
        "provider": side.name, "seconds": statistics.median(step["seconds"] for step in side.steps),
        "rounds": len(side.steps), "tokens": statistics.mean(step["tokens"] for step in side.steps),
        "peak_mib": max(step["peak_mib"] for step in side.steps), "trl": trl.__version__,
        "speedup": statistics.median(
            its["seconds"] / mine["seconds"] for its, mine in zip(side.steps, first.steps, strict=True)
        ),
        **harness.environment(torch.device("cpu")),
    }  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| trainer | seconds a step | steps an hour | time beside PPO here | tokens a response | peak of the process |",
        "|---|---|---|---|---|---|",
    ]
    for row in records:
        lines.append(
            f"| {row['provider']} | {row['seconds']:.1f} | {3600 / row['seconds']:.0f} | {row['speedup']:.2f} | "
            f"{row['tokens']:.1f} | {row['peak_mib']:,.0f} MiB |"
        )
    about = records[0]
    lines += ["", f"TRL {about['trl']}, torch {about['torch']}, {about['device']}, {about['threads']} threads."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
