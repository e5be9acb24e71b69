"""Times ops beside their peers: correct first, then interleaved in one process, medians, and beside what is possible.

A file bench/ops/bench_<op>.py says what to time and moves no clock itself: `BENCH = Bench(...)`. `rlhf-fast bench ops`
runs them all, prints a table and writes one JSON line a result; `pytest bench/ops` gives pytest-benchmark's statistics.

What is timed is a call as a user makes it, its results allocated anew. Limits come from bandwidth and product rate
measured in the same run: absolute times on a shared machine mean little, ratios in one run do.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.machine import product_rate
from rlhf_fast.ops import compiled, dispatch

try:
    from tqdm import tqdm
except ImportError:  # what runs on a GPU needs torch and no more
    tqdm = None

ROOT = Path(__file__).resolve().parents[1]
FORWARD, BOTH = "forward", "forward+backward"
Call = Callable[[], Sequence[Tensor]]  # returns outputs, and gradients where there are any


@dataclass(frozen=True)
class Case:
    """Shape and mode at which every provider is timed."""

    profile: str  # which model or use has this shape
    shape: tuple[int, ...]
    dtype: torch.dtype
    mode: str  # FORWARD or BOTH

    def __str__(self) -> str:
        sizes = " x ".join(map(str, self.shape))
        return f"{sizes} {str(self.dtype).removeprefix('torch.')} {self.mode} ({self.profile})"


@dataclass(frozen=True)
class Work:
    """The least that must be done: bytes only read, bytes read and written at the pace of a copy, and operations."""

    read: int = 0
    copied: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Bench:
    """An op's benchmark.

    ``providers(case, device)`` makes the inputs and returns name -> call. The first is ours, and ``truth`` names the
    one that all others are held against before anything is timed. ``tolerance`` is relative to its largest value.
    """

    op: str
    cases: Sequence[Case]
    gpu_cases: Sequence[Case]
    providers: Callable[[Case, torch.device], dict[str, Call]]
    truth: str
    work: Callable[[Case], Work]
    tolerance: Callable[[Case], float] = lambda case: 2e-5 if case.dtype == torch.float32 else 2e-2


@dataclass(frozen=True)
class Rates:
    """Rates of this machine, measured here and now."""

    read: float  # bytes a second of a sum over much memory
    copy: float  # bytes a second, read and written, of a copy into memory that was there
    product: float  # float32 operations a second of a matrix product

    def seconds(self, work: Work) -> float:
        return max(work.read / self.read + work.copied / self.copy, work.operations / self.product)


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], device: torch.device, short: bool = False) -> float:
    """Time one call, from its start to the end of its work; its results are freed after the clock stops.

    On a GPU its caches hold something else before. On a CPU a short call comes after one of its own: after a
    peer's, what that left to write back and an interpreter out of the caches, 0.2 ms, would be most of its time.
    """
    if device.type == "cuda":
        flush_l2(device)
        torch.cuda.synchronize(device)
    elif short:
        call()
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    end = time.perf_counter()
    del result
    return end - start


_elsewhere: dict[torch.device, Tensor] = {}


def flush_l2(device: torch.device) -> None:
    if device not in _elsewhere:
        _elsewhere[device] = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    _elsewhere[device].zero_()


def rates(device: torch.device) -> Rates:
    size = 1 << (28 if device.type == "cuda" else 26)
    x, y = torch.zeros(size, device=device), torch.zeros(size, device=device)
    return Rates(
        read=x.nbytes / _usual(lambda: x.sum(), device),
        copy=2 * x.nbytes / _usual(lambda: y.copy_(x), device),
        product=product_rate(device, torch.float32),
    )


def _usual(call: Callable[[], Any], device: torch.device) -> float:
    return statistics.median(seconds_of(call, device) for _ in range(9))


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that a call holds beyond what was held before it, its results included; None if unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    compiled.release_memory()  # what is kept for the next results is part of what these need
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
        before = status("VmRSS")
        call()
        return max(status("VmHWM") - before, 0)
    except (OSError, TypeError):  # not Linux
        return None


def status(key: str) -> int:
    """Bytes of resident pages, now (VmRSS) or at most so far (VmHWM); OSError where there is no /proc."""
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def check(bench: Bench, case: Case, providers: dict[str, Call]) -> list[str]:
    """Names of the providers whose results are those of the truth; the others are told of and left out."""
    truth = [x.detach().double() for x in providers[bench.truth]()]
    right = []
    for name, call in providers.items():
        try:
            results = call()
        except Exception as error:
            _tell(f"  {name}: left out, {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
            continue
        wrong = [
            f"result {i} is {float(off):.1e} off"
            for i, (mine, exact) in enumerate(zip(results, truth, strict=False))
            if (off := (mine.detach().double() - exact).abs().max() / exact.abs().max()) > bench.tolerance(case)
            or mine.isnan().any()
        ]
        if wrong:
            _tell(f"  {name}: left out, {'; '.join(wrong)}")
        else:
            right.append(name)
    return right


def _tell(text: str) -> None:
    if tqdm is None:
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.write(text, sys.stderr)  # above the bar


def interleaved(
    providers: dict[str, Call], device: torch.device, seconds: float, short: bool, least: int = 5
) -> dict[str, list[float]]:
    """Times of each, in rounds that each begin with another one; as many rounds as fit, between `least` and 100."""
    names = list(providers)
    warm = {name: min(seconds_of(providers[name], device, short) for _ in range(2)) for name in names}
    rounds = min(max(int(seconds / max(sum(warm.values()), 1e-9)), least), 100)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            times[name].append(seconds_of(providers[name], device, short))
    return times


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Measurement of one provider in one case."""

    op: str
    case: str
    provider: str
    milliseconds: float  # median
    low: float  # quartiles
    high: float
    rounds: int
    limit: float  # milliseconds, see Work
    peak_mib: float | None
    speedup: float  # of ours over this one: the median of the ratios within a round

    @property
    def fraction(self) -> float:
        return self.limit / self.milliseconds


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what a figure depends on: device, versions, commit."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "isa": None if compiled._C is None else compiled._C.isa(),
        "compiler": None if compiled._C is None else compiled._C.build_info()["compiler"],
        "backend": dispatch.choose("token_logprobs", dispatch.KNOWN, torch.empty(0, device=device)),
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    return match[1] if match else platform.processor()


