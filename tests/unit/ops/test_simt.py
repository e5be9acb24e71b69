"""The shim that runs CUDA kernels on the CPU does what CUDA does, and tells where CUDA would hang or fault."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.simt import build

CHECKS = {
    "barrier",
    "missing_barrier_shows",
    "shuffles_and_votes",
    "atomics",
    "dimensions",
    "early_exit",
    "deadlock_is_told",
    "vectors",
    "misaligned_is_told",
    "toolkit_halves",
    "too_many_threads",
}


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.seconds(4)
def test_the_shim_does_what_it_promises(tmp_path: Path) -> None:
    program = build.compile_program(build.HERE / "selftest.cu", tmp_path / "selftest")
    text = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert dict(line.split() for line in text.splitlines()) == dict.fromkeys(CHECKS, "1")
