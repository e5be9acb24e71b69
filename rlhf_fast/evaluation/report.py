"""The page that a run leaves behind: one file, nothing fetched, every text of a model or a person escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_fast.pages import plots
from rlhf_fast.pages.page import SAMPLES_SHOWN, bar, duration, esc, figure, fmt, table_of, whisker, whole_page
from rlhf_fast.pages.plots import Rows, number
from rlhf_fast.runs.files import write_atomic
from rlhf_fast.runs.folder import page_of
from rlhf_fast.statistics.intervals import Interval

PHASES = {
    "sft": "Supervised fine-tuning",
    "comparisons": "Comparisons",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluation": "Evaluation",
}
SAMPLES_KEPT = 1000
TEXT_KEPT = 6000  # characters of one reply or prompt


def write_report(run: Path) -> Path:
    """Write `run`/report.html from the files of the phases that have ended, and return its path.

    `run` is a demo's folder, or that of an evaluation alone.

    The page is one self-contained file that depends on the run's files alone: the same files give the same bytes.
    Phases, keys and numbers that are missing are left out. Plots need matplotlib; without it the page says so.

    Raises:
        FileNotFoundError: when `run` is not a folder.
        PageError: the page could not be made or written; the run is whole.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a folder: a report is written into the folder of a run")
    with page_of(run, write_report):
        write_atomic(run / "report.html", _page(run))
    return run / "report.html"


def _page(run: Path) -> str:
    results = {path.parent.name: _read_json(path) for path in sorted(run.glob("*/result.json"))}
    results = {name: results[name] for name in [*PHASES, *results] if name in results}
    alone = (run / "evaluation.json").is_file()
    if alone:
        results["evaluation"] = _read_json(run / "result.json")
    curves = {name: _read_rows(run / name / "metrics.jsonl") for name in ("sft", "reward", "ppo")}
    folder = run if alone else run / "evaluation"
    evaluation = _read_json(folder / "evaluation.json")
    samples = _read_rows(folder / "samples.jsonl")
    config = run / "config.yaml"
    pairs = _pairs_of_people(results)
    names = (str(evaluation.get("a") or "ppo").upper(), str(evaluation.get("b") or "sft").upper())

    missing = [title for name, title in PHASES.items() if name not in results and not curves.get(name)]
    if evaluation and PHASES["evaluation"] in missing:
        missing.remove(PHASES["evaluation"])
    note = f"Not in this run yet, so left out: {', '.join(missing)}." if missing and not alone else ""
    sections = {
        "Training": _curves(curves),
        "Where it changed": _categories(evaluation, names),
        "Samples": _samples(samples, names),
        "Cost": _costs(results, curves["ppo"]),
        "Settings": _settings(results, config.read_text("utf-8", "replace") if config.is_file() else ""),
        "How to read this page": _guide(evaluation, names, pairs) if evaluation else "",
    }
    sections = {title: body for title, body in sections.items() if body}
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    links = "".join(f'<a href="#{anchors[title]}">{title}</a>' for title in sections)
    parts = [
        f'<header><p class="eyebrow">rlhf-fast · {esc(run.resolve().name)}</p><h1>{_outcome(evaluation, names)}</h1>'
        '<p class="note">'
        f'{_who_judged(evaluation, pairs)} {esc(note)}</p><nav aria-label="Sections">{links}</nav></header>',
        _cards(results, evaluation, curves["ppo"]),
        *(f'<section id="{anchors[title]}"><h2>{title}</h2>{body}</section>' for title, body in sections.items()),
    ]
    return whole_page(esc(run.resolve().name), "\n".join(filter(None, parts)))


# Reading: what is missing, cut off or of another kind is as if it were not there.


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8", "replace"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path) -> Rows:
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8", "replace").split("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:  # an empty line, or the last one of a run that was killed
                continue
    return [row for row in rows if isinstance(row, dict)]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _interval(value: Any) -> Interval | None:
    mean, low, high = (number(_dict(value).get(name)) for name in ("mean", "low", "high"))
    return None if mean is None or low is None or high is None else Interval(mean, low, high)


