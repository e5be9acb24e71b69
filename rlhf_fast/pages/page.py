"""Build pages: escaped text, numbers, intervals, tables, and a shell that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import html
from typing import Any

from rlhf_fast.pages.plots import Plot
from rlhf_fast.statistics.intervals import Interval

SAMPLES_SHOWN = 60  # at once: elements are what makes a page slow


def whole_page(title: str, body: str) -> str:
    """A complete HTML document around `body`; both must be escaped already."""
    # Even if some text were not escaped, the browser would run no script but ours and load nothing.
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{allowed}'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title} · rlhf-fast</title><style>{_STYLE}</style>'
        f"</head><body><main>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def esc(value: Any) -> str:
    """Escape any value for an element or an attribute; half characters that UTF-8 cannot hold become '?'."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def fmt(value: float | None, digits: int = 2, sign: bool = False, unit: str = "") -> str:
    """A number with `digits` decimals; a share as a per cent when `unit` is "%"."""
    if value is None:
        return "–"
    text = f"{100 * value if unit == '%' else value:{'+' if sign else ''}.{digits}f}"
    return (text if float(text) else text.lstrip("+-")).replace("-", "−") + unit


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"


def whisker(interval: Interval | None, null: float, low: float, high: float) -> str:
    """An interval drawn on the scale from `low` to `high`, with a tick where there would be no effect."""
    if interval is None:
        return ""
    span = (high - low) or 1.0
    spot = [100 * min(1.0, max(0.0, (x - low) / span)) for x in (interval.low, interval.high, interval.mean, null)]
    side = "b" if interval.high < null else "a" if interval.low > null else "even"
    return (
        f'<span class="ci {side}" aria-hidden="true" style="--l:{spot[0]:.1f}%;--w:{spot[1] - spot[0]:.1f}%;'
        f'--m:{spot[2]:.1f}%;--z:{spot[3]:.1f}%"></span>'
    )


def table_of(caption: str, head: list[str], rows: list[list[str]], foot: list[str] | None = None) -> str:
    """A table of ready HTML cells whose first column names the row; it scrolls by itself on a narrow screen."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)

    def line(cells: list[str]) -> str:
        return f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>'

    end = f"<tfoot>{line(foot)}</tfoot>" if foot else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f"<table><caption><span>{caption}</span></caption><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(map(line, rows))}</tbody>{end}</table></div>"
    )


def figure(plot: Plot) -> str:
    """A drawing under its title."""
    keys = "".join(f'<span class="key {colour}">{esc(label)}</span>' for label, colour in plot.legend)
    change = f'<span class="change">{esc(plot.change)}</span>' if plot.change else ""
    return (
        f'<figure><figcaption><span class="eyebrow">{esc(plot.phase)}</span><span class="title">{esc(plot.title)}'
        f'{change}</span><span class="keys">{keys}</span></figcaption>{plot.svg}</figure>'
    )


def bar(share: float) -> str:
    return f'<span class="bar" aria-hidden="true"><i style="--v:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


_SCRIPT = """
(() => {
  const form = document.getElementById("filter"), list = document.getElementById("sample-list");
  if (!form) return;
  // All samples wait in a template, outside of the document; at most SHOWN of them are in the page at once.
  const all = [...list.children, ...document.getElementById("more").content.children];
  const texts = new Map(all.map(one => [one, one.textContent.toLowerCase()]));
  const {q, c, o} = form.elements;
  const show = () => {
    const wanted = q.value.trim().toLowerCase();
    const found = all.filter(one => (!c.value || one.dataset.category === c.value) && texts.get(one).includes(wanted));
    if (o.value) found.reverse();
    list.replaceChildren(...found.slice(0, SHOWN));
    form.querySelector("output").textContent = Math.min(found.length, SHOWN) + " of " + found.length + " shown";
  };
  const stored = new URLSearchParams(location.hash.slice(1));
  for (const field of [q, c, o]) field.value = stored.get(field.name) || "";
  if ([q, c, o].some(field => field.value)) show();
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", () => {
    show();
    const state = new URLSearchParams([q, c, o].filter(field => field.value).map(field => [field.name, field.value]));
    try { history.replaceState(null, "", "#" + state); } catch { /* a page opened from a file may not be allowed to */ }
  });
})();
""".replace("SHOWN", str(SAMPLES_SHOWN))

_STYLE = """
:root { color-scheme: light dark; --paper: #faf9f6; --card: #fff; --ink: #1d1c1a; --muted: #625e57; --line: #e3dfd6;
  --soft: #f1eee7; --a: #1f6feb; --b: #bc5a14; --even: #6b6760;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Cambria, Georgia, serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #131417; --card: #1b1d21; --ink: #eae7e1; --muted: #a8a39a;
  --line: #33353a; --soft: #24262b; --a: #6ea8fe; --b: #f0a05f; --even: #9a958c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans);
  font-variant-numeric: tabular-nums; }
