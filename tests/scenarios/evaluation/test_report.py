"""The report of a run: whole, self-contained, safe against what models write, and the same bytes each time."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.evaluation.report import write_report
from rlhf_fast.pages import plots

HOSTILE = "<script>alert(1)</script></script></template></details><img src=x onerror=alert(1)> & \"quoted\" 'single'"
SECONDS = {"sft": 211.5, "comparisons": 98.25, "reward": 143.75, "ppo": 1423.5, "evaluation": 187.125}
with_plots = pytest.mark.skipif(not plots.available(), reason="needs matplotlib")


def spread(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def side(score: float | None, text: str) -> dict[str, Any]:
    return {"text": text, "score": score, "ratings": {"honesty": 0.5, "<b>": 0.25}, "finish_reason": "stop"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run, with the gaps (NaN, null, a line cut off) that real ones have."""
    run = tmp_path / "run <1>"
    for phase, seconds in SECONDS.items():
        summary: dict[str, Any] = {"note": HOSTILE, "nothing": None, "share": spread(0.7, 0.1)}
        if phase == "reward":
            summary["heldout_accuracy"] = spread(0.81, 0.05)
        result = {"phase": phase, "seconds": seconds, "peak_rss_gb": 1.5, "summary": summary}
        write_rows(run / phase / "result.json", [result])
    (run / "config.yaml").write_text(f"seed: 0\nnote: {HOSTILE}\n")
    sft = [{"step": step, "loss": 2 * math.exp(-step / 9), "lr": 1e-5} for step in range(30)]
    write_rows(run / "sft" / "metrics.jsonl", [*sft, *({"step": s, "heldout_loss": 1.5} for s in (0, 15, 29))])
    held_out = {"heldout_accuracy": 0.8, "heldout_accuracy_low": 0.75, "heldout_accuracy_high": 0.85}
    reward = [{"step": step, "loss": 0.6, "accuracy": 0.7} for step in range(5)]
    write_rows(run / "reward" / "metrics.jsonl", [*reward, {"step": 4, **held_out}, {"step": 5, **held_out}])
    names = ("score", "kl", "kl_coef", "entropy", "response_tokens", "finished", "seconds_rollout", "seconds_training")
    ppo = [{"step": step, **{name: float("nan") if step == 3 else 0.1 * step for name in names}} for step in range(900)]
    write_rows(run / "ppo" / "metrics.jsonl", ppo)
    with open(run / "ppo" / "metrics.jsonl", "a") as file:
        file.write('{"step": 900, "sco')
    metrics = {"score": 0.66, "kl": 3.1, "tokens": 98, "words": 71.0, "repetition": float("nan"), "finished": 0.94}
    evaluation: dict[str, Any] = {
        "judge": f"simulated {HOSTILE}", "a": "ppo", "b": "sft", "prompts": 50, "samples_per_prompt": 2,
        "score_difference": spread(0.12, 0.04), "win_rate": spread(0.71, 0.08), "wins": 68, "ties": 7, "losses": 25,
        "a_metrics": metrics, "b_metrics": {**metrics, "kl": 0.0},
        "criteria": {"honesty": {"a": 0.6, "b": 0.5}, f"$\\frac{HOSTILE}": {"a": 0.4, "b": 0.5}},
        "by_category": {
            "simple": {"prompts": 46, "a_score": 0.7, "b_score": 0.5, "score_difference": spread(0.2, 0.05)},
            HOSTILE: {"prompts": 4, "a_score": 0.5, "b_score": 0.6, "score_difference": None},
        },
    }  # fmt: skip
    write_rows(run / "evaluation" / "evaluation.json", [evaluation])
    samples: list[dict[str, Any]] = [
        {"prompt": f"Question {n}", "category": "simple", "a": side(0.5 + n / 500, f"A{n}"), "b": side(0.6, f"B{n}")}
        for n in range(100)
    ]
    samples += [
        {"prompt": HOSTILE, "category": HOSTILE, "a": side(0.0, HOSTILE), "b": side(1.0, HOSTILE + "\ud800")},
        {"prompt": "unscored", "category": "simple", "a": side(None, "x"), "b": None},
    ]
    write_rows(run / "evaluation" / "samples.jsonl", samples)
    return run


