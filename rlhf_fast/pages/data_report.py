"""A survey of a data file (data/survey.py) for people: as text in the terminal, and as a page."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_fast.data.survey import Lengths, Piece, Survey
from rlhf_fast.pages import plots
from rlhf_fast.pages.page import esc, figure, table_of, whole_page
from rlhf_fast.runs.files import write_atomic
from rlhf_fast.runs.terminal import printable

BLOCKS = "▁▂▃▄▅▆▇█"
SAID_KEPT = 1200  # characters of a run of tokens that are shown; of a longer one its two ends
PROBLEM_KEPT = 300  # characters of what is wrong with a row
_PAGE = " · data · rlhf-fast</title>"  # by which a page of ours is known


# In the terminal ------------------------------------------------------------------------------------------------------


def in_colour(stream: Any) -> bool:
    """Return whether a terminal shows colours, and nobody wants none."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


def as_text(
    survey: Survey,
    source: str,
    model: str,
    colour: bool = False,
    width: int | None = None,
    encoding: str | None = None,
) -> str:
    """Write a survey as text, without what a terminal would obey but for colours.

    Args:
        colour: learned tokens are green; else they stand in ⟦brackets⟧.
        width: of a line; None: lines are as long as they are.
        encoding: what it cannot write becomes question marks.
    """
    parts = [
        [f"{_one_line(source)}: {_headline(survey)}"],
        _columns(_counts(survey), width),
        _length_lines(survey, model),
        _problem_lines(survey, width),
        _example_lines(survey, colour, width),
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part)
    return text.encode(encoding or "utf-8", "replace").decode(encoding or "utf-8")


def _headline(survey: Survey) -> str:
    if survey.kind is None:
        return f"none of {survey.rows:,} rows can be used"
    kind = survey.kind if survey.rows > 1 else survey.kind[:-1]
    if survey.usable == survey.rows:
        return f"{survey.rows:,} {kind}, all usable"
    are = "is" if survey.usable == 1 else "are"
    return f"{_rows(survey.rows)}, of which {survey.usable:,} {are} usable as {survey.kind}"


def _counts(survey: Survey) -> list[tuple[str, str]]:
    """(name, what there is to say) of the rows of the kind that most are of."""
    if survey.kind is None:
        return []
    named = {name or "none named": count for name, count in survey.splits.items()}
    facts = [("splits", ", ".join(f"{name} {count:,}" for name, count in sorted(named.items())))]
    said = f"{_rows(survey.duplicate_rows)}; the prompts of {_rows(survey.duplicate_prompts)} stand in rows before them"
    facts.append(("duplicates", said if survey.duplicate_rows or survey.duplicate_prompts else "none"))
    if survey.kind == "comparisons":
        left_out = ", which training leaves out" if survey.identical_sides else ""
        facts.append(("same answers", f"chosen and rejected are the same in {_rows(survey.identical_sides)}{left_out}"))
    if survey.spelled_out:
        facts.append(("special tokens", f"spelled out in the texts of {_rows(survey.spelled_out)}"))
    facts.append(("max_length", _overlong(survey)))
    return facts


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _overlong(survey: Survey) -> str:
    """Say what would be cut or dropped."""
    fewer = " (the model has no more positions)" if survey.limit < survey.max_length else ""
    limit = f"{survey.limit:,} tokens{fewer}"
    if not survey.longer:
        return f"no row is longer than {limit}"
    lost = f", and {_rows(survey.lost)} left out of which nothing remains" if survey.lost else ""
    left = survey.usable - (survey.longer - survey.lost if survey.overlong == "truncate" else 0)
    ways = {
        "error": f"training refuses {'it' if survey.longer == 1 else 'them'}",
        "truncate": f"{survey.beyond:,} tokens are cut{lost}",
        "drop": f"{_rows(left)} {'is' if left == 1 else 'are'} left",
    }
    now = ways.pop(survey.overlong)
    others = "".join(f"; with overlong = {name} {said}" for name, said in ways.items())
    return f"{_rows(survey.longer)} longer than {limit}: {now}{others}"


def _columns(pairs: list[tuple[str, str]], width: int | None) -> list[str]:
    lines = []
    for name, said in pairs:
        first, *rest = textwrap.wrap(_one_line(said), max(20, (width or 1 << 20) - 17)) or [""]
        lines += [f"  {name:<14} {first}", *(f"{'':17}{line}" for line in rest)]
    return lines


def _length_lines(survey: Survey, model: str) -> list[str]:
    if not survey.lengths:
        return []
    lines = [f"  {'tokens':<14} {'p5':>6} {'p50':>6} {'p95':>6} {'max':>7}   by the tokenizer of {_one_line(model)}"]
    for name, lengths in survey.lengths.items():
        numbers = f"{lengths.p5:>6,} {lengths.p50:>6,} {lengths.p95:>6,} {lengths.max:>7,}"
        lines.append(f"  {name:<14} {numbers}   {lengths.edges[0]:,} {blocks(lengths.counts)} {_last(lengths)}")
    return lines