main { max-width: 1180px; margin: 0 auto; padding: clamp(20px, 4vw, 56px) clamp(16px, 3vw, 32px) 72px; }
section { margin-top: clamp(36px, 5vw, 60px); }
h1 { font: 500 clamp(1.6rem, 1.1rem + 2.2vw, 2.7rem)/1.18 var(--serif); letter-spacing: -.012em; max-width: 30em;
  margin: .35em 0 .5em; text-wrap: balance; }
h1 em { font-style: normal; color: var(--even); }
h1 em.a { color: var(--a); }
h1 em.b { color: var(--b); }
h2 { font: 500 1.5rem/1.2 var(--serif); margin: 0 0 1rem; }
.nowrap { white-space: nowrap; }
.eyebrow { font-size: .75rem; letter-spacing: .07em; text-transform: uppercase; color: var(--muted); margin: 0;
  overflow-wrap: anywhere; }
.note, .muted { color: var(--muted); }
.note { text-wrap: pretty; max-width: 72ch; margin: 0 0 1rem; font-size: .94rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: .94rem; }
nav a { color: var(--a); text-underline-offset: .2em; padding: 4px 0; }
code, pre { font: .86em/1.5 ui-monospace, "Cascadia Code", Menlo, Consolas, monospace; }
pre { overflow-x: auto; margin: 0; padding: 12px 14px; background: var(--soft); border-radius: 8px; }
figure, .scroll, details, .cards { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
:focus-visible { outline: 2px solid var(--a); outline-offset: 2px; }

.cards { display: grid; grid-template-columns: repeat(6, 1fr); gap: 1px; background: var(--line); overflow: hidden;
  margin: 2rem 0 0; }
.cards > div { background: var(--card); padding: 16px 18px; min-width: 0; }
dt { font-size: .84rem; color: var(--muted); }
dd { margin: 0; }
.cards b { display: block; font: 500 1.8rem/1.3 var(--serif); white-space: nowrap; }
.cards b small { font-size: 1rem; }
.cards dd > span:not(.ci) { display: block; font-size: .82rem; color: var(--muted); }
.ci { position: relative; display: block; height: 12px; margin: 6px 0; color: var(--even); background:
  linear-gradient(var(--muted), var(--muted)) var(--z) 0/1px 100% no-repeat,
  linear-gradient(var(--line), var(--line)) 0 50%/100% 2px no-repeat; }
.ci::before { content: ""; position: absolute; left: var(--l); width: max(var(--w), 3px); top: 4px; height: 4px;
  border-radius: 2px; background: currentColor; opacity: .55; }
.ci::after { content: ""; position: absolute; left: calc(var(--m) - 5px); top: 1px; width: 10px; height: 10px;
  border-radius: 50%; background: currentColor; }
.ci.a, .gap.a, .who b:first-child { color: var(--a); }
.ci.b, .gap.b, .reply.b .who b:first-child { color: var(--b); }

.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px; }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); align-items: start; }
figure { display: flex; flex-direction: column; margin: 0; padding: 14px 16px 8px; min-width: 0; }
figcaption { display: grid; margin-bottom: 6px; }
.title { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-weight: 600;
  font-size: .95rem; }
.change { font-weight: 400; color: var(--muted); white-space: nowrap; }
.keys { font-size: .8rem; color: var(--muted); }
.key { margin-right: 14px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: var(--a);
  vertical-align: middle; margin-right: 6px; }
