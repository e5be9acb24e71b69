"""Inline SVG plots of a run, drawn by matplotlib in colours that the page around them decides.

matplotlib is an optional extra: it is imported on the first plot, and `available` says whether it is there.
"""

from __future__ import annotations

import html
import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]

# matplotlib draws in these stand-ins; in the SVG they become the page's CSS variables, so that one drawing is legible
# in the light and in the dark scheme.
_COLOURS = {"ink": "#0a0b01", "muted": "#0a0b02", "line": "#0a0b03", "a": "#0a0b04", "b": "#0a0b05"}
_SIZE = (4.1, 2.3)  # inches; 72 SVG units each
_POINTS = 400  # a longer series is averaged down to this many points: more are not visible and weigh down the page


@dataclass(frozen=True)
class Plot:
    """Drawing: `svg` is safe to put into a page as it is, `title` and `legend` are plain text."""

    title: str
    phase: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()  # (label, colour name)
    change: str = ""  # the smoothed first and last value


@dataclass(frozen=True)
class _Series:
    label: str
    points: list[tuple[float, float]]
    colour: str = "a"
    smooth: bool = True  # faint values below a rolling mean; otherwise each value is marked
    band: list[tuple[float, float, float]] = field(default_factory=list)  # (x, low, high)


def available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def number(value: Any) -> float | None:
    """`value`, or the mean of an interval, as a finite float; None for anything else."""
    if isinstance(value, dict):
        value = value.get("mean")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def curves(sft: Rows, reward: Rows, ppo: Rows) -> list[Plot]:
    """The training curves that the rows of the three phases' metrics.jsonl hold, in reading order."""
    held_out = _band(reward, "heldout_accuracy")
    shown = [
        _lines(
            "Loss, nats per token",
            "SFT",
            [
                _Series("training", _points(sft, "loss"), "b"),
                _Series("held out", _points(sft, "heldout_loss"), "a", smooth=False),
            ],
        ),
        _lines("Loss", "Reward model", [_Series("training", _points(reward, "loss"), "b")]),
        _lines(
            "Annotator agreement",
            "Reward model",
            [
                _Series("training", _points(reward, "accuracy"), "b"),
                _Series("held out, with interval", _points(reward, "heldout_accuracy"), "a", False, held_out),
            ],
            level=0.5,
        ),
    ]
    singles = {
        "score": "Reward model score",
        "kl": "KL from SFT, nats",
        "kl_coef": "KL coefficient",
        "entropy": "Entropy, nats",
        "response_tokens": "Response length, tokens",
        "finished": "Finished responses",
    }
    shown += [_lines(title, "PPO", [_Series(name, _points(ppo, name))]) for name, title in singles.items()]
    return [plot for plot in shown if plot]


def over_steps(rows: Rows, title: str, phase: str, name: str, heldout: str | None = None) -> Plot | None:
    """A metric over steps, and below it the same of held-out data with its interval, where rows have them."""
    series = [_Series("training" if heldout else name, _points(rows, name), "b" if heldout else "a")]
    if heldout is None and name.startswith("heldout_"):
        series = []
        heldout = name
    if heldout:
        series.append(_Series("held out", _points(rows, heldout), "a", smooth=False, band=_band(rows, heldout)))
    return _lines(title, phase, series)


def _band(rows: Rows, name: str) -> list[tuple[float, float, float]]:
    intervals = []
    for row in rows:
        x, low, high = (number(row.get(key)) for key in ("step", f"{name}_low", f"{name}_high"))
        if x is not None and low is not None and high is not None:
            intervals.append((x, low, high))
    return intervals


def criteria(values: dict[str, tuple[float, float]], names: tuple[str, str]) -> Plot | None:
    """Paired bars of each criterion's mean rating (0..1) for models a and b; `names` are theirs."""
    if not values:
        return None

    def draw(axes: Any) -> None:
        rows = np.arange(len(values))[::-1]
        for offset, column, colour in ((0.2, 1, "b"), (-0.2, 0, "a")):
            widths = [pair[column] for pair in values.values()]
            axes.barh(rows + offset, widths, height=0.36, color=_COLOURS[colour])
            for row, width in zip(rows, widths, strict=True):
                axes.text(width + 0.015, row + offset, f"{width:.2f}", va="center", fontsize=8)
        axes.set_yticks(rows, [name if len(name) <= 24 else name[:23] + "…" for name in values])
        axes.tick_params(axis="y", length=0, labelcolor=_COLOURS["ink"])
        axes.set_xlim(0, max(1.1, *(max(pair) + 0.1 for pair in values.values())))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        axes.grid(axis="x")
        axes.grid(axis="y", visible=False)

    told = "; ".join(f"{name}: {names[0]} {a:.2f}, {names[1]} {b:.2f}" for name, (a, b) in values.items())
    svg = _svg(draw, f"Mean rating by criterion. {told}", "criteria", height=0.55 + 0.46 * len(values))
    return Plot("Mean rating by criterion, 0 to 1", "Evaluation", svg, ((names[1], "b"), (names[0], "a")))


def reliability(bins: list[dict[str, float]]) -> Plot:
    """Plot how often predictions came true over what was predicted, in bins (calibration.py), beside the diagonal."""
    predicted, observed = ([bin[key] for bin in bins] for key in ("predicted", "observed"))
    low, high = min(0.5, *observed), 1.0

    def draw(axes: Any) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=_COLOURS["muted"], linewidth=0.9, linestyle=(0, (3, 3)))
        axes.plot(predicted, observed, color=_COLOURS["a"], linewidth=1.2, marker="o", markersize=4.5)
        axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(low - 0.04, high + 0.04)
        axes.set_xlabel("probability that the scores give")

    told = "; ".join(f"{x:.2f} predicted, {y:.2f} right" for x, y in zip(predicted, observed, strict=True))
    svg = _svg(draw, f"Share of comparisons predicted rightly by predicted probability. {told}", "reliability")
    return Plot("Right over predicted", "Calibration", svg)


