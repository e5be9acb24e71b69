"""Times each Triton kernel with a few other sizes than those it is launched with, and says what they would gain."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch

from bench import harness
from bench.gpu.steps import Context, _cases, _under

# op -> the module of its kernels, and values of each of its sizes; the first is the one in use.
SIZES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "gae": ("gae", {"BLOCK": (1024, 512, 2048), "WARPS": (4, 8)}),
    "ppo_loss": ("ppo_loss", {"WARPS": (4, 2, 8)}),
    "token_logprobs": ("token_logprobs", {"WARPS": (8, 4, 16)}),
    "full_kl": ("full_kl", {"WARPS": (8, 4, 16)}),
    "sample": ("sample", {"BLOCK": (2048, 1024, 4096), "WARPS": (8, 4, 16)}),
    "paged_attention": ("paged_attention", {"STAGES": (2, 1, 3), "PART": (256, 128, 512)}),
    "kl_estimate": ("kl_estimate", {"BLOCK": (1024, 512, 2048)}),
}


def main(context: Context) -> None:
    found = {bench.op: bench for bench in harness.benches("ops")}
    for op, (name, sizes) in list(SIZES.items())[: 2 if context.short else None]:
        module: Any = importlib.import_module(f"rlhf_fast.kernels.{name}")
        used = {size: getattr(module, size) for size in sizes}
        for size, values in sizes.items():
            assert values[0] == used[size], f"{op}: {size} is {used[size]}, not {values[0]} as bench/gpu/tuning.py says"
        case = _cases(found[op], context)[0]
        call = _under("triton", next(iter(found[op].providers(case, context.device).values())))
        usual, tried = 0.0, []
        for values in list(itertools.product(*sizes.values()))[: 2 if context.rehearse else None]:
            try:
                for size, value in zip(sizes, values, strict=True):
                    setattr(module, size, value)
                call()
                times = sorted(harness.seconds_of(call, context.device) for _ in range(1 if context.rehearse else 9))
            except Exception as error:  # too much shared memory, too many registers: not a value for this card
                print(f"{op} {values}: {type(error).__name__}: {str(error)[:120]}")
                continue
            finally:
                for size, value in used.items():
                    setattr(module, size, value)
            middle = times[len(times) // 2]
            usual = usual or middle
            tried.append({**dict(zip(sizes, values, strict=True)), "milliseconds": 1e3 * middle})
        if not tried:
            raise RuntimeError(f"{op}: no launch succeeded")
        best = min(tried, key=lambda one: one["milliseconds"])
        context.record(
            op=f"tune: {op}", case=str(case), best=best, gain=1e3 * usual / best["milliseconds"], tried=tried
        )
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