.key.b::before { background: var(--b); }
.key.muted::before { background: var(--muted); }
.plot { display: block; width: 100%; height: auto; margin-top: auto; overflow: visible; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text { font-family: var(--sans) !important; }

.scroll { overflow-x: auto; padding: 4px 16px 8px; margin-bottom: 16px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; font-weight: 600; font-size: .95rem; padding: 10px 0 6px; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 64px); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 7px 16px 7px 0; text-align: right; border-top: 1px solid var(--line); white-space: nowrap;
  font-weight: 400; }
th:first-child { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
thead th { border: 0; color: var(--muted); font-size: .82rem; }
tfoot th, tfoot td { font-weight: 600; }
td .ci { min-width: 160px; margin: 0; }
.bar { display: block; min-width: 140px; height: 8px; border-radius: 4px; background: var(--soft); }
.bar i, .ratings i { display: block; height: 100%; width: var(--v); border-radius: 4px; background: var(--a); }

.filter { display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: center; margin-bottom: 14px; font-size: .9rem;
  color: var(--muted); }
.filter label { display: flex; gap: 8px; align-items: center; }
.filter input, .filter select { font: inherit; color: var(--ink); background: var(--card); max-width: 100%;
  border: 1px solid var(--muted); border-radius: 8px; padding: 6px 10px; min-height: 40px; }
.filter output { margin-left: auto; }
details { margin-bottom: 8px; padding: 0 16px; }
details[open] { padding-bottom: 16px; }
summary { cursor: pointer; padding: 10px 0; }
details .scroll { border: 0; padding: 0; margin: 0; }
#sample-list { min-height: 240px; }
#sample-list details { border-radius: 0; margin: 0 0 -1px; }
#sample-list details:first-child { border-radius: 12px 12px 0 0; }
#sample-list details:last-child { border-radius: 0 0 12px 12px; }
#sample-list details:only-child { border-radius: 12px; }
#sample-list summary { display: flex; gap: 12px; align-items: baseline; }
#sample-list summary::-webkit-details-marker { display: none; }
#sample-list summary::before { content: "▸"; color: var(--muted); }
#sample-list [open] summary::before { content: "▾"; }
.gap { font-weight: 600; min-width: 3.6em; color: var(--even); }
.tag { font-size: .8rem; color: var(--muted); flex: 0 0 7em; overflow-wrap: anywhere; }
.short { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; unicode-bidi: isolate; }
[open] > summary .short { visibility: hidden; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; unicode-bidi: isolate; }
.prompt { background: var(--soft); border-radius: 8px; padding: 12px 14px; margin-bottom: 16px; }
.reply { border-top: 3px solid var(--a); padding-top: 8px; min-width: 0; }
.reply.b { border-color: var(--b); }
.who { display: flex; gap: 10px; margin: 0 0 6px; }
.who b:last-child { margin-left: auto; }
.ratings { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px 18px;
  margin: 16px 0 0; }
.ratings dt, .ratings dd { font-size: .8rem; min-width: 0; }
.ratings dt { overflow-wrap: anywhere; }
.ratings div { display: grid; grid-template-columns: 1fr auto; gap: 2px 8px; }
.ratings .bar { grid-column: 1 / -1; min-width: 0; height: 4px; border-radius: 2px; background: var(--soft); }
.reply.b .ratings i { background: var(--b); }
#how-to-read-this-page p { max-width: 72ch; margin: 0; }

@media (min-width: 740px) { #training .keys { min-height: 1.4em; } }
@media (max-width: 1000px) { .cards { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 560px) {
  .cards { grid-template-columns: 1fr 1fr; }
  .cards > div { padding: 12px 14px; }
  .cards b { font-size: 1.5rem; }
  .filter label { flex: 1 1 100%; }
  .filter input, .filter select { flex: 1; min-width: 0; }
  #sample-list summary { flex-wrap: wrap; gap: 2px 10px; }
  .tag { flex: 1; }
  .short { flex-basis: 100%; }
  [open] > summary .short { display: none; }
  th, td { padding-right: 12px; }
  th[scope=row] { white-space: normal; }
  .bar { min-width: 60px; }
  details, .scroll { padding-left: 12px; padding-right: 12px; }
}
@media print { body { background: none; } figure, .scroll, details { break-inside: avoid; } .filter { display: none; } }
"""
