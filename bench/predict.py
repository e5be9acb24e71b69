"""`python -m bench.predict`: what each GPU kernel should take on cards that nobody here has, and what binds it.

From the machine code (bench/results/static.json) and the cards' data sheets: a kernel takes as long as its bytes at
nine tenths of the memory's rate, its instructions at 4 warps a cycle and multiprocessor, its special functions
(exponentials, logarithms) at 16 a cycle, or a launch, whichever is longest. Written to bench/results/predicted.json
before any of it has been measured, so that the first run on such a card tests the model as well; `python -m bench.gpu`
sets both side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import harness, static
from bench.harness import Case

OUT = Path(__file__).resolve().parent / "results" / "predicted.json"
LAUNCH = 5e-6  # seconds from one kernel to the next that waits for it, with what a small one needs to drain


@dataclass(frozen=True)
class Card:
    target: int
    multiprocessors: int
    clock: float  # Hz, as it holds under load
    bandwidth: float  # bytes a second


CARDS = {
    "A100": Card(80, 108, 1.41e9, 2.04e12),
    "H100": Card(90, 132, 1.70e9, 3.35e12),
    "H200": Card(90, 132, 1.70e9, 4.80e12),
    "B200": Card(100, 148, 1.85e9, 8.00e12),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel's work for each element: bytes of inputs and results, and special functions."""

    name: str
    inputs: int  # that have the dtype of the op's inputs, read or written
    floats: int  # that are float32 whatever that is
    flags: int = 0  # bytes of masks
    special: float = 0.0


# (op, mode, what of the case's name or "") -> the kernels that one call launches over its elements
KERNELS: dict[tuple[str, str, str], tuple[Kernel, ...]] = {
    ("token_logprobs", "forward", ""): (Kernel("update", 1, 0, special=1),),
    ("token_logprobs", "forward+backward", ""): (
        Kernel("update", 1, 0, special=1), Kernel("gradient", 2, 0, special=1),
    ),
    ("full_kl", "forward", "kl"): (Kernel("states", 2, 0, special=2),),
    ("full_kl", "forward+backward", "kl"): (Kernel("states", 2, 0, special=2), Kernel("gradient", 4, 0, special=2)),
    ("full_kl", "forward", "js"): (Kernel("js_states", 2, 0, special=3),),
    ("full_kl", "forward+backward", "js"): (Kernel("js_states", 2, 0, special=3), Kernel("gradient", 4, 0, special=4)),
    ("kl_estimate", "forward", ""): (Kernel("forward", 2, 1, special=1),),
    ("kl_estimate", "forward+backward", ""): (
        Kernel("forward", 2, 1, special=1), Kernel("gradient", 4, 1, special=1),
    ),
    ("gae", "forward", ""): (Kernel("forward", 2, 2),),
    ("ppo_loss", "forward+backward", ""): (Kernel("forward", 6, 2, flags=1, special=2),),
}  # fmt: skip


def instructions(table: list[dict[str, Any]]) -> dict[tuple[str, str, str, str, int], float]:
    """(op, kernel, backend, variant, target) -> instructions for each element."""
    return {
        (one["op"], one["kernel"], one["backend"], one["variant"], one["target"]): one["instructions"] / one["elements"]
        for one in table
    }


def predictions() -> Iterator[dict[str, Any]]:
    needs = instructions(json.loads(static.RESULTS.read_text(encoding="utf-8"))["kernels"])
    benches = {bench.op: bench for bench in harness.benches("ops")}
    for (op, mode, part), kernels in KERNELS.items():
        for case in benches[op].gpu_cases:
            if case.mode != mode or (part and part not in case.profile.split(", ")):
                continue
            for backend in ("cuda", "triton"):
                for name, card in CARDS.items():
                    each = [_time(needs, op, kernel, backend, case, card) for kernel in kernels]
                    yield {
                        "card": name, "op": op, "case": str(case), "backend": backend,
                        "milliseconds": round(sum(one["milliseconds"] for one in each), 5), "kernels": each,
                    }  # fmt: skip


def _time(needs: dict[Any, float], op: str, kernel: Kernel, backend: str, case: Case, card: Card) -> dict[str, Any]:
    elements = math.prod(case.shape)
    dtype = str(case.dtype).removeprefix("torch.")
    own = [key for key in needs if key[:3] == (op, kernel.name, backend) and key[4] == card.target]
    fitting = [key for key in own if _fits(key[3], dtype, case)]
    per_element = needs[min(fitting, key=lambda key: ("identity" not in key[3], len(key[3])))]
    size = kernel.inputs * case.dtype.itemsize + 4 * kernel.floats + kernel.flags
    seconds = {
        "bytes": elements * size / (0.9 * card.bandwidth),
        "instructions": elements * per_element / (card.multiprocessors * 128 * card.clock),
        "special functions": elements * kernel.special / (card.multiprocessors * 16 * card.clock),
        "latency": LAUNCH,
    }
    binds = max(seconds, key=lambda name: seconds[name])
    return {
        "kernel": kernel.name, "binds": binds, "milliseconds": 1e3 * seconds[binds],
        "bounds_ms": {name: round(1e3 * value, 5) for name, value in seconds.items()},
    }  # fmt: skip


def _fits(variant: str, dtype: str, case: Case) -> bool:
    """A kernel of this dtype and, where there are two, this divergence."""
    words = variant.split(", ")
    if words[0] != dtype:
        return False
    kinds = {"kl", "js"} & set(words)
    return not kinds or bool(kinds & set(case.profile.split(", ")))


def main() -> None:
    found = list(predictions())
    aside = OUT.with_name(OUT.name + ".new")
    lines = ",\n".join(json.dumps(one) for one in found)
    aside.write_text(f'{{"predictions": [\n{lines}\n]}}\n', encoding="utf-8")
    aside.replace(OUT)
    for one in found:
        binds = ", ".join(f"{each['kernel']}: {each['binds']}" for each in one["kernels"])
        print(
            f"{one['card']:5} {one['op']:16} {one['case']:60} {one['backend']:7} {one['milliseconds']:8.4f} ms  {binds}"
        )
    print(f"{len(found)} predictions written to {OUT}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