# Writing: one function for each section of the page, in their order.


def _outcome(evaluation: dict[str, Any], names: tuple[str, str]) -> str:
    difference, mean = _interval(evaluation.get("score_difference")), number(evaluation.get("score_difference"))
    if mean is None:
        return "This run has no evaluation yet."
    prompts, kl = number(evaluation.get("prompts")), number(_dict(evaluation.get("a_metrics")).get("kl"))
    digits = 2 if abs(mean) >= 0.1 else 3
    side = "even" if difference and difference.low <= 0 <= difference.high else "a" if mean > 0 else "b"
    size = fmt(abs(mean), digits)
    if side == "even":
        verdict = f"{names[0]} and {names[1]} cannot be told apart: they differ by"
        size = fmt(mean, digits, sign=True)
    else:
        verdict = f"{names[0]} {'beat' if mean > 0 else 'lost to'} {names[1]} by"
    ends = ""
    if difference:
        # "Lost by 0.12" speaks of the size: its interval is turned with it.
        low, high = difference.low, difference.high
        low, high = (-high, -low) if high < 0 else (low, high)
        ends = f' <span class="nowrap">[{fmt(low, digits)}, {fmt(high, digits)}]</span>'
    on = f" on {prompts:.0f} held-out prompts" if prompts else ""
    cost = f"; KL {fmt(kl, 1)} nats" if kl is not None else ""
    gap = f'<em class="{side}">{size}</em>{ends}'
    judge = "the simulated annotator’s score" if _is_simulated(evaluation) else "the judge’s score"
    return f"{esc(verdict)} {gap} of {judge}{on}{cost}."


def _is_simulated(evaluation: dict[str, Any]) -> bool:
    return "simulated" in str(evaluation.get("judge", "simulated"))


def _pairs_of_people(results: dict[str, dict[str, Any]]) -> float | None:
    """How many comparisons people made in this run; None if a program did."""
    summary = _dict(results.get("comparisons", {}).get("summary"))
    return number(summary.get("comparisons")) if str(summary.get("annotator", "")).startswith("people") else None


def _who_judged(evaluation: dict[str, Any], pairs: float | None) -> str:
    if pairs is not None and _is_simulated(evaluation):
        return (
            f"The reward model learned from {pairs:.0f} pairs that people compared. The replies below are scored by a "
            "program, the simulated annotator, which knows nothing of what those people prefer."
        )
    if _is_simulated(evaluation):
        return "The annotator in this run is simulated: a program, not people, compared and scored the replies."
    decision = evaluation.get("decision")
    decided = f"On the golden set the candidate is {esc(decision)}. " if decision else ""
    return f"{decided}The judge is {esc(evaluation['judge'])}: {esc(evaluation.get('judge_note', ''))}."


