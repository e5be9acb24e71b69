"""A run of bench.gpu to look at: tables, what is furthest from its limit, and a plot."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OURS = "rlhf-fast"
MARKS = "<!-- runs on GPUs -->", "<!-- end of runs -->"
NONE = "None yet: no GPU was at hand."
PREDICTED = Path(__file__).resolve().parents[1] / "results" / "predicted.json"


def write(steps: dict[str, Record], records: list[Record], path: Path) -> list[Path]:
    """Write PATH.md, and PATH.png where matplotlib is; returns what was written."""
    timed = _timed(records)
    table = path.with_suffix(".md")
    aside = table.with_name(table.name + ".new")
    aside.write_text("\n".join(_tables(steps, records, path)).rstrip() + "\n", encoding="utf-8")
    aside.replace(table)
    return [table, *_plot(timed, path)]


def _timed(records: list[Record]) -> list[Record]:
    return [r for r in records if "limit" in r and "milliseconds" in r]


def _tables(steps: dict[str, Record], records: list[Record], path: Path) -> list[str]:
    timed = _timed(records)
    lines = [
        f"# {path.stem}",
        "",
        *_about(records),
        "",
        *_steps(steps),
        "",
        *_tests(records),
        *_ops(timed),
        *_furthest(timed),
    ]
    return [*lines, *_predicted(timed), *_rollouts(records), *_ppo(records), *_tuning(records)]


def merge(folder: Path, page: Path) -> list[Path]:
    """Put the tables of every run in `folder` between the marks of a page; returns the runs."""
    text = page.read_text(encoding="utf-8")
    (begin, end), found = MARKS, []
    if begin not in text or end not in text:
        raise ValueError(f"{page}: expected {begin} and {end} around where the tables go")
    tables = []
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        if "steps" in run and not file.name.startswith("rehearsal"):
            found.append(file)
            lines = _tables(run["steps"], run["records"], file)
            tables += [f"#{line}" if line.startswith("#") else line for line in lines]
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    aside = page.with_name(page.name + ".new")
    aside.write_text("\n\n".join([before, "\n".join(tables).strip() or NONE, after]), encoding="utf-8")
    aside.replace(page)
    return found


def _about(records: list[Record]) -> list[str]:
    machine = next((r for r in records if r["op"] == "machine"), None)
    if machine is None:
        return ["The machine was not measured."]
    rates, changed = machine["rates"], " with changes" if machine["changed"] else ""
    return [
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, CUDA {machine['cuda']}, commit "
        f"{machine['commit']}{changed}. Reads {rates['read'] / 1e9:,.0f} GB/s, copies {rates['copy'] / 1e9:,.0f} GB/s "
        f"(read and written), multiplies {rates['product'] / 1e12:,.2f} TFLOP/s in float32, "
        f"{rates['product_bf16'] / 1e12:,.2f} in bfloat16."
    ]


def _steps(steps: dict[str, Record]) -> list[str]:
    rows = [f"| {name} | {s['state']} | {s['seconds']:.0f} | {_cell(s['detail'])} |" for name, s in steps.items()]
    return ["| step | | seconds | |", "|---|---|---|---|", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _tests(records: list[Record]) -> list[str]:
    found = [r for r in records if "passed" in r]
    if not found:
        return []
    rows = [f"| {r['op']} | {r['passed']} | {r['failed']} | {r['skipped']} |" for r in found]
    return ["## Is it right?", "", "| tests | passed | failed | skipped |", "|---|---|---|---|", *rows, ""]


def _ops(timed: list[Record]) -> list[str]:
    if not timed:
        return []
    lines = [
        "## Ops",
        "",
        "| op and case | ours, ms | of the limit | others, × ours | MiB: ours, others |",
        "|---|---|---|---|---|",
    ]
    for (op, case), group in itertools.groupby(timed, key=lambda r: (r["op"], r["case"])):
        found = list(group)
        ours, others = [r for r in found if _is_ours(r)], [r for r in found if not _is_ours(r)]
        best = min(ours, key=lambda r: r["milliseconds"])
        each = ", ".join(f"{_short(r)} {r['milliseconds']:.3g}" for r in ours)
        beside = ", ".join(f"{r['provider']} {r['milliseconds'] / best['milliseconds']:.2f}" for r in others)
        memory = ", ".join("" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}" for r in (best, *others))
        lines.append(f"| `{op}` {_cell(case)} | {each} | {_share(best):.0%} | {beside} | {memory} |")
    return [*lines, ""]


def _is_ours(record: Record) -> bool:
    """Ours on one backend; the packed form of an op, say, is timed beside it as another one."""
    return _short(record) in ("", "cpu", "cuda", "triton")


def _short(record: Record) -> str:
    return str(record["provider"]).removeprefix(OURS).removeprefix(", ")


def _share(record: Record) -> float:
    return float(record["limit"] / record["milliseconds"])


def _best(timed: list[Record]) -> list[Record]:
    """The fastest of ours in each case."""
    found: dict[tuple[str, str], Record] = {}
    for record in timed:
        key = record["op"], record["case"]
        if _is_ours(record) and (key not in found or record["milliseconds"] < found[key]["milliseconds"]):
            found[key] = record
    return list(found.values())


def _furthest(timed: list[Record]) -> list[str]:
    ranked = sorted(_best(timed), key=_share)[:10]
    if not ranked:
        return []
    rows = [
        f"{i}. `{r['op']}` {r['case']}: {_share(r):.0%} ({_short(r) or 'default'})" for i, r in enumerate(ranked, 1)
    ]
    return ["## Furthest from the limit", "", *rows, ""]


def _predicted(timed: list[Record]) -> list[str]:
    """What bench/predict.py had expected of this card."""
    if not PREDICTED.exists():
        return []
    expected: dict[tuple[str, str, str, str], float] = {
        (one["card"], one["op"], one["case"], one["backend"]): one["milliseconds"]
        for one in json.loads(PREDICTED.read_text(encoding="utf-8"))["predictions"]
    }
    rows = []
    for r in timed:
        for (card, *what), wanted in expected.items():
            if card in r["device"] and what == [r["op"], r["case"], _short(r)]:
                rows.append(
                    f"| `{r['op']}` {_cell(r['case'])}, {_short(r)} | {wanted:.3g} | {r['milliseconds']:.3g} | "
                    f"{r['milliseconds'] / wanted:.2f} |"
                )
    head = "| op and case | predicted, ms | measured, ms | times as long |"
    return ["## Predicted and measured", "", head, "|---|---|---|---|", *rows, ""] if rows else []


def _rollouts(records: list[Record]) -> list[str]:
    found = [r for r in records if r["op"].startswith("rollout: ")]
    if not found:
        return []
    rows = [
        f"| {r['op'].removeprefix('rollout: ')} | {r['provider']} | {r['tokens'] / r['seconds']:,.0f} | "
        f"{r['limit_seconds'] / r['seconds']:.0%} | {r['speedup']:.2f} |"
        for r in found
    ]
    return ["## Rollouts", "", "| case | | tokens/s | of the limit | × our time |", "|---|---|---|---|---|", *rows, ""]


def _ppo(records: list[Record]) -> list[str]:
    found = [r for r in records if r["op"].startswith("ppo: ")]
    if not found:
        return []
    rows = [
        f"| {r['op'].removeprefix('ppo: ')}, {r['case']} | {r['seconds']:.2f} | "
        + " | ".join(f"{r['parts'][part] / r['seconds']:.0%}" for part in ("rollout", "scoring", "training"))
        + f" | {r['tokens'] / r['seconds']:,.0f} | {r['training_operations_per_second'] / 1e12:.2f} |"
        for r in found
    ]
    head = "| model | seconds a step | rollout | scoring | training | tokens/s | TFLOP/s in training |"
    return ["## PPO", "", head, "|---|---|---|---|---|---|---|", *rows, ""]


def _tuning(records: list[Record]) -> list[str]:
    found = [r for r in records if r["op"].startswith("tune: ")]
    if not found:
        return []
    rows = []
    for r in found:
        sizes = ", ".join(f"{name} {value}" for name, value in (r["sizes"] or {}).items()) or "its own"
        refused = "; ".join(f"{label}: {why}" for label, why in r["refused"].items())
        rows.append(
            f"| {r['op'].removeprefix('tune: ')} {_cell(r['case'])} | {sizes} | {r['gain']:.2f} | {_cell(refused)} |"
        )
    head = "| kernel | sizes to keep | times as fast as with its own | refused |"
    return ["## Tuning", "", head, "|---|---|---|---|", *rows, ""]


def _plot(timed: list[Record], path: Path) -> list[Path]:
    best = _best(timed)
    if not best or importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(best)))
    names = [f"{r['op']}  {r['case']}" for r in best]
    axes.barh(names, [100 * _share(r) for r in best], color="#3b6ea5")
    axes.axvline(100, color="#888", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("% of what bandwidth or products allow")
    axes.tick_params(labelsize=7)
    figure.tight_layout()
    file = path.with_suffix(".png")
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return [file]
