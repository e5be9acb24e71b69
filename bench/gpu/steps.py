"""The steps of `python -m bench.gpu`, each run as `python -m bench.gpu.steps NAME` in a process of its own.

A step appends its records, one JSON object a line, to the file named in BENCH_RECORDS as it finds them: what is there
when it crashes or its time is over is kept. The exit code is 77 where something that it needs is not here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.gpu.plan import ROOT, SKIPPED, python
from rlhf_fast import ops
from rlhf_fast.machine import product_rate
from rlhf_fast.ops import compiled, dispatch

ROWS, WIDTH = 8, 96  # at most, of a rehearsal's shapes
# Most valuable first: when the time is over, the rest is left out.
ORDER = (
    "token_logprobs", "linear_ppo_loss", "gae", "ppo_loss", "full_kl", "linear_token_logprobs", "paged_attention",
    "sample", "linear_cross_entropy", "cross_entropy", "kl_estimate", "dpo_loss", "reward_loss", "group_advantages",
    "sequence_sum",
)  # fmt: skip


class Skip(Exception):
    """Signal that something a step needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Context:
    rehearse: bool
    short: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def record(self, **values: Any) -> None:
        with Path(os.environ["BENCH_RECORDS"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        print(json.dumps(values), flush=True)


def needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)}: not installed")


# --- what this card allows --------------------------------------------------------------------------------------------


def machine(context: Context) -> None:
    """Versions, and the rates that all limits are reckoned with."""
    device = context.device
    versions = {name: _version(name) for name in ("triton", "transformers", "peft", "flash_attn", "vllm", "trl")}
    rates = dataclasses.asdict(harness.rates(device))
    rates["product_bf16"] = product_rate(device, torch.bfloat16)
    context.record(op="machine", **harness.environment(device), **versions, rates=rates)
    if shutil.which("nvidia-smi") and not context.rehearse:
        asked = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
        subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], check=False)


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name.replace("_", "-"))
    return "unknown"


def build(context: Context) -> None:
    """The CUDA C++ for this card; in a rehearsal the same files for the CPU."""
    started = time.monotonic()
    if context.rehearse:
        from tests.simt import build as simt

        if (reason := simt.missing()) is not None:
            raise Skip(reason)
        simt.module()
        return context.record(op="build", case="tests/simt", seconds=time.monotonic() - started)
    if compiled.cuda is not None:
        return context.record(op="build", case="prebuilt", seconds=0.0, **compiled._C.build_info())
    needs("pybind11", "setuptools")
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        raise Skip("nvcc was not found, and rlhf_fast._C is not built: the CUDA C++ is left out, Triton runs")
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "RLHF_FAST_CUDA_ARCHS": f"{major}{minor}"}
    subprocess.run(python("setup.py", "build_ext", "--inplace"), cwd=ROOT, env=environment, check=True)
    context.record(op="build", case=f"sm_{major}{minor}", seconds=time.monotonic() - started)


# --- is it right? -----------------------------------------------------------------------------------------------------


def tests(context: Context) -> None:
    """Test every op on every backend on this device, and generation with CUDA graphs."""
    needs("pytest")
    words = ["tests/unit/ops", "-m", "gpu"]
    if context.rehearse:
        some = ["gae", "sample"]
        if not context.short:
            some += ["kl_estimate", "token_logprobs", "ppo_loss_kernels"]
        which = "(values or likeliest or worse or same_bits) and (triton or cuda)"
        words = [*(f"tests/unit/ops/test_{name}.py" for name in some), "-k", which]
    _pytest(context, "tests", python("-m", "pytest"), words)
    if not context.rehearse and all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        of_rollouts = ["tests/unit/rollout/test_graphs.py", "-m", "gpu"]
        _pytest(context, "tests of rollouts", python("-m", "pytest"), of_rollouts)


def sanitizer(context: Context) -> None:
    """Invalid accesses and races of the CUDA C++, on small shapes."""
    needs("pytest")
    if shutil.which("compute-sanitizer") is None:
        raise Skip("compute-sanitizer was not found: races and invalid accesses were not looked for")
    if context.rehearse:
        raise Skip("compute-sanitizer needs a GPU")
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *python("-m", "pytest")]
        words = ["tests/unit/ops", "-x", "-m", "gpu", "-k", "values and cuda"]
        _pytest(context, f"compute-sanitizer {tool}", command, words)


def _pytest(context: Context, case: str, command: list[str], words: list[str]) -> None:
    file = Path(os.environ["BENCH_RECORDS"]).with_suffix(".xml")
    done = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", "--maxfail=25", f"--junitxml={file}", *words], cwd=ROOT
    )
    if not file.exists():
        raise RuntimeError(f"{case}: pytest ended with code {done.returncode} and no results")
    counts: dict[str, dict[str, int]] = {}
    for one in ElementTree.parse(file).iter("testcase"):
        bad = any(one.find(kind) is not None for kind in ("failure", "error"))
        kind = "failed" if bad else "skipped" if one.find("skipped") is not None else "passed"
        of = counts.setdefault(one.get("classname", "").rpartition(".")[2].removeprefix("test_"), {})
        of[kind] = of.get(kind, 0) + 1
    for name, of in counts.items():
        context.record(**{"op": f"{case}: {name}", "case": case, "passed": 0, "failed": 0, "skipped": 0, **of})
    if not any(of.get("passed") for of in counts.values()):
        raise RuntimeError(f"{case}: no test passed")
    if done.returncode:
        raise RuntimeError(f"{case}: pytest ended with code {done.returncode}")