def _cards(results: dict[str, dict[str, Any]], evaluation: dict[str, Any], ppo: Rows) -> str:
    cards: list[tuple[str, str, str]] = []  # title, figure, the rest

    def card(title: str, value: Any, null: float, scale: tuple[float, float], share: bool, note: str) -> None:
        mean, interval = number(value), _interval(value)
        if mean is None:
            return
        unit, digits = ("%", 0) if share else ("", 2 if abs(mean) >= 0.1 else 3)
        ends = [fmt(end, digits, not share, unit) for end in (interval.low, interval.high)] if interval else []
        rest = f"{whisker(interval, null, *scale)}<span>{' to '.join(ends) or 'no interval'}</span><span>{note}</span>"
        cards.append((title, fmt(mean, digits, not share, unit), rest))

    difference = _interval(evaluation.get("score_difference"))
    reach = 1.25 * max(abs(difference.low), abs(difference.high)) if difference else 1.0
    card("Score difference", evaluation.get("score_difference"), 0, (-reach, reach), False, "paired by prompt")
    counts = {
        said: number(evaluation.get(name)) for name, said in (("wins", "won"), ("ties", "tied"), ("losses", "lost"))
    }
    told = " · ".join(f"{count:.0f} {said}" for said, count in counts.items() if count is not None)
    card("Win rate", evaluation.get("win_rate"), 0.5, (0, 1), True, told)
    reward = _dict(results.get("reward", {}).get("summary"))
    heldout = number(reward.get("heldout"))
    note = f"agreement on {f'{heldout:.0f} ' if heldout is not None else ''}held-out comparisons"
    card("Reward model", reward.get("heldout_accuracy"), 0.5, (0, 1), True, note)

    kl = number(_dict(evaluation.get("a_metrics")).get("kl"))
    if kl is None:
        kl = next((value for row in reversed(ppo) if (value := number(row.get("kl"))) is not None), None)
    if kl is not None:
        cards.append(("KL", f"{fmt(kl, 1)} <small>nats</small>", "<span>distance from the SFT model</span>"))
    times = [seconds for result in results.values() if (seconds := number(result.get("seconds"))) is not None]
    if times:
        words = duration(sum(times)).split()
        figure = " ".join(word if word[0].isdigit() else f"<small>{word}</small>" for word in words)
        cards.append(("Total time", figure, f"<span>{len(times)} phases</span>"))
    peaks = {name: peak for name, result in results.items() if (peak := number(result.get("peak_rss_gb"))) is not None}
    if peaks:
        name = max(peaks, key=lambda phase: peaks[phase])
        where = f"<span>in {esc(PHASES.get(name, name))}</span>"
        cards.append(("Peak memory", f"{fmt(peaks[name])} <small>GB</small>", where))
    body = "".join(f"<div><dt>{title}</dt><dd><b>{figure}</b>{rest}</dd></div>" for title, figure, rest in cards)
    return f'<dl class="cards">{body}</dl>' if cards else ""


def _curves(rows: dict[str, Rows]) -> str:
    if not any(rows.values()):
        return ""
    if not plots.available():
        body = "<p class=\"note\">Plots need matplotlib: <code>pip install 'rlhf-fast[report]'</code>, then again.</p>"
    else:
        drawn = plots.curves(rows["sft"], rows["reward"], rows["ppo"])
        body = f'<div class="grid">{"".join(map(figure, drawn))}</div>'
    return body


def _categories(evaluation: dict[str, Any], names: tuple[str, str]) -> str:
    a, b = map(esc, names)
    categories = {name: _dict(row) for name, row in _dict(evaluation.get("by_category")).items()}
    intervals = [_interval(row.get("score_difference")) for row in categories.values()]
    reach = 1.1 * max([0.01, *(max(abs(each.low), abs(each.high)) for each in intervals if each)])

    def gap(row: dict[str, Any]) -> float | None:
        scores = [number(row.get(f"{side}_score")) for side in "ab"]
        return None if scores[0] is None or scores[1] is None else scores[0] - scores[1]

    means = {name: gap(row) if (mean := number(row.get("score_difference"))) is None else mean
             for name, row in categories.items()}  # fmt: skip
    rows = []
    for name in sorted(categories, key=lambda name: (means[name] or 0.0, name)):
        row, mean = categories[name], means[name]
        interval = _interval(row.get("score_difference"))
        ends = f"[{fmt(interval.low)}, {fmt(interval.high)}]" if interval else "too few prompts for an interval"
        rows.append([esc(name), fmt(number(row.get("prompts")), 0), fmt(number(row.get("b_score"))),
                     fmt(number(row.get("a_score"))), fmt(mean, sign=True),
                     f'<span class="muted">{ends}</span>', whisker(interval, 0, -reach, reach)])  # fmt: skip
    head = ["Category", "Prompts", b, a, "Difference", "95% interval", f"{b} better · {a} better"]
    table = table_of("Score by category, smallest difference first", head, rows) if rows else ""

    kinds = {"score": ("Score", 2, ""), "kl": ("KL, nats", 1, ""), "tokens": ("Tokens", 0, ""),
             "words": ("Words", 0, ""), "repetition": ("Repeated 3-grams", 1, "%"),
             "finished": ("Finished", 0, "%")}  # fmt: skip
    values = {kind: [number(_dict(evaluation.get(f"{side}_metrics")).get(kind)) for side in "ba"] for kind in kinds}
    replies = [[title, *(fmt(value, digits, unit=unit) for value in values[kind])]
               for kind, (title, digits, unit) in kinds.items() if values[kind] != [None, None]]  # fmt: skip
    changed = table_of("How the replies changed", ["Mean", b, a], replies) if replies else ""

    pairs = {}
    for name, pair in _dict(evaluation.get("criteria")).items():
        first, second = number(_dict(pair).get("a")), number(_dict(pair).get("b"))
        if first is not None and second is not None:
            pairs[str(name)] = (first, second)
    bars = plots.criteria(pairs, names) if plots.available() else None
    side = f'<div class="grid two">{figure(bars) if bars else ""}{changed}</div>' if bars or changed else ""
    return table + side


