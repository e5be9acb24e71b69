"""The CPU kernels give the same bits with every instruction set that multiplies and adds at once, on any compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlhf_fast.ops import compiled
from tests.cpu import calls

ROOT = Path(__file__).resolve().parents[3]
HERE = ROOT / "tests" / "cpu"
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
FLAGS = ["-std=c++17", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]

pytestmark = pytest.mark.skipif(compiled.cpu is None, reason="rlhf_fast._C was not built")


def isas() -> list[str]:
    return compiled._C.isa_available() if compiled._C is not None else []


def digests(isa: str, program: str = "tests.cpu.calls") -> list[str]:
    """Of all calls, in a process that may use no more than this."""
    environment = {**os.environ, "RLHF_FAST_ISA": isa}
    command = [sys.executable, "-m", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    forced, *lines = done.stdout.split()
    assert forced == isa
    return lines


@pytest.fixture(scope="module")
def own() -> list[str]:
    return [calls.digest(calls.answer(call)) for call in calls.calls()]


def test_same_bits_on_every_isa(own: list[str]) -> None:
    fused = [isa for isa in isas() if isa != "baseline"]
    if not fused:
        pytest.skip("this CPU has nothing but the baseline")
    for isa in fused:
        assert digests(isa) == own, isa


def test_rollouts_have_the_same_bits_on_every_isa() -> None:
    fused = [isa for isa in isas() if isa != "baseline"]
    if len(fused) < 2:
        pytest.skip("this CPU has one instruction set beside the baseline")
    first, *others = (digests(isa, "tests.cpu.rollouts") for isa in fused)
    assert len(first) > 50
    assert all(other == first for other in others)


SUMS = (calls.GAE, calls.PPO_LOSS)  # they add up what may cancel


def test_the_baseline_is_as_right_if_not_the_same() -> None:
    """It rounds a product before adding, so its bits differ; every value must still be close."""
    if "baseline" not in isas():
        pytest.skip("on this platform the baseline is NEON")
    program = (
        "import torch; from tests.cpu import calls\ntorch.save([calls.answer(c) for c in calls.calls()], '/dev/stdout')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "RLHF_FAST_ISA": "baseline"},
        capture_output=True, check=True,
    )  # fmt: skip
    import io

    for call, other in zip(calls.calls(), torch.load(io.BytesIO(done.stdout)), strict=True):
        for mine, its in zip(calls.answer(call), other, strict=True):
            size = float(mine[mine.isfinite()].abs().max()) if call.op in SUMS else 1.0  # it sums up what may cancel
            torch.testing.assert_close(its.float(), mine.float(), rtol=2e-5, atol=2e-5 * max(size, 1.0), equal_nan=True)


def build(compiler: str, *flags: str, source: str = "calls.cpp", others: Sequence[Path] = SOURCES) -> Path:
    """A program of tests/cpu, kept in build/isa as long as what it is made of stays."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, *FLAGS, *flags, str(HERE / source), *map(str, others)]
    state = hashlib.sha256(f"{command} {subprocess.check_output([compiler, '--version'], text=True)}".encode())
    for file in sorted([*(ROOT / "csrc" / "cpu").iterdir(), *(ROOT / "csrc" / "common").iterdir(), HERE / source]):
        state.update(file.read_bytes())
    program = ROOT / "build" / "isa" / f"{compiler}-{Path(source).stem}-{state.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        aside = program.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(aside)], check=True)
        aside.replace(program)
    return program


def outputs_of(command: list[str]) -> list[str]:
    every = list(calls.calls())
    done = subprocess.run(command, input=b"".join(map(calls.encode, every)), capture_output=True, check=True)
    found, start = [], 0
    for call in every:
        end = start + calls.output_size(call)
        found.append(calls.digest(calls.decode(call, done.stdout[start:end])))
        start = end
    assert start == len(done.stdout)
    return found


@pytest.mark.slow
def test_same_bits_on_neon(own: list[str]) -> None:
    """Cross-compiled, and run in an emulator."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-user")
    if isas()[0] == "baseline":
        pytest.skip("nothing here to compare with: the baseline's bits differ")
    program = build("aarch64-linux-gnu-g++", "-O1", "-static", "-w")
    assert outputs_of(["qemu-aarch64", str(program)]) == own


@pytest.mark.slow
def test_same_bits_from_clang(own: list[str]) -> None:
    assert outputs_of([str(build("clang++", "-O1", "-pthread", "-w"))]) == own


@pytest.mark.slow
def test_exp_expm1_and_tanh_are_as_exact_as_they_say() -> None:
    program = build("g++", "-O2", "-w", source="math.cpp", others=[ROOT / "csrc" / "cpu" / "isa.cpp"])
    for isa in isas():
        environment = {**os.environ, "RLHF_FAST_ISA": isa}
        text = subprocess.run([str(program)], env=environment, capture_output=True, text=True, check=True).stdout
        found = dict(line.split() for line in text.splitlines())
        limits = {"exp": 1.2 if isa == "baseline" else 1.0, "expm1": 2.0, "tanh": 4.0, "exp2": 1.0}
        assert all(float(found[name]) <= limit for name, limit in limits.items()), (isa, found)
        assert found["zero"] == found["nan"] == found["ends"] == "1", (isa, found)
