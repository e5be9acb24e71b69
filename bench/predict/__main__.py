"""`python -m bench.predict`: what every op of ours should take on an A100, H100, H200 and B200, what binds it, and
whether it reaches its goal. Written to bench/results/predicted.json before any of it has been measured, so that the
first run on such a card tests the model as well; `python -m bench.gpu` sets both side by side.

A call takes as long as its launches one after another (cards.py: one launch; parts.py: the launches of each op), or as
long as Python takes to make it, whichever is longer: `bench.gpu` times calls as a user makes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.gpu import report
from bench.harness import BOTH, FORWARD, Bench, Case
from bench.predict import cards, parts
from bench.predict.cards import CARDS, LAUNCH, Table

OUT = report.PREDICTED
BACKENDS = ("cuda", "triton")
# Seconds that Python takes for a call without its launches: of one small row on a CPU (bench/results/ops-cpu.jsonl,
# token_logprobs 1 x 1000, ppo_loss and dpo_loss), with autograd where there are gradients.
CALL = {FORWARD: 20e-6, BOTH: 140e-6}
LOSS_CALL = {"ppo_loss": 260e-6, "linear_ppo_loss": 400e-6}  # with checks of twenty arguments

# Ops that have a GPU path and no benchmark yet.
MORE: dict[str, list[Case]] = {
    "write_kv": [Case("Llama 3 8B, a step", (256, 32, 8, 128), torch.bfloat16, FORWARD)],
    "linear_dpo_loss": [Case("Llama 3", (8192, 4096, 128256), torch.bfloat16, BOTH)],
}


@dataclass(frozen=True)
class Goal:
    """Goal of a case: at least a share of the bandwidth, or at most so many ms or times its bare products."""

    op: str
    case: str  # how it begins
    unit: str  # of the bandwidth, ms, x bare products
    wanted: float
    cards: tuple[str, ...] = tuple(CARDS)


GOALS = (
    Goal("token_logprobs", "8192 x 128256 bfloat16 forward (Llama 3)", "of the bandwidth", 0.85),
    Goal("token_logprobs", "8192 x 128256 bfloat16 forward+backward (Llama 3)", "ms", 1.6, ("H100",)),
    Goal("gae", "8192 x 2048 ", "of the bandwidth", 0.70),
    Goal("ppo_loss", "32768 ", "ms", 0.015, ("H100",)),
    Goal("linear_ppo_loss", "", "x bare products", 1.35),
)


def cases() -> Iterator[tuple[str, Case, Bench | None]]:
    """List all that `bench.gpu` times, and what has no benchmark."""
    for bench in harness.benches("ops"):
        if bench.op in parts.OPS:  # `linear` is for CPUs
            for case in bench.gpu_cases:
                yield bench.op, case, bench
    for op, more in MORE.items():
        for case in more:
            yield op, case, None


def predictions() -> Iterator[dict[str, Any]]:
    table = cards.read_table()
    for op, case, bench in cases():
        for backend in BACKENDS:
            for name, card in CARDS.items():
                each = list(cards.timed(parts.OPS[op](case, backend), backend, card, table))
                yield {
                    "card": name, "op": op, "case": str(case), "backend": backend,
                    **call_time(each, op, case, backend),
                    "goal": None if bench is None else goal(name, bench, case, _sum(each), table),
                    "parts": [{**part, "milliseconds": round(part["milliseconds"], 5)} for part in each],
                }  # fmt: skip


def call_time(each: list[dict[str, Any]], op: str, case: Case, backend: str) -> dict[str, Any]:
    """Sum up a call's parts: milliseconds of the whole, the longer of what the device and what Python takes."""
    device = _sum(each)
    launches = sum(LAUNCH[backend if part["ours"] else "torch"] * part["launches"] for part in each)
    call = 1e3 * (LOSS_CALL.get(op, CALL[case.mode]) + launches)
    by_bound: dict[str, float] = {}
    for part in each:
        by_bound[part["binds"]] = by_bound.get(part["binds"], 0.0) + part["milliseconds"]
    binds = "call" if call > device else max(by_bound, key=lambda name: by_bound[name])
    milliseconds = {"milliseconds": max(device, call), "device_ms": device, "call_ms": call}
    return {"binds": binds, **{key: round(value, 5) for key, value in milliseconds.items()}}


def goal(card: str, bench: Bench, case: Case, milliseconds: float, table: Table) -> dict[str, Any] | None:
    """The goal of a case on a card, and what its time on the device makes of it."""
    for aim in GOALS:
        if aim.op != bench.op or not str(case).startswith(aim.case) or card not in aim.cards:
            continue
        figure = milliseconds
        if aim.unit == "of the bandwidth":
            work = bench.work(case)
            figure = (work.read + work.copied) / (1e-3 * milliseconds) / CARDS[card].bandwidth
        elif aim.unit == "x bare products":
            figure = milliseconds / _sum(cards.timed(parts.bare_products(case), "", CARDS[card], table))
        reached = figure >= aim.wanted if aim.unit == "of the bandwidth" else figure <= aim.wanted
        return {"wanted": aim.wanted, "unit": aim.unit, "predicted": round(figure, 4), "reached": reached}
    return None


def _sum(each: Iterable[dict[str, Any]]) -> float:
    """Milliseconds of launches one after another."""
    return float(sum(part["milliseconds"] for part in each))


def write(path: Path, of_ops: list[dict[str, Any]], of_rollouts: list[dict[str, Any]]) -> None:
    def lines(records: list[dict[str, Any]]) -> str:
        return ",\n".join(json.dumps(record) for record in records)

    aside = path.with_name(path.name + ".new")
    aside.write_text(
        f'{{"predictions": [\n{lines(of_ops)}\n],\n"rollouts": [\n{lines(of_rollouts)}\n]}}\n', encoding="utf-8"
    )
    aside.replace(path)


def main() -> None:
    from bench.predict import rollouts

    of_ops, of_rollouts = list(predictions()), list(rollouts.predictions())
    write(OUT, of_ops, of_rollouts)
    report.put_predictions(report.PAGE)
    for row in of_ops:
        print(
            f"{row['card']:5} {row['op']:22} {row['case']:62} {row['backend']:7} {row['milliseconds']:9.4f} ms  "
            f"{row['binds']:18} {report.goal_text(row['goal'])}"
        )
    for row in of_rollouts:
        print(
            f"{row['card']:5} {row['case']:50} {'CUDA graphs' * row['graphs']:11} {row['tokens_per_second']:9,.0f} "
            f"tokens/s, {row['share']:4.0%} of the roofline  {row['binds']}"
        )
    print(f"{len(of_ops) + len(of_rollouts)} predictions written to {OUT}, those of one card to {report.PAGE}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
