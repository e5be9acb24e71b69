"""The page of a run: what it reached, before and after; how it got there; what the model said; with what settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_fast.pages import plots
from rlhf_fast.pages.page import duration, esc, figure, table_of, whole_page
from rlhf_fast.pages.plots import Rows, number
from rlhf_fast.runs.files import write_atomic
from rlhf_fast.runs.folder import page_of
from rlhf_fast.runs.metric_names import spoken

TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation",
    "ppo": "PPO",
}
# Metrics drawn together, with the name of the one that is of held-out data; any other is drawn by itself.
TOGETHER = {
    "loss": "heldout_loss",
    "accuracy": "heldout_accuracy",
    "margin": "heldout_margin",
    "score": "heldout_score",
}
UNITS = {
    "loss": "Loss, nats",
    "kl": "KL to the start, nats a response",
    "entropy": "Entropy, nats a token",
    "lr": "Learning rate",
    "grad_norm": "Length of the gradient",
    "response_tokens": "Length of responses, tokens",
    "reward": "Score less KL penalty",
    "seconds_rollout": "Sampling, seconds a step",
    "seconds_scoring": "Scoring, seconds a step",
    "seconds_training": "Training, seconds a step",
}
HIDDEN = ("step", "seconds")
SHOWN = 40  # samples of a step
TEXT_KEPT = 3000  # characters of a text


def write_run_report(run: str | Path) -> Path:
    """Write `run`/report.html from the files of a run that has ended, and return its path.

    One self-contained file: the same files give the same bytes. Plots need matplotlib; without it the page says so.

    Raises:
        FileNotFoundError: `run` holds no result.json.
        PageError: the page could not be made or written; the run is whole.
    """
    run = Path(run)
    if not (run / "result.json").is_file():
        raise FileNotFoundError(f"{run} has no result.json: it is no finished run")
    with page_of(run, write_run_report):
        write_atomic(run / "report.html", _page(run))
    return run / "report.html"


def _page(run: Path) -> str:
    result = json.loads((run / "result.json").read_text("utf-8"))
    rows = _rows(run / "metrics.jsonl")
    config = run / "config.yaml"
    sections = {
        "Before and after": _figures(result["summary"], rows),
        "Training": _curves(rows, TITLES.get(result["phase"], result["phase"])),
        "What it said": _samples(_rows(run / "samples.jsonl")),
        "Settings": f"<pre>{esc(config.read_text('utf-8', 'replace'))}</pre>" if config.is_file() else "",
    }
    body = "\n".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections.items() if text)
    title = esc(run.resolve().name)
    return whole_page(title, f"{_header(run, result, rows)}\n{body}")


def _rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] if path.is_file() else []


def _header(run: Path, result: dict[str, Any], rows: Rows) -> str:
    mark = run / "run.json"
    began = json.loads(mark.read_text("utf-8")) if mark.is_file() else {}
    steps = max((row["step"] for row in rows), default=0)
    took = f"{steps} steps in {duration(result['seconds'])}, at most {result['peak_rss_gb']:.1f} GB of memory"
    made = f"begun {began['began']} on {began['host']}, rlhf-fast {began['rlhf_fast']}" if "began" in began else ""
    outcome = f"its outcome is checkpoints/{result['checkpoint']}" if "checkpoint" in result else ""
    told = "; ".join(part for part in (took, made, outcome) if part)
    return (
        f'<header><p class="eyebrow">rlhf-fast · {esc(run.resolve().name)}</p>'
        f"<h1>{esc(TITLES.get(result['phase'], result['phase']))}: {_headline(result['summary'])}</h1>"
        f'<p class="note">{esc(told)}.</p></header>'
    )


def _headline(summary: dict[str, Any]) -> str:
    """The first figure that was measured before and after."""
    for name in summary:
        before = number(summary.get(f"{name}_before"))
        after = number(summary[name])
        if before is not None and after is not None:
            return f"{esc(spoken(name))} <em>{_short(before)} → {_short(after)}</em>"
    return "finished"


def _figures(summary: dict[str, Any], rows: Rows) -> str:
    both = [name for name in summary if f"{name}_before" in summary]
    pairs = [[esc(spoken(name)), _value(summary[f"{name}_before"]), _value(summary[name])] for name in both]
    table = table_of("What was measured before the first step and after the last", ["", "Before", "After"], pairs)
    rest = [name for name in summary if name not in both and not name.endswith("_before") and name != "notes"]
    others = table_of("Besides", ["", ""], [[esc(spoken(name)), _value(summary[name])] for name in rest])
    notes = "".join(f'<p class="note">{esc(note)}</p>' for note in summary.get("notes") or [])
    if both and not any(name.startswith("heldout_") for name in both) and rows:
        notes += '<p class="note">Before and after are the first and the last step, each of its own prompts.</p>'
    parts = [table if both else "", others if rest else ""]
    return notes + f'<div class="grid two">{"".join(parts)}</div>'


def _value(value: Any) -> str:
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        return f"{_short(value['mean'])} [{_short(value['low'])}, {_short(value['high'])}]"
    figure = number(value)
    return esc(value) if figure is None or isinstance(value, str) else _short(figure)


def _curves(rows: Rows, phase: str) -> str:
    if not plots.available():
        return "<p class=\"note\">Plots need matplotlib: <code>pip install 'rlhf-fast[report]'</code>, then again.</p>"
    names = list(dict.fromkeys(name for row in rows for name in row if name not in HIDDEN))
    heldout = set(TOGETHER.values())
    drawn = []
    for name in names:
        if name in heldout and any(TOGETHER.get(other) == name for other in names):
            continue  # with its training metric
        if name.endswith(("_low", "_high")):
            continue
        plot = plots.over_steps(rows, UNITS.get(name, spoken(name).capitalize()), phase, name, TOGETHER.get(name))
        drawn += [figure(plot)] if plot else []
    return f'<div class="grid">{"".join(drawn)}</div>' if drawn else ""


def _samples(rows: Rows) -> str:
    """Show what was said after the last step, and to the same prompt after the first."""
    steps = sorted({row["step"] for row in rows if "step" in row})
    if not steps:
        return ""
    first = {_text(row.get("prompt")): row for row in rows if row["step"] == steps[0]}
    folded = []
    for row in [row for row in rows if row["step"] == steps[-1]][:SHOWN]:
        prompt = _text(row.get("prompt"))
        said = [(f"after step {steps[-1]}", row, "")]
        if len(steps) > 1 and prompt in first:
            said.insert(0, (f"after step {steps[0]}", first[prompt], "b"))
        replies = "".join(_reply(when, each, colour) for when, each, colour in said)
        folded.append(
            f'<details><summary><span class="short" dir="auto">{prompt}</span></summary>'
            f'<p class="said prompt" dir="auto">{prompt}</p><div class="grid two">{replies}</div></details>'
        )
    return "".join(folded)


def _reply(when: str, row: dict[str, Any], colour: str) -> str:
    score = f"<b>{_short(number(row['score']))}</b>" if number(row.get("score")) is not None else ""
    ended = '<span class="muted">cut off</span>' if row.get("finished") is False else ""
    return (
        f'<div class="reply {colour}"><p class="who"><b>{when}</b>{ended}{score}</p>'
        f'<p class="said" dir="auto">{_text(row.get("text"))}</p></div>'
    )


def _text(value: Any) -> str:
    text = str(value if value is not None else "")
    more = f" … ({len(text) - TEXT_KEPT} more characters)" if len(text) > TEXT_KEPT else ""
    return esc(text[:TEXT_KEPT] + more)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 6) + 0.0:.4g}".replace("-", "−")  # no −0, nor rounding errors