def blocks(counts: list[int]) -> str:
    """A histogram in a line; where there is anything at all, something shows."""
    most = max(counts) or 1
    return "".join(" " if not count else BLOCKS[-(-count * len(BLOCKS) // most) - 1] for count in counts)


def _last(lengths: Lengths) -> str:
    """The longest of the last bin, with a plus where longer ones are in it too."""
    last = min(lengths.edges[-1] - 1, lengths.max)
    return f"{last:,}{'+' * (lengths.max > last)}"


def _problem_lines(survey: Survey, width: int | None) -> list[str]:
    if not survey.refused:
        return []
    lines = [f"  problems: training would refuse {survey.refused:,} of {_rows(survey.rows)}"]
    lines += _columns([(f"line {problem.line}", _shortened(problem.what)) for problem in survey.problems], width)
    if survey.more_problems:
        lines.append(f"  and {survey.more_problems:,} more")
    return lines


def _example_lines(survey: Survey, colour: bool, width: int | None) -> list[str]:
    lines = [f"  line {line} is not shown: it is no row that can be used" for line in survey.not_shown]
    note = f"; what is learned is {'green' if colour else 'in ⟦brackets⟧'}"
    for example in survey.examples:
        for name, pieces in example.conversations.items():
            lines += [*([""] if lines else []), f"  line {example.line}{', ' * bool(name)}{name}{note}"]
            text = "".join(_marked(piece, colour) for piece in _folded(pieces, width))
            lines += [f"  │ {line}" for line in text.split("\n")]
            note = ""  # it is said once
    return lines


def _folded(pieces: list[Piece], width: int | None) -> Iterator[Piece]:
    """End lines between words where the terminal would end them anyway, so that each begins with a bar."""
    room, column = max(20, (width or 1 << 20) - 4), 0
    for piece in pieces:
        parts = []
        text = printable(_ends_of(piece.text)).replace("\t", "    ")
        for word, spaces in re.findall(r"(\n|[^\s]*)([^\S\n]*)", text):
            if word != "\n" and column and column + len(word) > room:
                parts.append("\n")
                column = 0
            lines = [word[i : i + room] for i in range(0, len(word), room)] or [""]
            parts.append("\n".join(lines))
            column = 0 if word == "\n" else column * (len(lines) == 1) + len(lines[-1])
            parts.append(spaces[: room - column])
            column = min(room, column + len(spaces))
        yield Piece("".join(parts), piece.learned, piece.special)


def _marked(piece: Piece, colour: bool) -> str:
    if not colour:
        return f"⟦{piece.text}⟧" if piece.learned else piece.text
    style = {(True, False): "32", (True, True): "1;32", (False, True): "2"}.get((piece.learned, piece.special))
    # Each line by itself, as a bar stands before it.
    return "\n".join(f"\033[{style}m{line}\033[0m" if style and line else line for line in piece.text.split("\n"))


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _shortened(text: str) -> str:
    return text if len(text) <= PROBLEM_KEPT else f"{text[:PROBLEM_KEPT]} ..."


def _ends_of(text: str) -> str:
    """The two ends of a long text."""
    half = SAID_KEPT // 2
    if len(text) <= SAID_KEPT:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


# As a page ------------------------------------------------------------------------------------------------------------


def require_page(path: Path) -> None:
    """Require that a page can be written without anything else being lost.

    Raises:
        ValueError: there is something else; says what to do.
    """
    if path.suffix != ".html":
        raise ValueError(f"out: {path}; expected the name of a page, which ends in .html")
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            ours = _PAGE in file.read(4096)
    except OSError as error:
        raise ValueError(f"out: {path} is there and cannot be read: {error.strerror}; choose another name") from error
    if not ours:
        raise ValueError(f"out: {path} is there and is no page of `rlhf-fast data`; choose another name")


def write_page(path: Path, survey: Survey, source: str, model: str) -> None:
    """Write one self-contained file. Plots need matplotlib; without it the page says so."""
    sections = {
        "Problems": _problem_section(survey),
        "What there is": _count_table(survey),
        "Lengths": _length_section(survey),
        "Records": _example_section(survey),
        "How to read this page": _guide(survey),
    }
    body = "\n".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections.items() if text)
    verdict = "a" if not survey.refused else "b"
    header = (
        f'<header><p class="eyebrow">rlhf-fast · data · {esc(Path(source).name)}</p><h1><em class="{verdict}">'
        f'{esc(_headline(survey))}</em></h1><p class="note">Tokens of {esc(model)}.</p></header>'
    )
    page = whole_page(f"{esc(Path(source).name)} · data", f"{header}{_cards(survey)}\n{body}")
    write_atomic(path, page.replace("</style>", f"{_STYLE}</style>", 1))


def _cards(survey: Survey) -> str:
    whole = next(reversed(survey.lengths.values()), None)
    figures: list[tuple[str, str, str]] = [
        ("Rows", f"{survey.rows:,}", survey.kind or "of no kind"),
        ("Usable", f"{survey.usable:,}", "as training is set"),
        ("Refused", f"{survey.refused:,}", "see the problems" if survey.refused else "none"),
        ("Longer than max_length", f"{survey.longer:,}", f"{survey.limit:,} tokens"),
    ]
    if whole:
        figures += [
            ("Median length", f"{whole.p50:,}", "tokens of a row"),
            ("Longest row", f"{whole.max:,}", "tokens"),
        ]
    cards = (
        f"<div><dt>{name}</dt><dd><b>{value}</b><span>{esc(note)}</span></dd></div>" for name, value, note in figures
    )
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _count_table(survey: Survey) -> str:
    rows = [[esc(name), f'<span class="words">{esc(said)}</span>'] for name, said in _counts(survey)]
    return table_of("Of the rows that can be read", ["", ""], rows) if rows else ""


def _length_section(survey: Survey) -> str:
    if not survey.lengths:
        return ""
    cells = [
        [esc(name), *(f"{x:,}" for x in (lengths.p5, lengths.p50, lengths.p95, lengths.max, lengths.total))]
        for name, lengths in survey.lengths.items()
    ]
    table = table_of("Tokens", ["Part", "p5", "Median", "p95", "Longest", "Together"], cells)
    if not plots.available():
        note = "<p class=\"note\">Plots need matplotlib: <code>pip install 'rlhf-fast[report]'</code>, then again.</p>"
        return table + note
    drawn = (
        plots.histogram(
            f"{name}, rows by tokens",
            "Lengths",
            lengths.edges,
            lengths.counts,
            f"tokens; the last bin goes up to {lengths.max:,}" if lengths.max >= lengths.edges[-1] else "tokens",
        )
        for name, lengths in survey.lengths.items()
    )
    return f'{table}<div class="grid">{"".join(map(figure, drawn))}</div>'


def _problem_section(survey: Survey) -> str:
    if not survey.refused:
        return '<p class="note">None: training takes every row.</p>'
    rows = [
        [str(problem.line), f'<span class="words">{esc(_shortened(" ".join(problem.what.split())))}</span>']
        for problem in survey.problems
    ]
    more = f'<p class="note">And {survey.more_problems:,} more.</p>' if survey.more_problems else ""
    head = ["Line", '<span class="words">What is wrong</span>']
    return table_of("Rows that training would refuse", head, rows) + more


def _example_section(survey: Survey) -> str:
    rows = []
    for example in survey.examples:
        sides = "".join(
            f'<div class="reply"><p class="who"><b>{esc(name or "as it is learned")}</b></p>'
            f'<p class="said" dir="auto">{_html(pieces)}</p></div>'
            for name, pieces in example.conversations.items()
        )
        rows.append(
            f"<details open><summary>Line {example.line}</summary>"
            f'<div class="{"grid two" if len(example.conversations) > 1 else ""}">{sides}</div></details>'
        )
    missing = "".join(
        f'<p class="note">Line {line} is not shown: it is no row that can be used.</p>' for line in survey.not_shown
    )
    if not rows:
        return missing
    note = '<p class="note">What is learned is <mark>marked</mark>; special tokens are <code>set like this</code>.</p>'
    return f"{missing}{note}{''.join(rows)}"


def _html(pieces: Iterable[Piece]) -> str:
    parts = []
    for piece in pieces:
        text = esc(_ends_of(piece.text))
        text = f"<code>{text}</code>" if piece.special else text
        parts.append(f"<mark>{text}</mark>" if piece.learned else text)
    return "".join(parts)


def _guide(survey: Survey) -> str:
    answer = {
        "comparisons": "of a comparison the two answers are shown behind their prompt, and the longer of both counts",
        "prompts": "of a prompt nothing is learned; it must leave room for an answer",
    }.get(str(survey.kind), "of a demonstration the assistant's turns are learned, through the tokens that end them")
    return (
        "<p>Every row was read and tokenised as the trainers do it, with the chat template and the settings of this "
        f"call: {answer}. Percentiles are lengths that rows have. Two rows are duplicates if they hold the same, two "
        "prompts if their tokens are the same.</p>"
    )


_STYLE = """
mark { background: color-mix(in srgb, var(--a) 20%, transparent); color: inherit; border-radius: 3px; }
.words { display: block; white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 16em; }
td:has(.words) { width: 100%; }
.who b:only-child { margin: 0; }
.said code { color: var(--muted); }
"""