def run_case(
    bench: Bench, case: Case, device: torch.device, measured: Rates, seconds: float, least: int = 5
) -> list[Result]:
    torch._dynamo.reset()  # else compiled peers would fall back to eager after a few shapes
    providers = bench.providers(case, device)
    ours = next(iter(providers))
    names = check(bench, case, providers)
    if ours not in names:
        raise RuntimeError(f"{bench.op}: {ours!r} does not give the right result for {case}; nothing was timed")
    chosen = {name: providers[name] for name in names}
    work = bench.work(case)
    short = work.read + work.copied < 64 << 20 and work.operations < 1 << 30
    times = interleaved(chosen, device, seconds, short, least)
    peaks = {name: peak_bytes(call, device) for name, call in chosen.items()}
    results = []
    for name in names:
        quartiles = statistics.quantiles(times[name], n=4)
        ratios = [its / mine for its, mine in zip(times[name], times[ours], strict=True)]
        peak = peaks[name]
        results.append(
            Result(
                bench.op, str(case), name, 1e3 * statistics.median(times[name]), 1e3 * quartiles[0],
                1e3 * quartiles[2], len(times[name]), 1e3 * measured.seconds(work),
                None if peak is None else peak / 2**20, statistics.median(ratios),
            )
        )  # fmt: skip
    return results


def benches(suite: str, only: str = "") -> list[Bench]:
    """The benches of a suite, or only that of one op."""
    suites = sorted({file.parent.name for file in (ROOT / "bench").glob("*/bench_*.py")})
    if suite not in suites:
        raise ValueError(f"bench: no suite {suite!r}; there is {', '.join(suites)}")
    names = sorted(file.stem.removeprefix("bench_") for file in (ROOT / "bench" / suite).glob("bench_*.py"))
    if only and only not in names:
        raise ValueError(f"op: no benchmark of {only!r}; there are {', '.join(names)}")
    wanted = [name for name in names if not only or name == only]
    benches: list[Bench] = [importlib.import_module(f"bench.{suite}.bench_{name}").BENCH for name in wanted]
    return benches


def run_suite(suite: str, only: str, seconds: float, out: Path) -> list[Result]:
    """Run a suite on the GPU, if there is one, else on the CPU; print a table and write the records to ``out``.

    Records that ``out`` holds of ops that were not run stay.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = [
        (bench, case)
        for bench in benches(suite, only)
        for case in (bench.gpu_cases if device.type == "cuda" else bench.cases)
    ]
    about, measured = environment(device), rates(device)
    print(
        f"{about['device']}, {about['threads']} threads, isa {about['isa']}, torch {about['torch']}, {about['commit']}"
    )
    print(
        f"reads {measured.read / 1e9:.1f} GB/s, copies {measured.copy / 1e9:.1f} GB/s (read + written), "
        f"multiplies {measured.product / 1e9:.0f} GFLOP/s"
    )
    results: list[Result] = []
    for bench, case in tqdm(work, desc="bench", unit="case", disable=None):
        timed = run_case(bench, case, device, measured, seconds)
        tqdm.write(f"\n{bench.op}  {case}, limit {timed[0].limit:.3g} ms")
        for line in table(timed):
            tqdm.write(line)
        results += timed
    records = [
        {**dataclasses.asdict(result), **about, "rates": dataclasses.asdict(measured)} for result in results
    ]  # fmt: skip
    write_records(records, out)
    print(f"\n{len(results)} results written to {out}")
    return results


def write_records(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Put the records into a file, one JSON line each, in place of what it held of the same ops."""
    ran = {record["op"] for record in records}
    before = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    merged = sorted([r for r in before if r["op"] not in ran] + list(records), key=lambda r: r["op"])
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".new")
    aside.write_text("".join(json.dumps(record) + "\n" for record in merged), encoding="utf-8")
    aside.replace(out)


def table(results: Sequence[Result]) -> Iterator[str]:
    for one in results:
        peak = "" if one.peak_mib is None else f"{one.peak_mib:8.0f} MiB"
        yield (
            f"  {one.provider:28} {one.milliseconds:10.3f} ms [{one.low:.3g}, {one.high:.3g}] "
            f"{100 * one.fraction:4.0f} % of the limit {peak}   {one.speedup:6.2f} x ours"
        )


def default_out(suite: str) -> Path:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{suite}-{slug}.jsonl"


# --- what benches share -----------------------------------------------------------------------------------------------


def with_gradients(op: Callable[..., Any], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> Call:
    """op(*leaves) and the gradients of its outputs in the leaves."""

    def call() -> list[Tensor]:
        outputs = op(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    return call


def without_gradients(op: Callable[..., Any], inputs: Sequence[Tensor]) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            outputs = op(*inputs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return call


def calls(
    case: Case, ops: dict[str, Callable[..., Any]], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> dict[str, Call]:
    """Prepare each op's call, with or without gradients as the case has it."""
    if case.mode == FORWARD:
        return {name: without_gradients(op, inputs) for name, op in ops.items()}
    leaves = [x.detach().requires_grad_() for x in inputs]
    return {name: with_gradients(op, leaves, upstream) for name, op in ops.items()}


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