def test_the_page_says_where_people_compared_and_a_program_scored(run: Path, without_plots: None) -> None:
    assert "a program, not people, compared and scored the replies" in report(run)
    file = run / "comparisons" / "result.json"
    result = json.loads(file.read_text())
    result["summary"] |= {"annotator": "people (1)", "comparisons": 17}
    file.write_text(json.dumps(result))
    text = report(run)
    assert "learned from 17 pairs that people compared" in text and "which knows nothing of what those people" in text
    assert "stands in for people" not in text and "The judge is no person" in text


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were not installed; also what keeps a test of words and order fast."""
    monkeypatch.setattr(plots, "available", lambda: False)


class Page(HTMLParser):
    """Tags, ids and balance of a page, as a parser and not a search for strings sees them."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def report(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text("utf-8")


def test_the_page_is_whole_and_fetches_nothing(run: Path) -> None:
    text = report(run)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "base"})
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_what_a_model_writes_is_text(run: Path) -> None:
    text = report(run)
    page = Page(text)
    assert page.count("script") == 1
    assert "<script>alert" not in text and "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&amp; &quot;quoted&quot; &#x27;single&#x27;" in text


@pytest.mark.usefixtures("without_plots")
def test_the_outcome_and_the_figures_are_there(run: Path) -> None:
    text = report(run)
    plain = re.sub(r"<[^>]+>", "", text)
    assert (
        "PPO beat SFT by 0.12 [0.08, 0.16] of the simulated annotator’s score on 50 held-out prompts; KL 3.1 nats."
        in plain
    )
    assert "The annotator in this run is simulated" in plain
    for seconds in SECONDS.values():
        assert f"{seconds:.1f} s" in plain
    for figure in ("71%", "63% to 79%", "81%", "76% to 86%", "68 won", "34 min 24 s", "1.50 GB", "too few prompts"):
        assert figure in plain


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (spread(-0.12, 0.04), "PPO lost to SFT by 0.12 [0.08, 0.16]"),
        (spread(0.02, 0.04), "PPO and SFT cannot be told apart: they differ by +0.020 [−0.020, 0.060]"),
        ({"mean": 0.3, "low": None, "high": float("nan")}, "PPO beat SFT by 0.30 of the simulated"),
    ],
)
def test_the_outcome_says_no_more_than_the_interval(run: Path, difference: dict[str, Any], said: str) -> None:
    write_rows(run / "evaluation" / "evaluation.json", [{"score_difference": difference}])
    assert said in re.sub(r"<[^>]+>", "", report(run))


@with_plots
def test_each_curve_is_drawn_and_described(run: Path) -> None:
    page = Page(report(run))
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) == 10
    for attributes in drawn:
        assert attributes["role"] == "img" and attributes["aria-label"]
        assert attributes["width"] and attributes["height"]  # the space is known before it is drawn


@with_plots
def test_colours_are_left_to_the_page(run: Path) -> None:
    text = report(run)
    assert "#0a0b0" not in text
    drawing = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawing)


@pytest.mark.usefixtures("without_plots")
def test_without_matplotlib_the_page_says_how_to_get_plots(run: Path) -> None:
    text = report(run)
    assert "<svg" not in text
    assert "pip install" in text and "rlhf-fast[report]" in text
    assert "Score by category" in text


