"""The page of a reward model: whole, safe against what data and models write, and with words for what is not known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_fast.data.records import Comparison
from rlhf_fast.pages import plots
from rlhf_fast.pages.reward_report import write_reward_report
from rlhf_fast.rewards.measures import Heldout, histogram, measure
from tests.scenarios.evaluation.test_report import HOSTILE, Page, with_plots, without_plots, write_rows

__all__ = ["without_plots"]  # a fixture


def run_of(path: Path, labels: list[dict[str, Any]], heads: int = 1, score: float = 1.0) -> Path:
    """The files of a run whose i-th comparison has the i-th labels and is right where i is even."""
    rows = [Comparison(f"p{i}", HOSTILE, f"r{i} {HOSTILE}", **label) for i, label in enumerate(labels)]
    by_head = np.zeros((2 * len(rows), heads))
    by_head[::2] = score * np.where(np.arange(len(rows)) % 2, -1.0, 1.0)[:, None]
    by_head[1, 0] += 1.5 * score * (heads > 1)
    scores = by_head.mean(axis=1)
    chosen = 2 * np.arange(len(rows))
    heldout = Heldout(rows, np.arange(len(rows)), chosen, chosen + 1, scores, by_head, np.arange(2 * len(rows)) % 7)
    report = measure(heldout, rows)
    report["alone"] = {"texts": 4, "most_deviations": 1e-6}
    shown = {"chosen": scores[chosen], "rejected": scores[chosen + 1]}
    report["scores"] = {"over": "the held-out responses", "mean": 0.0, "std": 1.0, "histogram": histogram(shown)}
    write_rows(path / "reward_report.json", [report])
    curve = [{"step": s, "loss": 0.7 - s / 50, "accuracy": 0.5 + s / 50} for s in range(1, 9)]
    write_rows(path / "metrics.jsonl", curve)
    order = np.argsort(heldout.difference, kind="stable")
    sides = [{"chosen_score": scores[2 * i], "rejected_score": scores[2 * i + 1]} for i in order]
    write_rows(path / "samples.jsonl", [{**rows[i].as_dict(), **side} for i, side in zip(order, sides, strict=True)])
    return path


def plain(run: Path) -> str:
    path = write_reward_report(run)
    assert path == run / "report.html"
    Page(path.read_text("utf-8"))  # every tag is closed
    return re.sub(r"<[^>]+>", "", path.read_text("utf-8"))


@with_plots
def test_the_page_is_whole_escapes_everything_and_fetches_nothing(tmp_path: Path) -> None:
    labels = [{"category": HOSTILE if i % 3 else "b", "annotator": f"{HOSTILE}{i % 2}"} for i in range(12)]
    run = run_of(tmp_path / "run <1>", labels, heads=2)
    text = write_reward_report(run).read_text("utf-8")
    page = Page(text)
    assert page.count("script") == 1 and page.count("img") == 0
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.search(r"https?://", text) and "default-src 'none'" in text
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.count("svg") == 4  # reliability, scores, loss, agreement
    assert "#0a0b0" not in text
    assert write_reward_report(run).read_text("utf-8") == text


@pytest.mark.usefixtures("without_plots")
def test_compared_calls_and_thoughts_are_shown_as_what_they_say(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    thought = {"role": "assistant", "content": "noon", "reasoning_content": "Hm."}
    run = run_of(tmp_path / "run", [{}, {"messages": ([call], [thought])}])
    assert "assistant: clock({})" in plain(run) and "assistant: (Hm.)\nnoon" in plain(run)


@pytest.mark.usefixtures("without_plots")
def test_verdict_tables_and_cards_say_the_figures(tmp_path: Path) -> None:
    labels = [{"category": "a" if i < 4 else "b", "margin": float(i % 2), "confidence": 0.6} for i in range(10)]
    text = plain(run_of(tmp_path, labels))
    assert "It agrees with 50%" in text and "of 10 held-out comparisons: do not train on it." in text
    assert "The interval holds 50 %" in text and "below 60% PPO refuses to start" in text
    assert "By category" in text and "By margin that the annotator gave" in text
    assert "By annotator's confidence" not in text  # one value only: it tells nothing apart
    assert "5 of 10 comparisons whose rejected response scores higher" in text
    assert "pip install" in text


@pytest.mark.usefixtures("without_plots")
def test_what_is_not_known_of_people_is_said_with_what_to_do(tmp_path: Path) -> None:
    text = plain(run_of(tmp_path / "none", [{}] * 10))
    assert "no pair was judged by two of them. Let a second person judge" in text
    assert "no labels that tell some of them from others" in text
    run = run_of(tmp_path / "twice", [{"annotator": "eva"}] * 10)
    report = json.loads((run / "reward_report.json").read_text())
    report["people"].update(
        pairs_judged_by_several=7, agreement={"mean": 0.75, "low": 0.6, "high": 0.9}, reach=[0.75, 0.8536]
    )
    write_rows(run / "reward_report.json", [report])
    text = plain(run)
    assert "agree on 75% [60%, 90%] of the 7 pairs" in text and "right on 75% (if" in text and "to 85% (if all" in text


@pytest.mark.usefixtures("without_plots")
def test_what_agreement_lets_a_model_reach_stands_beside_its_accuracy(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [{}] * 10)
    assert "a model of the majority reaches" not in plain(run)
    votes = run_of(tmp_path / "votes", [{"votes": (("a", 1.0), ("b", 1.0), ("c", -1.0))}] * 10)
    assert "Of single votes it agrees with 50%. People agree on 33%" in plain(votes)
    given = {"mean": 0.73, "low": 0.7, "high": 0.76, "source": HOSTILE}
    text = write_reward_report(run, given).read_text("utf-8")
    shown = re.sub(r"<[^>]+>", "", text)
    assert "People agree on 73%" in shown and "reaches 73% to 84%, or 70% to 86% by its interval" in shown
    assert "<script>alert" not in text and Page(text).count("script") == 1
    assert "reaches 80% to 89%<" in write_reward_report(run, {"mean": 0.8}).read_text("utf-8")
    report = json.loads((run / "reward_report.json").read_text())
    report["people"].update(
        pairs_judged_by_several=7, agreement={"mean": 0.75, "low": 0.6, "high": 0.9}, reach=[0.75, 0.8536]
    )
    write_rows(run / "reward_report.json", [report])
    assert "People agree on 75%: a model of the majority reaches 75% to 85%, or 60% to 95%" in plain(run)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mean": 73}, r"agreement: 73.0 came; expected a share from 0 to 1"),
        ({"mean": "0.7"}, r"agreement: .* came; expected a mean, and perhaps low and high, from 0 to 1"),
        ({}, r"agreement: {} came; expected a mean"),
        ({"mean": 0.7, "low": 0.8}, r"expected the mean between low and high"),
    ],
)
def test_an_agreement_that_is_none_is_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [{}] * 10)
    with pytest.raises(ValueError, match=words):
        write_reward_report(run, given)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("plotted", [True, False])
def test_scores_that_never_differ_make_a_page_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plotted: bool
) -> None:
    if not plotted or not plots.available():
        monkeypatch.setattr(plots, "available", lambda: False)
    text = plain(run_of(tmp_path, [{}, {}], score=0.0))
    assert "It agrees with 50%" in text and "2 held-out prompts are too few" in text
    assert "Where it disagrees" not in text


@pytest.mark.usefixtures("without_plots")
def test_the_heads_of_an_ensemble_have_a_section_and_one_head_none(tmp_path: Path) -> None:
    assert "Agreement of each head: 40%, 50%" in plain(run_of(tmp_path / "two", [{}] * 10, heads=2))
    assert "Agreement of each head" not in plain(run_of(tmp_path / "one", [{}] * 10))


def test_a_folder_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no reward_report\.json"):
        write_reward_report(tmp_path)


@with_plots
def test_the_scores_of_one_comparison_have_their_mean() -> None:
    histogram = {"edges": [-1.0, 0.0, 1.0, 2.0], "chosen": [0, 0, 1], "rejected": [1, 1, 0], "policy": [0, 0, 0]}
    assert "Means: chosen 1.5; rejected 0; policy 0" in plots.distribution(histogram).svg
