"""Labels, files of comparisons, votes of other tools in a store, the data card."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from rlhf_fast.data.comparisons import comparison_of
from rlhf_fast.data.records import read_demonstrations
from rlhf_fast.feedback import assignment as a
from rlhf_fast.feedback import exchange as e
from rlhf_fast.feedback import formats as f
from rlhf_fast.feedback import quality as q
from rlhf_fast.feedback.card import card
from rlhf_fast.feedback.errors import FeedbackError
from rlhf_fast.feedback.store import Person, Plan, Store

EVIL = "<script>alert(1)</script>"


def filled(folder: Path, says: dict[str, list[int]]) -> tuple[Store, list[Person]]:
    """A store of a pair ("one", "two") for each prompt; person n prefers as the n-th number says, below 0 for "one"."""
    store = Store(folder / "votes.db")
    store.set_plan(Plan(judgements=3, gold_share=0.0, repeat_share=0.0))
    for prompt in says:
        store.add_prompt(prompt, [{"text": "one", "checkpoint": "sft", "seed": 7}, "two"], category=EVIL)
    people = [store.join(store.invite(EVIL)) for _ in range(3)]
    for number, person in enumerate(people):
        while task := a.next_task(store, person):
            said = says[task.prompt[0]["content"]][number] * (1 if task.left == "one" else -1)
            honesty = {"honesty": (said > 0) - (said < 0)}
            a.submit(store, person, task.id, a.Judgement(said, True, True, honesty, EVIL, "better", 5.0))
    return store, people


def test_labels_keep_the_split_and_follow_the_senior(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, {"clear": [-1, -2, -3], "two to one": [1, 1, -1], "split": [1, -1, 0]})
    assert [(one.better, one.state) for one in q.labels(store)] == [(1.0, "agreed"), (1 / 3, "agreed"), (0.5, "split")]
    assert [item.pair for item in q.disputed(store)] == [3, 2]
    senior = store.join(store.invite("Bo", "senior"))
    task = a.adjudication(store, senior, 3)
    a.submit(store, senior, task.id, a.Judgement(-1 if task.left == "one" else 1, True, True))
    assert [item.pair for item in q.disputed(store)] == [2]
    last = q.labels(store)[2]
    assert (last.better, last.state, last.votes, last.share) == (1.0, "adjudicated", 3, 0.5)
    assert [one.pair for one in q.changed(q.labels(store))] == [3]
    assert q.discard_disputed(store) == [2] and [one.pair for one in q.labels(store)] == [1, 3]


def test_a_soft_label_is_what_the_function_says(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, {"q": [1, 1, -1]})
    (label,) = q.labels(store, soft=lambda votes: votes.first[:1] * 0 + 0.7)
    assert (label.better, label.state) == (0.7, "agreed") and q.changed([label]) == [label]
    (row,) = e.comparisons(store, soft=lambda votes: votes.first[:1] * 0 + 0.7)
    assert (row["chosen"], row["confidence"]) == ("one", 0.7)


def test_rows_are_read_by_the_trainers_with_their_provenance(tmp_path: Path) -> None:
    store, _people = filled(tmp_path, {f"q{n}": [-1, -1, 2] for n in range(40)})
    rows = e.comparisons(store, heldout=0.3)
    assert rows == e.comparisons(store, heldout=0.3)
    for row in rows:
        read = comparison_of(json.loads(json.dumps(row)), "row")
        assert (read.chosen, read.rejected) == ("one", "two") and read.confidence == pytest.approx(2 / 3)
    held = {row["split"] for row in rows}
    assert held == {"train", "heldout"} and rows != e.comparisons(store, heldout=0.3, seed=1)
    provenance = rows[0]["provenance"]
    assert provenance["responses"][0] == {"checkpoint": "sft", "seed": 7}
    assert sorted(vote["preference"] for vote in provenance["votes"]) == [-2, 1, 1]
    assert all(vote["annotator"].startswith("annotator-") for vote in provenance["votes"])
    assert EVIL not in json.dumps(provenance)  # names and comments stay in the store
    written = read_demonstrations(e.demonstrations(store))
    assert len(written) == 120 and {one.completion for one in written} == {"better"}
    assert all("confidence" not in row for row in e.comparisons(store, hard=True))


def test_the_dashboard_counts_what_is_there(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, {"clear": [-1, -2, -3], "two to one": [1, 1, -1]})
    board = q.dashboard(store)
    assert (board.pairs, board.judged, board.votes, board.wanted) == (2, 2, 6, 6)
    assert board.overall.raw.interval is not None and board.overall.raw.interval.mean == pytest.approx(2 / 3)
    assert [one.name for one in board.criteria] == ["honesty"] and [one.name for one in board.categories] == [EVIL]
    assert [person.votes for person in board.people] == [2, 2, 2]


def test_the_card_says_what_a_reward_model_can_reach(tmp_path: Path) -> None:
    store, _people = filled(tmp_path, {f"q{n}": [-1, -1, -1 if n % 2 else 1] for n in range(12)})
    ceiling = q.dashboard(store).ceiling
    assert ceiling is not None and 0.5 < ceiling.low < ceiling.high < 1
    assert f"{100 * ceiling.low:.0f}% to {100 * ceiling.high:.0f}%" in card(store)


def test_the_card_escapes_all(tmp_path: Path) -> None:
    store, _people = filled(tmp_path, {"clear": [-1, -2, -3]})
    newcomer = store.join(store.invite("Bo"))
    store.add_prompt("another", ["one", "two"])
    task = a.next_task(store, newcomer)
    assert task is not None
    a.report(store, newcomer, task.id, EVIL)
    page = card(store, EVIL)
    assert EVIL not in page and page.count("&lt;script&gt;alert(1)") >= 3
    assert "taken out by reports" in page
    assert card(Store(tmp_path / "empty.db")).startswith("<!doctype html>")


def imported(votes: dict[str, list[tuple[str, int]]]) -> list[f.Judged]:
    """Pairs ("one", "two") by prompt, with the votes on them in the order of their times."""
    return [
        f.Judged(
            [{"role": "user", "content": prompt}], "one", "two", "support",
            tuple(f.Vote(who, said, 4.0, 100.0 + place) for place, (who, said) in enumerate(given)), f"line {line}",
        )
        for line, (prompt, given) in enumerate(votes.items(), start=1)
    ]  # fmt: skip


def test_imported_votes_count_as_our_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    said = {f"q{n}": [(str(p), int(s)) for p, s in enumerate(rng.choice([-2, 1], 3))] for n in range(30)}
    store = Store(tmp_path / "votes.db")
    assert e.add_votes(store, imported(said), "argilla") == e.Added(30, 90, 3, 0, 0)
    board = q.dashboard(store)
    assert (board.judged, board.votes, board.wanted) == (30, 90, 90) and board.overall.raw.interval is not None
    same = [float(np.mean([np.sign(a[1]) == np.sign(b[1]) for a, b in combinations(v, 2)])) for v in said.values()]
    assert board.overall.raw.interval.mean == pytest.approx(np.mean(same))
    assert [person.name for person in board.people] == [f"{p} (argilla)" for p in range(3)]
    soft = q.labels(store, q.model_labels)
    assert [one.share for one in soft] == [np.mean([s < 0 for _, s in votes]) for votes in said.values()]
    rows = e.comparisons(store)
    assert "2 (argilla)" not in card(store) and "argilla" not in json.dumps(rows)
    for row, given in zip(rows, said.values(), strict=True):
        assert row["chosen"] == ("one" if sum(s < 0 for _, s in given) > 1 else "two")
        assert all(vote["ok"] is None for vote in row["provenance"]["votes"])  # nobody was asked
    assert all(store.person(one.id, "") is None for one in store.people())  # none of them can sign in


def test_a_file_may_be_read_again_and_a_changed_mind_replaces(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    store.add_prompt("q", ["two", "one"])  # the same pair, named the other way round
    items = imported({"q": [("a", -3), ("b", 0)], "r": [("a", 2)]})
    assert e.add_votes(store, items, "label-studio") == e.Added(2, 3, 2, 0, 0)
    assert e.add_votes(store, items, "label-studio") == e.Added(2, 0, 0, 0, 0)
    assert [(v["preference"], v["swapped"]) for v in q.counting_votes(store)] == [(3, True), (2, False), (0, True)]
    assert e.add_votes(store, imported({"q": [("b", 1)]}), "label-studio").replaced == 1
    assert sorted(v["preference"] for v in q.counting_votes(store) if v["pair"] == 1) == [-1, 3]
    with store.read() as connection:
        assert connection.exec_driver_sql("select count(*), sum(undone is null) from vote").one() == (4, 3)
        assert connection.exec_driver_sql("select taken from pair order by id").all() == [(2,), (1,)]


def test_a_reviewers_answer_decides_and_is_no_vote(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    (one,) = imported({"q": [("a", -1), ("b", -1)]})
    (alone,) = imported({"r": []})
    decided = [replace(one, votes=(*one.votes, f.Vote("c", 2, 1.0, 999.0, True)))]
    decided += [replace(alone, votes=(f.Vote("c", -3, 1.0, 999.0, True),))]
    e.add_votes(store, decided, "label-studio")
    first, second = q.labels(store)
    assert (first.better, first.state, first.votes) == (0.0, "adjudicated", 2)
    assert (second.better, second.state, second.votes) == (1.0, "adjudicated", 0)
    assert [row["chosen"] for row in e.comparisons(store)] == ["two", "one"] and q.dashboard(store).votes == 2
    again = [replace(one, votes=tuple(v._replace(annotator="") for v in one.votes)) for one in e.judged(store)]
    assert again == [replace(one, votes=tuple(v._replace(annotator="") for v in one.votes)) for one in decided]


def test_what_cannot_be_added_is_named_before_anything_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    good, twice, long = imported({"q": [("a", 1)], "r": [], "s": []})
    again = replace(good, first="two", second="one", name="line 9")
    with pytest.raises(FeedbackError, match="line 9: a has judged this pair in line 1 already"):
        e.add_votes(store, [good, again], "argilla")
    with pytest.raises(FeedbackError, match="line 3: response: 100001 characters came"):
        e.add_votes(store, [good, replace(long, first="x" * 100_001)], "argilla")
    assert q.dashboard(store).pairs == 0
    assert e.add_votes(store, [replace(twice, second="one")], "argilla") == e.Added(0, 0, 0, 0, 1)
