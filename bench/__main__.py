"""Run a suite of benchmarks: `python -m bench ops --op gae`, the process that `rlhf-fast bench` starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import harness
from rlhf_fast.cli import errors


def main(words: Sequence[str]) -> int:
    """Time a suite; return the exit code, of which an error has one line on stderr, a fault its traceback too."""
    parser = argparse.ArgumentParser("python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", help="ops, or rollout; or report, which puts results of GPUs into docs/performance.md")
    parser.add_argument("--op", default="", help="only this op, or this case of rollouts")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing each case")
    parser.add_argument("--out", type=Path, help="JSON Lines; without it bench/results/SUITE-DEVICE.jsonl")
    given = parser.parse_args(words)
    try:
        run(given.suite, given.op, given.seconds, given.out)
    except Exception as error:
        message, code = errors.explained(error, "bench")
        if code == errors.FAULT:
            errors.show_traceback(error)
        errors.say(message)
        return code
    return 0


def run(suite: str, op: str, seconds: float, out: Path | None) -> None:
    if suite == "report":
        from bench.gpu import report

        page = harness.ROOT / "docs" / "performance.md"
        merged = report.merge(harness.ROOT / "bench" / "results", page)
        report.put_predictions(page)
        return print(f"{len(merged)} runs on GPUs put into {page}")
    out = out or harness.default_out(suite)
    if suite == "rollout":
        from bench.rollout import run as rollouts

        return rollouts.main(op, out)
    harness.run_suite(suite, op, seconds, out)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
