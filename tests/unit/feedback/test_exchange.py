"""Labels, files of comparisons, the forms of other tools, the data card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from rlhf_fast.data.comparisons import comparison_of
from rlhf_fast.data.records import read_demonstrations
from rlhf_fast.data.rows import RecordError
from rlhf_fast.feedback import assignment as a
from rlhf_fast.feedback import exchange as e
from rlhf_fast.feedback import quality as q
from rlhf_fast.feedback.card import card
from rlhf_fast.feedback.store import Person, Plan, Store

EVIL = "<script>alert(1)</script>"
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
votes = st.lists(st.tuples(texts, st.integers(-3, 3), st.floats(0, 1e6)), max_size=4).map(tuple)
judged = st.builds(e.Judged, texts.map(lambda text: [{"role": "user", "content": text}]), texts, texts, texts, votes)


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


@settings(max_examples=40, deadline=None)
@given(st.lists(judged, max_size=3))
def test_votes_go_to_other_tools_and_back(items: list[e.Judged]) -> None:
    for out, back in (e.FORMATS["label-studio"], e.FORMATS["argilla"]):
        assert back(json.loads(json.dumps(out(items)))) == items


plain = st.text("abc \n<&é", min_size=1, max_size=20).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(plain, plain, plain)
def test_labels_go_to_other_tools_and_back(prompt: str, chosen: str, rejected: str) -> None:
    row = {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, "category": "chat"}
    for name, lost in (("hh", ["category"]), ("rewardbench", [])):
        out, back = e.FORMATS[name]
        assert back(json.loads(json.dumps(out([row])))) == [{k: v for k, v in row.items() if k not in lost}]


def test_a_text_that_a_transcript_would_split_is_refused() -> None:
    row = {"prompt": "q", "chosen": "a\n\nHuman: b", "rejected": "c"}
    with pytest.raises(RecordError, match="row 0: a text with a turn of its own"):
        e.to_hh([row])


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("label-studio", {}, "data should be an object"),
        ("label-studio", {"data": {"prompt": "q", "answer1": 1, "answer2": "b"}}, "answer1 should be text, got int"),
        (
            "label-studio",
            {"data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": [{"result": []}]},
            "has no side",
        ),
        ("argilla", {"fields": []}, "fields should be an object"),
        (
            "argilla",
            {
                "fields": {"prompt": "q", "response1": "a", "response2": "b"},
                "responses": {"preference": [{"value": 9}]},
            },
            "preference of 9 came",
        ),
        ("hh", {"chosen": "x", "rejected": "y"}, "Human:"),
        ("rewardbench", {"prompt": "q", "chosen": "a"}, "rejected"),
    ],
)
def test_a_broken_record_is_refused_with_its_line(
    name: str, row: dict[str, object], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=rf"in.jsonl line 2: .*{words}"):
        e.FORMATS[name][1](file)
