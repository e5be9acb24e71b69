"""Times each Triton kernel with other sizes than its own on this card, and puts those that pay where kernels read them.

    python -m bench.gpu --only tune                                     measures; what is found is in its results
    python -m bench.gpu.tuning --apply RESULTS.json                     puts it into rlhf_fast/kernels/tuned.json
    python -m bench.gpu.tuning --apply RESULTS.json --to SIZES.json     or into a file of your own, for RLHF_FAST_TUNED

Sizes count only if they give, in every case of the op's benchmark, what the kernel's own give. Of those the fastest in
one case is timed again in all cases, in the same rounds as the kernel's own twice over: what its own gain over
themselves is the noise. It is kept if over all cases it gains twice the noise and 3 %, and loses in none more than 2 %
and the noise. Picking the best of several makes luck look like gain, hence the second timing; and other sizes mean
other last bits than on other cards, which less than 3 % would not be worth.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.gpu.plan import Results
from bench.gpu.steps import Context, _cases, _under, _version
from bench.harness import FORWARD, Bench, Call, Case
from rlhf_fast.kernels import launch_sizes
from rlhf_fast.runs.files import write_atomic

# op -> what is tried in place of some of its own sizes; the most valuable ops first, in case the time is over.
CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "token_logprobs": (
        {"WARPS": 16}, {"WARPS": 4}, {"SEGMENT": 4096, "WARPS": 4}, {"SEGMENT": 4096}, {"SEGMENT": 16384, "WARPS": 16},
    ),
    "full_kl": ({"WARPS": 16}, {"SEGMENT": 2048, "WARPS": 4}, {"SEGMENT": 2048}, {"SEGMENT": 8192, "WARPS": 16}),
    "paged_attention": (
        {"STAGES": 3}, {"STAGES": 1}, {"WARPS": 2}, {"WARPS": 8}, {"PART": 128}, {"PART": 512},
        {"STAGES": 3, "WARPS": 2},
    ),
    "gae": ({"WARPS": 8}, {"BLOCK": 512}, {"BLOCK": 2048}, {"BLOCK": 2048, "WARPS": 8}),
    "ppo_loss": ({"WARPS": 8}, {"WARPS": 2}, {"RANGE": 512}, {"RANGE": 2048}, {"RANGE": 2048, "WARPS": 8}),
    "sample": ({"WARPS": 16}, {"WARPS": 4}, {"BLOCK": 1024}, {"BLOCK": 4096}, {"BLOCK": 4096, "WARPS": 16}),
    "sequence_sum": ({"BLOCK": 512}, {"BLOCK": 2048}, {"BLOCK": 512, "WARPS": 2}, {"BLOCK": 2048, "WARPS": 8}),
    "kl_estimate": ({"BLOCK": 512}, {"BLOCK": 2048}, {"BLOCK": 2048, "WARPS": 8}),
    "pair_loss": ({"BLOCK": 64, "WARPS": 2}, {"BLOCK": 128}, {"WARPS": 8}),
}  # fmt: skip
BENCH_OF = {"pair_loss": "dpo_loss"}  # the others have their op's name
# Not timed: what needs more shared memory than any case does, and must run with what is kept.
WIDEST = {"paged_attention": Case("widest heads", (2, 600, 8, 2, 256), torch.float32, FORWARD)}
OWN, AGAIN = "own", "own again"
LEAST_GAIN, MOST_LOSS = 1.03, 0.02
TRIED_AGAIN = 2  # of the fastest

# What an entry of a file of sizes says beside them: where they come from.
KEPT = ("sizes", "gain", "noise", "case", "gains", "date", "commit", "torch", "triton")

Record = dict[str, Any]


# --- measuring --------------------------------------------------------------------------------------------------------


def tune(context: Context) -> None:
    benches = {bench.op: bench for bench in harness.benches("ops")}
    about = {**harness.environment(context.device), "triton": _version("triton")}
    about = {key: about[key] for key in ("date", "commit", "torch", "triton")}
    about |= {"device": launch_sizes.device_name(context.device), "rehearsal": context.rehearse}
    failed = []
    for op, candidates in list(CANDIDATES.items())[: 2 if context.short else None]:
        print(f"{op}: {len(candidates)} beside its own", flush=True)
        some = {_label(one): one for one in candidates[: 1 if context.rehearse else None]}
        try:
            tuned = tune_op(op, benches[BENCH_OF.get(op, op)], some, context)
        except Exception as error:  # the others are tuned all the same
            failed.append(f"{op}: {type(error).__name__}: {str(error)[:200]}")
            print(failed[-1], flush=True)
            continue
        context.record(op=f"tune: {op}", **tuned, **about)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"{len(failed)} failed, the first: {failed[0]}")


def _label(changes: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items())


def tune_op(op: str, bench: Bench, candidates: dict[str, dict[str, int]], context: Context) -> Record:
    """The sizes to be kept (None: its own), what they gain, and what became of each candidate."""
    cases, refused = _cases(bench, context, rows=2), dict[str, str]()
    case = next((one for one in cases if one.mode != FORWARD), cases[0])  # one that runs all kernels
    right = _right(op, bench, case, {OWN: {}, **candidates}, context, refused)
    usual = {label: statistics.median(times) for label, times in _times(right, context).items()}
    # A rehearsal, which is about the way and not about times, takes everything for faster.
    enough = usual[OWN] / LEAST_GAIN if not context.rehearse else math.inf
    faster = sorted(
        (label for label in usual if label != OWN and usual[label] < enough), key=lambda label: usual[label]
    )
    kept: Record = {"sizes": None, "gain": 1.0}
    for label in faster[:TRIED_AGAIN]:
        changes = candidates[label]
        gains, noises = _against_own(op, bench, cases, label, changes, context, refused)
        if label in refused:
            continue
        gain, noise = statistics.geometric_mean(gains.values()), statistics.geometric_mean(noises.values())
        if pays(list(gains.values()), list(noises.values())):
            kept = {"sizes": {**launch_sizes.OWN[op], **changes}, "gain": gain, "noise": noise, "gains": gains}
            break
        refused[label] = (
            f"{gain:.3f} times as fast over all cases, {min(gains.values()):.3f} at worst; noise {noise:.3f}"
        )
    milliseconds = {label: 1e3 * seconds for label, seconds in usual.items()}
    return {"case": str(case), **kept, "milliseconds_of": milliseconds, "refused": refused}


def _against_own(
    op: str,
    bench: Bench,
    cases: Sequence[Case],
    label: str,
    changes: dict[str, int],
    context: Context,
    refused: dict[str, str],
) -> tuple[dict[str, float], dict[str, float]]:
    """case -> how many times as fast as its own, and the same of its own beside itself, whichever is faster."""
    gains, noises = {}, {}
    if op in WIDEST:
        _right(op, bench, WIDEST[op], {OWN: {}, label: changes}, context, refused)
    for case in cases:
        right = _right(op, bench, case, {OWN: {}, AGAIN: {}, label: changes}, context, refused)
        if label in refused:
            break
        times = _times(right, context)
        gains[str(case)] = _ratio(times[OWN], times[label])
        again = _ratio(times[OWN], times[AGAIN])
        noises[str(case)] = max(again, 1 / again)
    return gains, noises


def pays(gains: Sequence[float], noises: Sequence[float]) -> bool:
    """Return whether sizes that are so many times as fast, case by case, are worth keeping, given the noise."""
    gain, noise = (statistics.mean(map(math.log, ratios)) for ratios in (gains, noises))
    no_loss = all(one * of_noise >= 1 - MOST_LOSS for one, of_noise in zip(gains, noises, strict=True))
    return gain >= max(math.log(LEAST_GAIN), 2 * noise) and no_loss


def _ratio(own: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(own, others, strict=True))


def _right(
    op: str,
    bench: Bench,
    case: Case,
    settings: dict[str, dict[str, int]],
    context: Context,
    refused: dict[str, str],
) -> dict[str, Call]:
    """A call with each of the settings whose results are those of its own sizes; why not, of the others, to refused."""
    plain = _under("triton", next(iter(bench.providers(case, context.device).values())))
    calls = {label: _with(op, changes, context.device, plain) for label, changes in settings.items()}
    own = calls[OWN]()
    for label in settings:
        try:
            wrong = "" if label == OWN else difference(calls[label](), own)
        except Exception as error:  # too much shared memory, too many registers: no sizes for this card
            wrong = f"{type(error).__name__}: {str(error)[:120]}"
        if wrong:
            refused[label] = f"{case}: {wrong}"
            print(f"{op} {label}: {refused[label]}", flush=True)
            del calls[label]
    return calls


def _with(op: str, changes: dict[str, int], device: torch.device, call: Call) -> Call:
    def run() -> Any:
        with launch_sizes.trying(op, device, changes):
            return call()

    return run


def difference(results: Sequence[Tensor], own: Sequence[Tensor]) -> str:
    """Say where results differ by more than another order of adding explains; empty if they do not."""
    for i, (mine, its) in enumerate(zip(results, own, strict=True)):
        if mine.shape != its.shape or mine.dtype != its.dtype:
            return f"result {i} is {tuple(mine.shape)} of {mine.dtype}, expected {tuple(its.shape)} of {its.dtype}"
        tolerance = 0.0 if not its.is_floating_point() else 2e-5 if its.dtype.itemsize >= 4 else 1e-2
        parts = list(zip(mine.detach().flatten().split(1 << 26), its.detach().flatten().split(1 << 26), strict=True))
        scale = max(
            (float(b.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) for _, b in parts if b.numel()), default=0.0
        )
        for a, b in parts:
            near = torch.isclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
            if not near.all():
                return f"result {i} has {int((~near).sum())} values that are not those of its own sizes"
    return ""


def _times(calls: dict[str, Call], context: Context) -> dict[str, list[float]]:
    if context.rehearse:
        return {label: [harness.seconds_of(call, context.device)] for label, call in calls.items()}
    return harness.interleaved(calls, context.device, seconds=0.4, short=False)


# --- putting it where kernels read it ---------------------------------------------------------------------------------


def apply(results: Path, to: Path) -> dict[str, float]:
    """Put the sizes that a run has found into a file of sizes, in place of what it has for that card; op -> gain.

    An op for which the run found nothing better than its own sizes is taken out; one that it did not come to stays.
    ValueError if the results hold no tuning, are a rehearsal's and meant for the package, or are no sizes.
    """
    records = [one for one in Results.read(results).records if one["op"].startswith("tune: ") and "sizes" in one]
    if not records:
        raise ValueError(f"{results}: no sizes were measured in this run; python -m bench.gpu --only tune does")
    if to.resolve() == launch_sizes.TUNED.resolve() and any(one["rehearsal"] for one in records):
        raise ValueError(f"{results}: a rehearsal has measured no GPU; only --to FILE takes what it found")
    content, gains = launch_sizes.read(to) if to.exists() else {}, {}
    for one in records:
        op, of_device = one["op"].removeprefix("tune: "), content.setdefault(one["device"], {})
        of_device.pop(op, None)
        if one["sizes"] is not None:
            of_device[op] = {key: one[key] for key in KEPT}
            gains[op] = one["gain"]
    content = {device: ops for device, ops in content.items() if ops}
    launch_sizes.check(content, str(results))
    write_atomic(to, json.dumps(content, indent=1, sort_keys=True) + "\n")
    return gains


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.gpu.tuning", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--apply", type=Path, required=True, metavar="RESULTS.json", help="of python -m bench.gpu")
    parser.add_argument(
        "--to", type=Path, default=launch_sizes.TUNED, metavar="SIZES.json", help="default: the package's"
    )
    given = parser.parse_args(words)
    try:
        gains = apply(given.apply, given.to)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for op, gain in gains.items():
        print(f"{op:16} {gain:.2f} times as fast as with its own sizes")
    print(f"sizes of {len(gains)} ops written to {given.to}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
