"""The page of a reward model: how far it agrees with people, on what, how sure it should be, and where it fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_fast.data.records import prompt_text
from rlhf_fast.pages import plots
from rlhf_fast.pages.page import esc, figure, fmt, table_of, whisker, whole_page
from rlhf_fast.runs.files import write_atomic
from rlhf_fast.runs.folder import page_of
from rlhf_fast.statistics.agreement import ceiling
from rlhf_fast.statistics.intervals import Interval

SHOWN = 40  # comparisons, those that it disagrees with most
TEXT_KEPT = 3000  # characters of a text
TITLES = {
    "split": "Split",
    "category": "Category",
    "annotator": "Annotator",
    "margin": "Margin that the annotator gave",
    "confidence": "Annotator's confidence",
    "score_difference": "Distance of the two scores",
}
COLOURS = {"aim reached": "a", "too few to tell": "even", "below the aim": "even", "do not train on it": "b"}
Figures = dict[str, Any]


def write_reward_report(run: str | Path, agreement: Mapping[str, Any] | None = None) -> Path:
    """Write `run`/report.html from what a reward model's training has left there, and return its path.

    One self-contained file: the same files give the same bytes. Plots need matplotlib; without it the page says so.

    Args:
        run: the folder of a finished run.
        agreement: how far the annotators agreed when the comparisons were collected, as their provenance has it:
            `mean` and, if known, `low` and `high`, shares of votes between two sides, and `source`, a few words. What
            it lets a model reach is printed beside its accuracy. None: what the comparisons themselves say, if any.

    Raises:
        FileNotFoundError: `run` holds no reward_report.json.
        ValueError: an agreement that is no share.
        PageError: the page could not be made or written; the run is whole.
    """
    run = Path(run)
    given = None if agreement is None else _agreed(agreement)
    source = "" if agreement is None else str(agreement.get("source", ""))
    file = run / "reward_report.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no reward_report.json: it is no finished run of a reward model")
    with page_of(run, write_reward_report):
        write_atomic(run / "report.html", _page(run, json.loads(file.read_text("utf-8")), given, source))
    return run / "report.html"


def _page(run: Path, report: Figures, given: Interval | None, source: str) -> str:
    if "accuracy" not in report:  # nothing was held out
        return whole_page(esc(run.resolve().name), _unmeasured(report, run.resolve().name))
    known = given or _interval(report["people"]["agreement"])
    reach = _reach(known, source, report["people"].get("model_on_votes")) if known else ""
    curve = _rows(run / "metrics.jsonl")
    samples = _rows(run / "samples.jsonl")
    sections = {
        "Agreement": _agreement(report),
        "Calibration and scores": _plots(report, curve),
        "Length": _length(report["length"]),
        "People": _people(report["people"]),
        "Heads": _heads(report["heads"]),
        "Where it disagrees": _disagreements(samples),
        "How to read this page": _guide(report),
    }
    title = esc(run.resolve().name)
    body = "\n".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections.items() if text)
    return whole_page(title, f"{_header(report, title)}{_cards(report, reach)}\n{body}")


def _rows(path: Path) -> list[Figures]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] if path.is_file() else []


def _interval(value: Figures | None) -> Interval | None:
    return None if not value or value["low"] is None else Interval(value["mean"], value["low"], value["high"])


def _agreed(value: Mapping[str, Any]) -> Interval:
    """People's agreement as it was given, checked."""
    mean = value.get("mean")
    ends = [mean if value.get(key) is None else value[key] for key in ("low", "high")]
    numbers = [float(end) for end in (mean, *ends) if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(numbers) < 3:
        raise ValueError(f"agreement: {dict(value)} came; expected a mean, and perhaps low and high, from 0 to 1")
    interval = Interval(*numbers)
    ceiling(interval)  # refuses what is no share
    if not interval.low <= interval.mean <= interval.high:
        raise ValueError(f"agreement: {interval} came; expected the mean between low and high")
    return interval


def _reach(agreement: Interval, source: str, on_votes: Figures | None) -> str:
    """Write the last line of the accuracy's card: the accuracy that the annotators' agreement lets any model reach."""
    found = ceiling(agreement)
    by = f" ({esc(source)})" if source else ""
    ends = ""
    if agreement.low < agreement.high:
        ends = f", or {fmt(found.least, 0, unit='%')} to {fmt(found.most, 0, unit='%')} by its interval"
    of_votes = f"Of single votes it agrees with {fmt(on_votes['mean'], 0, unit='%')}. " if on_votes else ""
    return (
        f"<span>{of_votes}People agree on {fmt(agreement.mean, 0, unit='%')}{by}: a model of the majority reaches "
        f"{fmt(found.low, 0, unit='%')} to {fmt(found.high, 0, unit='%')}{ends}</span>"
    )


def _ends(interval: Interval | None) -> str:
    return f"[{fmt(interval.low, 0, unit='%')}, {fmt(interval.high, 0, unit='%')}]" if interval else "no interval"


def _header(report: Figures, title: str) -> str:
    accuracy, verdict = _interval(report["accuracy"]), report["verdict"]
    notes = "".join(f"{note[0].upper()}{note[1:]}. " for note in report["notes"])
    return (
        f'<header><p class="eyebrow">rlhf-fast · reward model · {title}</p><h1>It agrees with '
        f'<em class="{COLOURS[verdict]}">{fmt(report["accuracy"]["mean"], 0, unit="%")}</em> <span class="nowrap">'
        f"{_ends(accuracy)}</span> of {report['comparisons']} held-out comparisons: {esc(verdict)}.</h1>"
        f'<p class="note">{esc(notes)}The aim is {fmt(report["aim"], 0, unit="%")}; below '
        f"{fmt(report['gate'], 0, unit='%')} PPO refuses to start.</p></header>"
    )


def _unmeasured(report: Figures, name: str) -> str:
    notes = " ".join(f"{note[0].upper()}{note[1:]}." for note in report["notes"])
    people = _people(report["people"])
    return (
        f'<header><p class="eyebrow">rlhf-fast · reward model · {esc(name)}</p><h1>Its agreement is '
        f'<em class="even">{esc(report["verdict"])}</em>.</h1><p class="note">{esc(notes)}</p></header>\n'
        f"<section><h2>People</h2>{people}</section>"
    )


def _cards(report: Figures, reach: str = "") -> str:
    def share(title: str, value: Figures | None, note: str, unknown: str = "", more: str = "") -> str:
        if value is None:
            return _card(title, "–", f"<span>{unknown}</span>")
        interval = _interval(value)
        rest = f"{whisker(interval, 0.5, 0, 1)}<span>{_ends(interval)}</span><span>{note}</span>{more}"
        return _card(title, fmt(value["mean"], 0, unit="%"), rest)

    calibration, length = report["calibration"], report["length"]
    temperature = calibration["temperature"]
    return '<dl class="cards">{}</dl>'.format(
        "".join(
            [
                share("Agreement", report["accuracy"], f"{report['prompts']} held-out prompts", more=reach),
                share("People with each other", report["people"]["agreement"], "on the same pair", "not known"),
                share("Always the longer", length["always_longer"], "a rule that reads nothing"),
                _card(
                    "Calibration error",
                    fmt(calibration["ece"]),
                    f"<span>{fmt(calibration['ece_if_calibrated'])} by chance alone</span>",
                ),
                _card("Brier score", fmt(calibration["brier"], 3), "<span>0.25: one half each time</span>"),
                _card("Temperature", fmt(temperature), "<span>above 1: too sure of itself</span>"),
            ]
        )
    )


def _card(title: str, value: str, rest: str) -> str:
    return f"<div><dt>{title}</dt><dd><b>{value}</b>{rest}</dd></div>"


def _table(caption: str, first: str, rows: list[Figures]) -> str:
    """Agreement in each of the rows' comparisons; those that have none are left out."""
    cells = []
    for row in rows:
        if row["accuracy"] is not None:
            interval = _interval(row["accuracy"])
            cells.append(
                [
                    esc(row["name"]),
                    str(row["prompts"]),
                    str(row["comparisons"]),
                    fmt(row["accuracy"]["mean"], 0, unit="%"),
                    f'<span class="muted">{_ends(interval)}</span>',
                    whisker(interval, 0.5, 0, 1),
                ]
            )
    head = [first, "Prompts", "Comparisons", "Agreement", "95% interval", "0 to 100%, with a tick at one half"]
    return table_of(caption, head, cells) if cells else ""


def _agreement(report: Figures) -> str:
    tables = "".join(_table(f"By {TITLES[key].lower()}", TITLES[key], rows) for key, rows in report["by"].items())
    return tables or '<p class="note">The comparisons have no labels that tell some of them from others.</p>'


def _plots(report: Figures, curve: list[Figures]) -> str:
    if not plots.available():
        return "<p class=\"note\">Plots need matplotlib: <code>pip install 'rlhf-fast[report]'</code>, then again.</p>"
    drawn = [
        plots.reliability(report["calibration"]["bins"]),
        plots.distribution(report["scores"]["histogram"]),
        *plots.curves([], curve, []),
    ]
    note = f"Scores are set to mean 0 and deviation 1 over {report['scores']['over']}."
    return f'<p class="note">{esc(note)}</p><div class="grid">{"".join(map(figure, drawn))}</div>'


def _length(length: Figures) -> str:
    beyond = length["beyond_longer"]
    ends = f"[{fmt(beyond['low'], 0, True, '%')}, {fmt(beyond['high'], 0, True, '%')}]"
    said = (
        f"Correlation of score and length over responses: {fmt(length['score_correlation'])}; of the differences in a "
        f"pair: {fmt(length['difference_correlation'])}. Beyond always choosing the longer: "
        f"{fmt(beyond['mean'], 0, True, '%')} {ends}."
    )
    rows = [{**length[f"chosen_{name}"], "name": name} for name in ("longer", "shorter", "same")]
    return f'<p class="note">{said}</p>{_table("By the length of the chosen response", "The chosen one is", rows)}'


def _people(people: Figures) -> str:
    agreement, itself = people["agreement"], people["with_themselves"]
    if agreement is None:
        said = (
            "How far annotators agree is not known: no pair was judged by two of them. Let a second person judge some "
            "200 pairs, and give both rows the same texts and each its annotator."
        )
    else:
        low, high = people["reach"]
        said = (
            f"Annotators agree on {fmt(agreement['mean'], 0, unit='%')} {_ends(_interval(agreement))} of the "
            f"{people['pairs_judged_by_several']} pairs that several of them judged. By single votes like these even a "
            "model that always knew the majority would be right on "
            f"{fmt(low, 0, unit='%')} (if pairs are either clear or a toss-up) to {fmt(high, 0, unit='%')} (if all are "
            "alike)."
        )
    if itself is not None:
        said += (
            f" Asked again, a person says the same on {fmt(itself['mean'], 0, unit='%')} {_ends(_interval(itself))}."
        )
    said += (
        f" {fmt(people['contradictory'], 1, unit='%')} of all comparisons lie on a cycle of preferences, which no "
        "order of the responses satisfies."
    )
    return f'<p class="note">{said}</p>'


def _heads(heads: Figures | None) -> str:
    if heads is None:
        return ""
    each = ", ".join(fmt(accuracy, 0, unit="%") for accuracy in heads["accuracies"])
    said = f"Agreement of each head: {each}. Their deviation is on average {fmt(heads['disagreement'])} of the score's."
    rows = [heads["at_one"], heads["divided"]]
    return f'<p class="note">{said}</p>{_table("By whether the heads name the same winner", "The heads are", rows)}'


def _disagreements(samples: list[Figures]) -> str:
    """Show those of the rows, which come worst first, where the rejected response scores higher."""
    wrong = [row for row in samples if row["chosen_score"] < row["rejected_score"]]
    if not wrong:
        return ""
    folded = []
    for row in wrong[:SHOWN]:
        gap = row["chosen_score"] - row["rejected_score"]
        prompt = _text(prompt_text(row["prompt"]))
        sides = "".join(
            f'<div class="reply {colour}"><p class="who"><b>{side}</b><b>{fmt(row[f"{side}_score"])}</b></p>'
            f'<p class="said" dir="auto">{_text(prompt_text(row[side]))}</p></div>'
            for side, colour in (("chosen", "a"), ("rejected", "b"))
        )
        folded.append(
            f'<details><summary><span class="gap b">{fmt(gap)}</span> <span class="tag">{esc(row.get("category", ""))}'
            f'</span> <span class="short" dir="auto">{prompt}</span></summary>'
            f'<p class="said prompt" dir="auto">{prompt}</p><div class="grid two">{sides}</div></details>'
        )
    more = f", of which the {SHOWN} worst are shown" if len(wrong) > SHOWN else ""
    note = f"{len(wrong)} of {len(samples)} comparisons whose rejected response scores higher{more}, the worst first."
    return f'<p class="note">{note}</p><div id="sample-list">{"".join(folded)}</div>'


def _text(text: str) -> str:
    more = f" … ({len(text) - TEXT_KEPT} more characters)" if len(text) > TEXT_KEPT else ""
    return esc(text[:TEXT_KEPT] + more)


def _guide(report: Figures) -> str:
    alone = report["alone"]
    return (
        "<p>All figures are of prompts that nothing was trained on; their 95% intervals come from drawing whole "
        "prompts anew. A tie counts half. Probabilities are the sigmoid of the difference of the scores; the "
        "calibration error is the mean distance of predicted from observed in bins of equal mass, and even a perfect "
        "model has some on few comparisons. The temperature was fitted to these same comparisons. There is no check of "
        "the order in which two responses are shown: each is scored by itself, so the other order gives the same "
        "difference with the other sign, and preferences by score have no cycles. What could depend on company is "
        f"measured: {alone['texts']} texts scored alone are at most {alone['most_deviations']:.1e} deviations from "
        "their scores in a batch.</p>"
    )
