"""Run everything that needs a GPU, in one go of at most eight minutes, without a network: what the card allows, whether
all kernels are right on it, how fast they are beside their peers and beside the limit, rollouts, PPO, and tuning.

    python -m bench.gpu --out bench/results        on a machine with a GPU
    python -m bench.gpu --rehearse --out DIR       the same steps without one: tiny shapes, on the CPU

Needs torch; Triton, nvcc, compute-sanitizer, transformers, peft and matplotlib where they are: a step that lacks what
it needs is skipped and says so. Writes GPU-DATE.json (all records), .md (tables), .png (share of the limit) and .log.
`python -m bench.gpu.tuning --apply GPU-DATE.json` puts the launch sizes that it found where the kernels read them.
The exit code is 1 if a step failed or ran out of time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.gpu import report
from bench.gpu.plan import ROOT, Results, Step, python, run, today

# The most that each step may take, in the order of their value.
SECONDS = {
    "machine": 40,
    "build": 120,
    "tests": 150,
    "ops": 150,
    "rollouts": 90,
    "ppo": 120,
    "sanitizer": 60,
    "tune": 90,
}
NAMES = tuple(SECONDS)


def steps(rehearse: bool, short: bool, only: list[str]) -> list[Step]:
    words = ["--rehearse"] * rehearse + ["--short"] * short
    # Kernels run in Triton's interpreter; a GPU that is there all the same is left alone.
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    return [
        Step(name, SECONDS[name], python("-m", "bench.gpu.steps", name, *words), environment)
        for name in NAMES
        if not only or name in only
    ]


def device_name(rehearse: bool) -> str:
    """The card, as a part of a file's name. Asked in a process of its own: a broken driver must not end the run."""
    if rehearse:
        return "rehearsal"
    asked = "import re, torch; print(re.sub('[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-'))"
    done = subprocess.run(python("-c", asked), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(f"bench.gpu: torch sees no GPU ({last}); --rehearse runs the same steps without one")
    return done.stdout.strip()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, no GPU needed")
    parser.add_argument(
        "--short", action="store_true", help="with --rehearse: a minute's worth, for continuous integration"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=NAMES,
        metavar="STEP",
        help=f"one of {', '.join(NAMES)}; may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with today's results: steps that are done are not run again"
    )
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="for all steps together (480)")
    given = parser.parse_args(words)

    name = f"{device_name(given.rehearse)}-{today()}"
    path = given.out / f"{name}.json"
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results.read(path) if path.exists() and (given.resume or given.only) else Results(path)
    for step in given.only if not given.resume else []:
        results.steps.pop(step, None)
    try:
        run(steps(given.rehearse, given.short, given.only), results, path.with_suffix(".log"), given.budget)
    finally:  # an interrupted run has its report too
        written = report.write(results.steps, results.records, path)
        print("written: " + ", ".join(str(file) for file in (path, *written, path.with_suffix(".log"))))
    if results.failed:
        print(
            f"bench.gpu: not all is well: {', '.join(results.failed)}; see {path.with_suffix('.log')}", file=sys.stderr
        )
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
