"""A run of bench.gpu to look at: tables, what is furthest from its limit, what had been predicted, and a plot."""

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
PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
PREDICTION_MARKS = "<!-- predictions -->", "<!-- end of predictions -->"


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
    return [*lines, *_predicted(records), *_rollouts(records), *_ppo(records), *_tuning(records)]


def merge(folder: Path, page: Path) -> list[Path]:
    """Put the tables of every run in `folder` between the marks of a page; returns the runs."""
    merged = []
    tables: list[str] = []
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        if "steps" in run and not file.name.startswith("rehearsal"):
            merged.append(file)
            lines = _tables(run["steps"], run["records"], file)
            tables += [f"#{line}" if line.startswith("#") else line for line in lines]
    _put(page, MARKS, "\n".join(tables).strip() or NONE)
    return merged


def _put(page: Path, marks: tuple[str, str], tables: str) -> None:
    """Write tables between the marks of a page, in place of what is there."""
    text, (begin, end) = page.read_text(encoding="utf-8"), marks
    if begin not in text or end not in text:
        raise ValueError(f"{page}: expected {begin} and {end} around where the tables go")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    aside = page.with_name(page.name + ".new")
    aside.write_text("\n\n".join([before, tables, after]), encoding="utf-8")
    aside.replace(page)


def put_predictions(page: Path, card: str = "H100") -> None:
    """Put what bench/predict expects of one card between the marks of a page, the faster backend of each case."""
    whole = json.loads(PREDICTED.read_text(encoding="utf-8"))
    best: dict[tuple[str, str], Record] = {}
    for one in whole["predictions"]:
        key = one["op"], one["case"]
        if one["card"] == card and (key not in best or one["milliseconds"] < best[key]["milliseconds"]):
            best[key] = one
    lines = [
        f"| op and case, {card} | predicted, ms | on the device, ms | what binds | goal |", "|---|---|---|---|---|",
        *(
            f"| `{one['op']}` {_cell(one['case'])}, {one['backend']} | {one['milliseconds']:.3g} | "
            f"{one['device_ms']:.3g} | {one['binds']} | {goal_text(one['goal'])} |"
            for one in best.values()
        ),
        "", f"| rollout, {card} | predicted, tokens/s | of the roofline | what binds | goal |", "|---|---|---|---|---|",
        *(
            f"| {one['case']}{', CUDA graphs' * one['graphs']} | {one['tokens_per_second']:,.0f} | "
            f"{one['share']:.0%} | {one['binds']} | {goal_text(one['goal'])} |"
            for one in whole["rollouts"]
            if one["card"] == card
        ),
    ]  # fmt: skip
    _put(page, PREDICTION_MARKS, "\n".join(lines))


def goal_text(goal: Record | None) -> str:
    """Word what was wanted and what is expected."""
    if goal is None:
        return ""
    share = goal["unit"].startswith("of the")
    wanted, predicted = (f"{goal[key]:.0%}" if share else f"{goal[key]:.3g}" for key in ("wanted", "predicted"))
    reached = "reached" if goal["reached"] else "missed"
    return f"{'at least' if share else 'at most'} {wanted} {goal['unit']}: {reached}, {predicted}"


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
    tested = [r for r in records if "passed" in r]
    if not tested:
        return []
    rows = [f"| {r['op']} | {r['passed']} | {r['failed']} | {r['skipped']} |" for r in tested]
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
        same_case = list(group)
        ours, others = [r for r in same_case if _is_ours(r)], [r for r in same_case if not _is_ours(r)]
        best = min(ours, key=lambda r: r["milliseconds"])
        each = ", ".join(f"{_short(r)} {r['milliseconds']:.3g}" for r in ours)
        beside = ", ".join(f"{r['provider']} {r['milliseconds'] / best['milliseconds']:.2f}" for r in others)
        memory = ", ".join("" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}" for r in (best, *others))
        lines.append(f"| `{op}` {_cell(case)} | {each} | {_share(best):.0%} | {beside} | {memory} |")
    return [*lines, ""]


def _is_ours(record: Record) -> bool:
    """Return whether a record is ours on one backend; the packed form of an op, say, is timed beside it."""
    return _short(record) in ("", "cpu", "cuda", "triton")


def _short(record: Record) -> str:
    return str(record["provider"]).removeprefix(OURS).removeprefix(", ")