def _text(value: Any) -> str:
    """A prompt or reply: a string, or the messages of a conversation."""
    if isinstance(value, list):
        turns = [(_dict(message), message) for message in value]
        value = "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', message)}" for turn, message in turns)
    text = str(value if value is not None else "")
    more = f" … ({len(text) - TEXT_KEPT} more characters)" if len(text) > TEXT_KEPT else ""
    return esc(text[:TEXT_KEPT] + more)


def _reply(side: dict[str, Any], name: str, colour: str) -> str:
    ratings = "".join(
        f"<div><dt>{esc(key)}</dt><dd>{fmt(value)}</dd>{bar(value)}</div>"
        for key, rating in _dict(side.get("ratings")).items()
        if (value := number(rating)) is not None
    )
    reason = f'<span class="muted">{esc(side["finish_reason"])}</span>' if side.get("finish_reason") else ""
    score = fmt(number(side.get("score")))
    return (
        f'<div class="reply {colour}"><p class="who"><b>{esc(name)}</b>{reason}<b>{score}</b></p>'
        f'<p class="said" dir="auto">{_text(side.get("text"))}</p><dl class="ratings">{ratings}</dl></div>'
    )


def _samples(rows: Rows, names: tuple[str, str]) -> str:
    if not rows:
        return ""

    def gap(row: dict[str, Any]) -> float | None:
        a, b = (number(_dict(row.get(side)).get("score")) for side in "ab")
        return None if a is None or b is None else a - b

    rows = sorted(rows, key=lambda row: (gap(row) is None, gap(row) or 0.0))
    folded = []
    for row in rows[:SAMPLES_KEPT]:
        size = gap(row)
        side = "even" if size is None or abs(size) < 0.005 else "a" if size > 0 else "b"  # grey where 0.00 is shown
        prompt, category = _text(row.get("prompt")), esc(row.get("category") or "")
        folded.append(
            f'<details data-category="{category}"><summary><span class="gap {side}">{fmt(size, sign=True)}</span>'
            f'<span class="tag">{category}</span><span class="short" dir="auto">{prompt}</span></summary>'
            f'<p class="said prompt" dir="auto">{prompt}</p><div class="grid two">'
            f"{_reply(_dict(row.get('b')), names[1], 'b')}{_reply(_dict(row.get('a')), names[0], 'a')}</div></details>"
        )
    categories = sorted({str(row.get("category") or "") for row in rows})
    options = "".join(f'<option value="{esc(name)}">{esc(name)}</option>' for name in categories if name)
    told = f"{min(len(folded), SAMPLES_SHOWN)} of {len(folded)} shown"
    left = f" The {len(rows) - len(folded)} best of {len(rows)} are left out." if len(rows) > len(folded) else ""
    a, b = map(esc, names)
    return (
        f'<p class="note">Replies to the same prompt, failures first: those where {a} fell '
        f"furthest behind {b}.{left}</p><noscript><style>.filter{{display:none}}</style></noscript>"
        '<form class="filter" id="filter"><label>Text <input type="search" name="q" autocomplete="off"></label>'
        f'<label>Category <select name="c"><option value="">all</option>{options}</select></label>'
        f'<label>Order <select name="o"><option value="">{b} better first</option><option value="a">{a} better first'
        f'</option></select></label><output>{told}</output></form><div id="sample-list">'
        f'{"".join(folded[:SAMPLES_SHOWN])}</div><template id="more">{"".join(folded[SAMPLES_SHOWN:])}</template>'
    )


