"""Predict `bench.gpu`'s rollouts: step by step, what a step reads and multiplies, and what it launches.

A step of new tokens reads all weights, and the keys and values of every sequence. Beside that stand its launches, 16
or 18 a layer: small models are bound by those and not by memory. A step takes the longer of what the device does and
what Python launches; where each sequence has one token, a CUDA graph launches all layers at once.

The roofline is that of `bench.rollout.run.limit` at the data sheet's rates: memory alone, all sequences at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench import harness
from bench.gpu import training
from bench.gpu.steps import Context
from bench.predict.cards import BYTES, CARDS, LAUNCH, PRODUCTS, START, TRIP, Card
from bench.rollout import run
from rlhf_fast.rollout.generator import MAX_BATCH_TOKENS, MAX_SEQUENCES

# The launches of a layer as rollout/torch_layers.py has it, which tests/bench/test_predict.py counts, and those of its
# attention: write_kv, keys in parts, parts together.
LAYER = {"qwen2": 13, "qwen3": 15}
ATTENTION = 3
WIDTHS = 40  # that the small kernels of a layer read and write for a token, in widths of bfloat16; two norms are 4, the
# product of gate and up, 3 times as wide as a state, is 15
REST = 36  # launches around the layers: 12 for embedding, rotation and last norm; copies, states, logits, sampling
INSIDE = 12  # of those, what a graph launches with the layers
GRAPH = 15e-6  # seconds that Python takes to launch a graph, after its two copies
NEXT = 1.3e-6  # seconds from the end of one kernel of a graph to the first instruction of the next
STEP = 2e-3  # seconds that the scheduler, the batch and drawing take for 256 sequences: `python -m bench.rollout.host`
GOAL = 0.55  # of the roofline, where no prompt has several samples


@dataclass(frozen=True)
class Model:
    """Sizes of a model that a step's time depends on."""

    layers: int
    width: int
    kind: str
    trunk: int  # weights of all layers
    head: int
    key: int  # bytes of a position's keys and values in all layers

    @property
    def launches(self) -> tuple[int, int]:
        """Count a step's launches: PyTorch's, and Triton's."""
        return REST + self.layers * LAYER[self.kind], 1 + self.layers * ATTENTION

    def call(self, in_graph: bool) -> float:
        """Seconds that Python takes for a step."""
        torchs, tritons = (REST - INSIDE, 1) if in_graph else self.launches
        return STEP + torchs * LAUNCH["torch"] + tritons * LAUNCH["triton"] + in_graph * GRAPH

    def starts(self, in_graph: bool) -> float:
        """Seconds in which the device goes from kernel to kernel."""
        outside = REST - INSIDE + 1 if in_graph else sum(self.launches)
        return outside * (START + TRIP) + (sum(self.launches) - outside) * (NEXT + TRIP)


def predictions() -> Iterator[dict[str, Any]]:
    """Predict each card, model and case."""
    context = Context(rehearse=False, short=False)
    for name, config in training.SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        about = model_of(config, sum(p.numel() for p in model.parameters()))
        for case in training.cases(config.vocab_size, context):
            steps = list(steps_of(case))
            for card_name, card in CARDS.items():
                rates = harness.Rates(card.bandwidth, card.bandwidth, card.products)
                limit = run.limit(case, model, rates)
                for graphs in (False, True):
                    prediction = predicted(case, steps, about, card, limit, graphs)
                    yield {"card": card_name, "case": f"{name}, {case.name}", "graphs": graphs, **prediction}


def model_of(config: PretrainedConfig, weights: int) -> Model:
    head = config.vocab_size * config.hidden_size
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Model(
        config.num_hidden_layers, config.hidden_size, config.model_type,
        weights - (head if config.tie_word_embeddings else 2 * head), head,
        2 * 2 * config.num_hidden_layers * config.num_key_value_heads * dim,
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Tokens computed, tokens sampled, and positions whose keys and values are read."""

    tokens: int
    sampled: int
    read: int

    @property
    def decodes(self) -> bool:
        """Return whether each sequence has one token, as in what is recorded."""
        return self.tokens == self.sampled


def steps_of(case: run.Case) -> Iterator[Step]:
    """List the steps as the scheduler takes them: running sequences have a token each, the rest of a step goes to
    prompts. The samples of a prompt begin together and read it once."""
    waiting = [(len(p), count) for p, count in zip(case.prompts, case.new_tokens, strict=True)]
    running: list[list[int]] = []  # prompt, new tokens so far, new tokens in all
    begun, left = 0, waiting[0][0]  # the prompt at hand, and how much of it is to be computed
    while running or begun < len(waiting):
        sampled = len(running) * case.n
        room, tokens = MAX_BATCH_TOKENS - sampled, sampled
        read = sum(prompt + case.n * new for prompt, new, _ in running)
        for one in running:
            one[1] += 1
        while room > 0 and begun < len(waiting) and (len(running) + 1) * case.n <= MAX_SEQUENCES:
            taken = min(room, left)
            room, tokens, left = room - taken, tokens + taken, left - taken
            if left == 0:
                prompt, count = waiting[begun]
                running.append([prompt, 1, count])
                sampled += case.n
                begun += 1
                left = waiting[begun][0] if begun < len(waiting) else 0
        yield Step(tokens, sampled, read)
        running = [one for one in running if one[1] < one[2]]


def predicted(
    case: run.Case, steps: list[Step], model: Model, card: Card, limit: float, graphs: bool
) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    for step in steps:
        binds, its = step_seconds(step, model, card, graphs and step.decodes)
        seconds[binds] = seconds.get(binds, 0.0) + its
    took = sum(seconds.values())
    share = limit / took
    goal = {"wanted": GOAL, "unit": "of the roofline", "predicted": round(share, 4), "reached": share >= GOAL}
    return {
        "tokens_per_second": round(case.tokens() / took, 1), "seconds": round(took, 4), "steps": len(steps),
        "binds": max(seconds, key=lambda name: seconds[name]), "limit_seconds": round(limit, 4),
        "share": round(share, 4), "call_ms_a_step": round(1e3 * model.call(graphs), 4),
        "launches_a_step": sum(model.launches), "goal": goal if case.n == 1 else None,
    }  # fmt: skip


def step_seconds(step: Step, model: Model, card: Card, in_graph: bool = False) -> tuple[str, float]:
    """Name what binds a step, and give its seconds.

    The device goes from launch to launch: products that read the weights, attention that reads the keys, and small
    kernels in between; Python goes ahead of it or not.
    """
    weights = 2 * (model.trunk + model.head)
    multiply = 2.0 * (model.trunk * step.tokens + model.head * step.sampled) / (PRODUCTS * card.products)
    memory = weights / (BYTES * card.bandwidth)
    read = model.key * step.read / (BYTES * card.bandwidth)
    widths = 2.0 * WIDTHS * model.layers * model.width * step.tokens / (BYTES * card.bandwidth)
    starts = model.starts(in_graph)
    seconds = {"bytes": read, "products": 0.0, "latency": 0.0}
    seconds["products" if multiply > memory else "bytes"] += max(multiply, memory)
    seconds["bytes" if widths > starts else "latency"] += max(widths, starts)
    device = sum(seconds.values())
    if model.call(in_graph) > device:
        return "call", model.call(in_graph)
    return max(seconds, key=lambda name: seconds[name]), device
