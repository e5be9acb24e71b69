"""The verb bench: times ops or rollouts in a process of its own, from a checkout."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BenchCommand:
    """Time `ops` or `rollout` beside their peers and beside what this machine allows; needs a checkout.

    `report` times nothing: it puts the results of `make gpu` into docs/performance.md.
    """

    suite: str = "ops"  # what to time: ops, or rollout; or report
    op: str = ""  # only this op, or this case of rollouts; empty: all
    seconds: float = 10.0  # of timing each case, in rounds of all peers; 5 to 100 rounds
    out: str = ""  # JSON Lines, one a result; empty: bench/results/SUITE-DEVICE.jsonl


def run(command: BenchCommand) -> int:
    """Run `python -m bench` in the checkout that this package is of, and return its exit code."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "bench" / "__main__.py").is_file():
        raise RuntimeError(
            "the benchmarks come with a checkout, not with an installed package: clone the repository, and in it run "
            "pip install -e . and then rlhf-fast bench again"
        )
    words = [command.suite, f"--op={command.op}", f"--seconds={command.seconds}"]
    words += [f"--out={Path(command.out).absolute()}"] if command.out else []
    return subprocess.run([sys.executable, "-m", "bench", *words], cwd=checkout).returncode