def distribution(histogram: dict[str, list[float]]) -> Plot:
    """Shares of scores in bins: of chosen, of rejected, and of the policy's own responses where these were sampled."""
    edges = np.array(histogram["edges"])
    shown = {"chosen": "a", "rejected": "b", "policy": "muted"}
    sets = {name: np.array(histogram[name], float) for name in shown if name in histogram}

    def draw(axes: Any) -> None:
        for name, counts in sets.items():
            colour = _COLOURS[shown[name]]
            axes.stairs(counts / max(1.0, counts.sum()), edges, color=colour, linewidth=1.6)
        axes.set_xlabel("score")

    middles = (edges[:-1] + edges[1:]) / 2
    means = (f"{name} {_short(float((middles * counts).sum() / max(1.0, counts.sum())))}"
             for name, counts in sets.items())  # fmt: skip
    svg = _svg(draw, f"Distribution of scores. Means: {'; '.join(means)}", "distribution")
    legend = tuple((name, shown[name]) for name in sets)
    return Plot("Scores, share in each bin", "Scores", svg, legend)


def histogram(title: str, phase: str, edges: Sequence[float], counts: Sequence[int], label: str) -> Plot:
    """Plot how many of something lie in each bin; the last bin may hold what is beyond it."""

    def draw(axes: Any) -> None:
        axes.stairs(counts, edges, color=_COLOURS["a"], fill=True, alpha=0.35)
        axes.stairs(counts, edges, color=_COLOURS["a"], linewidth=1.2)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(label)

    ends = f"from {_short(edges[0])} to {_short(edges[-1])}"
    told = f"{sum(counts)} in {len(counts)} bins {ends}, most: {max(counts)}; {label}"
    return Plot(title, phase, _svg(draw, f"{phase}. {title}. {told}", f"{phase} {title}"))


def _points(rows: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    pairs = ((number(row.get("step")), number(row.get(name))) for row in rows)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _lines(title: str, phase: str, series: Sequence[_Series], level: float | None = None) -> Plot | None:
    """Series over steps; `level` draws a dashed line that means chance."""
    series = [line for line in series if line.points]
    if not series:
        return None
    told = []
    for line in series:
        smoothed = _smooth(_thin(line.points)[1]) if line.smooth else [y for _, y in line.points]
        told.append(f"{_short(smoothed[0])} → {_short(smoothed[-1])}")

    def draw(axes: Any) -> None:
        for line in series:
            colour = _COLOURS[line.colour]
            x, y = _thin(line.points)
            smoothed = _smooth(y)
            if line.band:
                axes.fill_between(*zip(*line.band, strict=True), color=colour, alpha=0.18, linewidth=0)
            if not line.smooth or len(x) == 1:
                axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.5)
            else:
                if not np.array_equal(smoothed, y):
                    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(x, smoothed, color=colour, linewidth=1.8)
        if level is not None:
            axes.axhline(level, color=_COLOURS["muted"], linewidth=0.9, linestyle=(0, (3, 3)))
        axes.set_xlabel("step")

    label = f"{phase}. {title} over steps. " + "; ".join(
        f"{line.label} {change}" for line, change in zip(series, told, strict=True)
    )
    legend = tuple((line.label, line.colour) for line in series) if len(series) > 1 else ()
    return Plot(title, phase, _svg(draw, label, f"{phase} {title}"), legend, told[-1])


def _thin(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    parts = np.array_split(np.array(points), min(len(points), _POINTS))  # each (n, 2)
    x, y = np.array([part.mean(axis=0) for part in parts]).T
    return x, y


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred rolling mean over about a twelfth of the series; at the ends over what there is."""
    window = len(values) // 12 | 1  # odd, so that it has a centre
    kernel = np.ones(window)
    sums = np.convolve(values, kernel, "same")
    return sums / np.convolve(np.ones_like(values), kernel, "same")


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _svg(draw: Callable[[Any], None], label: str, salt: str, height: float = _SIZE[1]) -> str:
    """Draw what `draw` does to a set of axes as an <svg> element, with `label` for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[str, Any] = {
        "svg.hashsalt": salt,  # otherwise ids are random and the page differs from run to run
        "svg.fonttype": "none",  # text stays text, in the page's font
        "text.parse_math": False,  # names come from files: a dollar sign is no formula
        "axes.formatter.useoffset": False,
        "font.size": 8.5,
        "text.color": _COLOURS["ink"],
        "axes.labelcolor": _COLOURS["muted"],
        "xtick.color": _COLOURS["muted"],
        "ytick.color": _COLOURS["muted"],
        "axes.edgecolor": _COLOURS["line"],
        "grid.color": _COLOURS["line"],
        "grid.linewidth": 0.7,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the page must not depend on somebody's matplotlibrc
        parameters: Any = matplotlib.rcParams
        parameters.update(settings)
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)

    body = buffer.getvalue()
    body = body[body.index(">", body.index("<svg")) + 1 :]  # our own root element: no namespaces, sized by the page
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)  # a style would leak out
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every plot, and an id must be one of a kind
    body = re.sub(r"#0a0b0([1-5])", lambda match: f"var(--{list(_COLOURS)[int(match[1]) - 1]})", body)
    width, tall = _SIZE[0] * 72, height * 72
    root = f'viewBox="0 0 {width:.1f} {tall:.1f}" width="{width:.1f}" height="{tall:.1f}"'
    return f'<svg class="plot" role="img" aria-label="{html.escape(label)}" {root}>{body}'