@pytest.mark.usefixtures("without_plots")
def test_samples_come_failures_first_and_few_at_once(run: Path) -> None:
    text = report(run)
    page, waiting = text.split('<template id="more">')
    shown = page[page.index('id="sample-list"') :]
    assert shown.count("<details") == 60
    assert waiting.split("</template>")[0].count("<details") == 42
    assert "60 of 102 shown" in text
    assert shown.index("−1.00") < shown.index("Question 0") < shown.index("Question 1<")
    assert "unscored" in waiting


def test_writing_twice_gives_the_same_bytes(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("missing", [*SECONDS, "config.yaml"])
def test_a_missing_phase_is_left_out(run: Path, missing: str) -> None:
    target = run / missing
    target.rename(run.parent / "elsewhere")
    text = report(run)
    Page(text)
    assert ("Not in this run yet" in text) == (missing != "config.yaml")
    assert "simulated" in text
    if missing in SECONDS:
        assert f"{SECONDS[missing]:.1f} s" not in text


@with_plots
def test_plots_of_missing_phases_are_left_out(run: Path) -> None:
    for phase in ("sft", "reward", "evaluation"):
        (run / phase).rename(run.parent / phase)
    assert Page(report(run)).count("svg") == 6


def test_an_empty_run_still_gives_a_page(tmp_path: Path) -> None:
    text = report(tmp_path)
    Page(text)
    assert "This run has no evaluation yet." in text


@pytest.mark.usefixtures("without_plots")
def test_files_of_another_shape_are_passed_over(tmp_path: Path) -> None:
    broken = "[1, 2"
    for name in ("sft/result.json", "evaluation/evaluation.json", "evaluation/samples.jsonl", "ppo/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(broken)
    write_rows(tmp_path / "reward" / "result.json", [{"seconds": "long", "peak_rss_gb": None, "summary": [1]}])
    odd: dict[str, Any] = {"score_difference": 0.1, "by_category": {"x": None}, "criteria": [], "a_metrics": 3}
    write_rows(tmp_path / "ppo" / "metrics.jsonl", [{"step": None, "kl": 1}, {"step": 1, "kl": "x"}, {"kl": 2}])
    report(tmp_path)
    write_rows(tmp_path / "evaluation" / "evaluation.json", [odd])
    write_rows(tmp_path / "evaluation" / "samples.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}, {}])
    assert "user: hi" in report(tmp_path)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def rows_of(page: str, first: str) -> list[list[str]]:
    """The cells, as text, of each table row whose first cell is `first`."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    cells = [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    return [row for row in cells if row and row[0] == first]


def test_every_figure_has_its_cell_and_its_place_on_the_scale(run: Path) -> None:
    page = report(run)
    (simple,) = rows_of(page, "simple")
    assert simple[1:6] == ["46", "0.50", "0.70", "+0.20", "[0.15, 0.25]"]
    # Drawn from -reach to reach, 1.1 times the farthest end: 0.15 to 0.25 of +-0.275, and 0 in the middle.
    assert re.search(r">simple</th>.*?--l:77\.3%;--w:18\.2%;--m:86\.4%;--z:50\.0%", page)
    assert "+0.12" in page and "+0.08 to +0.16" in page
    shares = [row[1:] for row in rows_of(page, "Reward model") if row[1] == "heldout_accuracy"]
    assert shares == [["heldout_accuracy", "0.81 [0.76, 0.86]"]]
    assert len([row for row in rows_of(page, "PPO") if row[1:] == ["share", "0.7 [0.6, 0.8]"]]) == 1
    assert ["nothing", "–"] in [row[1:] for row in rows_of(page, "PPO")]


@pytest.mark.parametrize(("mean", "shown"), [(0.1, "+0.10"), (0.0994, "+0.099"), (-0.25, "−0.25")])
def test_a_small_difference_has_a_digit_more(run: Path, mean: float, shown: str) -> None:
    file = run / "evaluation" / "evaluation.json"
    evaluation = json.loads(file.read_text())
    write_rows(file, [{**evaluation, "score_difference": spread(mean, 0.04)}])
    assert f">{shown}<" in report(run)