def _costs(results: dict[str, dict[str, Any]], ppo: Rows) -> str:
    times = {name: number(result.get("seconds")) or 0.0 for name, result in results.items()}
    total = sum(times.values())
    if not times:
        return ""
    rows = []
    for name, seconds in times.items():
        share = seconds / total if total else 0.0
        peak = number(results[name].get("peak_rss_gb"))
        memory = fmt(peak) + (" GB" if peak is not None else "")
        rows.append([esc(PHASES.get(name, name)), f"{seconds:.1f} s", fmt(share, 0, unit="%"), bar(share), memory])
    head = ["Phase", "Time", "Share", '<span class="hidden">Share as a bar</span>', "Peak memory"]
    table = table_of("Time and peak memory of each phase", head, rows, ["All", f"{total:.1f} s", "", "", ""])
    kinds = ("rollout", "scoring", "training")
    parts = {kind: sum(number(row.get(f"seconds_{kind}")) or 0.0 for row in ppo) for kind in kinds}
    spent = sum(parts.values()) or 1.0
    inside = ", ".join(f"{kind} {fmt(part / spent, 0, unit='%')}" for kind, part in parts.items() if part)
    note = f'<p class="note">Within PPO: {inside}.</p>' if inside else ""
    return table + note


def _settings(results: dict[str, dict[str, Any]], config: str) -> str:
    rows = []
    for name, result in results.items():
        for key, value in _dict(result.get("summary")).items():
            interval, mean = _interval(value), number(value)
            shown = esc("–" if value is None else value) if mean is None else f"{mean:.5g}".replace("-", "−")
            shown += f" [{interval.low:.4g}, {interval.high:.4g}]".replace("-", "−") if interval else ""
            rows.append([esc(PHASES.get(name, name)), esc(key), shown])
    table = table_of("Summary figures of each phase", ["Phase", "Name", "Value"], rows)
    figures = f"<details><summary>All summary figures</summary>{table}</details>" if rows else ""
    text = f"<details><summary>config.yaml</summary><pre>{esc(config)}</pre></details>" if config else ""
    return text + figures


def _guide(evaluation: dict[str, Any], names: tuple[str, str], pairs: float | None) -> str:
    a, b = map(esc, names)
    judge = f" (<code>{esc(evaluation['judge'])}</code>)" if evaluation.get("judge") else ""
    stands = (
        f"The annotator is simulated{judge}: a program with fixed criteria stands in for people, so the scores show "
        "whether the pipeline learns what it is asked to, and not what people would prefer."
        if _is_simulated(evaluation) and pairs is None
        else f"The judge is no person{judge}, so the scores show what it prefers, and not what people would."
    )
    samples = number(evaluation.get("samples_per_prompt"))
    each = f", {samples:.0f} sample{'s' if samples != 1 else ''} each" if samples else ""
    return (
        f"<p>{a} and {b} answered the same held-out prompts{each}, "
        "and the difference is taken prompt by prompt; its 95% interval comes from drawing whole prompts anew, because "
        "more samples of one prompt say nothing about other prompts. An interval that holds zero (for a win rate: 50%) "
        f"means that the two cannot be told apart. {stands} KL, in nats per response, is how far {a} has moved from "
        f"{b}: a gain bought with little KL is more trustworthy, while a large KL with longer or repetitive replies "
        "hints at a reward that is being "
        "gamed.</p>"
    )
