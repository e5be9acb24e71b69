"""The verb bench: times ops or rollouts, from a checkout."""

from __future__ import annotations

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


def run(command: BenchCommand) -> None:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "bench" / "harness.py").is_file():
        raise RuntimeError(
            "the benchmarks are no part of an installed package; run this from a checkout: pip install -e ."
        )
    sys.path.insert(0, str(checkout))
    from bench import harness

    out = Path(command.out) if command.out else harness.default_out(command.suite)
    if command.suite == "rollout":
        from bench.rollout import run as rollouts

        return rollouts.main(command.op, out)
    if command.suite == "report":
        from bench.gpu import report

        page = checkout / "docs" / "performance.md"
        found = report.merge(checkout / "bench" / "results", page)
        report.put_predictions(page)
        print(f"{len(found)} runs on GPUs put into {page}")
        return None
    harness.run_suite(command.suite, command.op, command.seconds, out)