# --- how fast is it? --------------------------------------------------------------------------------------------------


def ops_step(context: Context) -> None:
    """Time every op at the shapes that people train at, each backend of ours beside eager and torch.compile."""
    device = context.device
    if context.rehearse:
        _kernels_on_the_cpu()
    about, rates = harness.environment(device), harness.rates(device)
    known = {bench.op: bench for bench in harness.benches("ops")}
    wanted = [known[name] for name in (ORDER[:3] if context.short else ORDER)]
    failed = []
    for bench in wanted:
        for case in _cases(bench, context):
            torch.manual_seed(0)
            each = dataclasses.replace(bench, providers=_by_backend(bench, context))
            print(f"{bench.op}  {case}", flush=True)
            try:
                seconds, least = (0.0, 2) if context.rehearse else (0.5, 5)
                results = harness.run_case(each, case, device, rates, seconds, least)
            except Exception as error:  # the others are timed all the same
                failed.append(f"{bench.op} {case}: {type(error).__name__}: {str(error)[:200]}")
                print(failed[-1], flush=True)
                continue
            for line in harness.table(results):
                print(line, flush=True)
            for result in results:
                context.record(**dataclasses.asdict(result), **about, rates=dataclasses.asdict(rates))
    if failed:
        raise RuntimeError(f"{len(failed)} failed, the first: {failed[0]}")


def _cases(bench: harness.Bench, context: Context, rows: int = ROWS) -> list[harness.Case]:
    if not context.rehearse:
        return list(bench.gpu_cases)
    tiny = {(one.dtype, one.mode): one for one in bench.gpu_cases}  # one for each kind of kernel
    return [
        dataclasses.replace(one, shape=(min(one.shape[0], rows), *(min(n, WIDTH) for n in one.shape[1:])))
        for one in tiny.values()
    ]


Providers = Callable[[harness.Case, torch.device], dict[str, harness.Call]]


def _by_backend(bench: harness.Bench, context: Context) -> Providers:
    """List ours once for each backend that has the op, then the others."""

    def providers(case: harness.Case, device: torch.device) -> dict[str, harness.Call]:
        every = bench.providers(case, device)
        name, ours = next(iter(every.items()))
        by_backend: dict[str, harness.Call] = {}
        for backend in ("cuda", "triton"):
            if backend not in dispatch.MISSING:
                with contextlib.suppress(RuntimeError):
                    _under(backend, ours)()
                    by_backend[f"{name}, {backend}"] = _under(backend, ours)
        others = {key: call for key, call in every.items() if key != name}
        if context.rehearse:  # nothing is learnt from compiling for the CPU, which takes most of the time
            others = {key: call for key, call in others.items() if "compile" not in key}
        return {**(by_backend or {name: ours}), **others}

    return providers


def _under(backend: str, call: harness.Call) -> harness.Call:
    def run() -> Any:
        with ops.use_backend(backend):
            return call()

    return run


def _kernels_on_the_cpu() -> None:
    """Triton's interpreter takes CPU tensors by itself; the CUDA C++ does where tests/simt can be built."""
    from tests.simt import build as simt

    if simt.missing() is None:
        compiled.cuda = simt.module().cuda
        dispatch.RUNS_ON["cuda"] = ("cpu",)
        dispatch.MISSING.pop("cuda", None)


# --- generation and training ------------------------------------------------------------------------------------------


def rollouts(context: Context) -> None:
    """The generator over random weights of real shapes: flat, with nano-vllm's lengths, and in groups."""
    needs("transformers", "peft")
    from bench.gpu import training

    training.rollouts(context)


def ppo(context: Context) -> None:
    """Steps of PPO with adapters over random weights of real shapes."""
    needs("transformers", "peft")
    from bench.gpu import training

    training.ppo(context)


# --- tuning -----------------------------------------------------------------------------------------------------------


def tune(context: Context) -> None:
    """The few sizes that the Triton kernels are launched with: those that would pay on this card."""
    needs("triton")
    from bench.gpu import tuning

    tuning.tune(context)


STEPS: dict[str, Callable[[Context], None]] = {
    "machine": machine,
    "build": build,
    "tests": tests,
    "ops": ops_step,
    "rollouts": rollouts,
    "ppo": ppo,
    "sanitizer": sanitizer,
    "tune": tune,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args()
    try:
        STEPS[given.name](Context(given.rehearse, given.short))
    except Skip as reason:
        print(reason, flush=True)
        return SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