def _share(record: Record) -> float:
    return float(record["limit"] / record["milliseconds"])


def _best(timed: list[Record]) -> list[Record]:
    """The fastest of ours in each case."""
    best: dict[tuple[str, str], Record] = {}
    for record in timed:
        key = record["op"], record["case"]
        if _is_ours(record) and (key not in best or record["milliseconds"] < best[key]["milliseconds"]):
            best[key] = record
    return list(best.values())


def _furthest(timed: list[Record]) -> list[str]:
    ranked = sorted(_best(timed), key=_share)[:10]
    if not ranked:
        return []
    rows = [
        f"{i}. `{r['op']}` {r['case']}: {_share(r):.0%} ({_short(r) or 'default'})" for i, r in enumerate(ranked, 1)
    ]
    return ["## Furthest from the limit", "", *rows, ""]


def _predicted(records: list[Record]) -> list[str]:
    """Compare with what bench/predict had expected of this card: milliseconds of ops and of rollouts."""
    if not PREDICTED.exists():
        return []
    whole = json.loads(PREDICTED.read_text(encoding="utf-8"))
    expected: dict[tuple[str, ...], tuple[float, str]] = {
        (row["card"], row["op"], row["case"], row["backend"]): (row["milliseconds"], row["binds"])
        for row in whole["predictions"]
    }
    for row in whole["rollouts"]:
        way = "CUDA graphs" if row["graphs"] else ""
        expected[row["card"], f"rollout: {row['case']}", "", way] = 1e3 * row["seconds"], row["binds"]
    rows = []
    for r in records:
        if "device" not in r or "provider" not in r:
            continue
        is_rollout = r["op"].startswith("rollout: ")
        key = (r["op"], "", _short(r)) if is_rollout else (r["op"], r["case"], _short(r))
        measured = 1e3 * r["seconds"] if is_rollout else r.get("milliseconds")
        for (card, *what), (wanted, binds) in expected.items():
            if card in r["device"] and tuple(what) == key and measured is not None:
                about = f"`{r['op']}` {_cell(r['case'])}, {_short(r)}" if not is_rollout else _cell(r["op"])
                rows.append(f"| {about} | {wanted:.3g} | {binds} | {measured:.3g} | {measured / wanted:.2f} |")
    head = "| op and case | predicted, ms | by its | measured, ms | times as long |"
    return ["## Predicted and measured", "", head, "|---|---|---|---|---|", *rows, ""] if rows else []


def _rollouts(records: list[Record]) -> list[str]:
    rollouts = [r for r in records if r["op"].startswith("rollout: ")]
    if not rollouts:
        return []
    rows = [
        f"| {r['op'].removeprefix('rollout: ')} | {r['provider']} | {r['tokens'] / r['seconds']:,.0f} | "
        f"{r['limit_seconds'] / r['seconds']:.0%} | {r['speedup']:.2f} |"
        for r in rollouts
    ]
    return ["## Rollouts", "", "| case | | tokens/s | of the limit | × our time |", "|---|---|---|---|---|", *rows, ""]


def _ppo(records: list[Record]) -> list[str]:
    runs = [r for r in records if r["op"].startswith("ppo: ")]
    if not runs:
        return []
    rows = [
        f"| {r['op'].removeprefix('ppo: ')}, {r['case']} | {r['seconds']:.2f} | "
        + " | ".join(f"{r['parts'][part] / r['seconds']:.0%}" for part in ("rollout", "scoring", "training"))
        + f" | {r['tokens'] / r['seconds']:,.0f} | {r['training_utilisation']:.0%} | {r['decode_roofline']:.0%} | "
        + (f"{r['busy']:.0%} | " if r["busy"] is not None else "- | ")
        + (f"{r['peak_mib'] / 1024:.1f} |" if r["peak_mib"] is not None else "- |")
        for r in runs
    ]
    head = (
        "| model | seconds a step | rollout | scoring | training | tokens/s | training, of products | sampling, of its "
        "limit | device busy | peak GiB |"
    )
    return ["## PPO", "", head, "|---|---|---|---|---|---|---|---|---|---|", *rows, ""]


def _tuning(records: list[Record]) -> list[str]:
    tuned = [r for r in records if r["op"].startswith("tune: ")]
    if not tuned:
        return []
    rows = []
    for r in tuned:
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
