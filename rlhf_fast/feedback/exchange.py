"""Comparisons of a store in and out: files for the trainers, and votes of other tools (formats.py)."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from rlhf_fast.data.rows import Row
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.errors import FeedbackError
from rlhf_fast.feedback.formats import Judged, Vote
from rlhf_fast.feedback.quality import IMPORTED, Label, Soft, counting_votes, labels
from rlhf_fast.feedback.store import MOST_NAME, MOST_TEXT, Store, checked_text

# Out -----------------------------------------------------------------------------------------------------------------


def comparisons(
    store: Store, soft: Soft | None = None, heldout: float = 0.1, seed: int = 0, hard: bool = False, splits: bool = True
) -> list[Row]:
    """Rows of a comparisons file, as the reward and DPO trainers read it.

    Args:
        store: the votes.
        soft: gives the confidence, such as `quality.model_labels`; by default it is the share of votes.
        heldout: share of prompts to hold out, by a hash of prompt and seed, so that more votes change no split.
        seed: of that hash.
        hard: leave confidence out, so that every label is taken for sure.
        splits: keep pairs whose votes are split, with what confidence they have.
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout: {heldout} came; expected a share from 0 to below 1")
    votes: dict[int, list[dict[str, Any]]] = {}
    for vote in counting_votes(store):
        votes.setdefault(vote["pair"], []).append(vote)
    pairs = pairs_of(store)
    return [
        _row(label, pairs[label.pair], votes[label.pair], heldout, seed, hard)
        for label in labels(store, soft)
        if label.pair in pairs and (splits or label.state != "split")
    ]


def _row(label: Label, pair: dict[str, Any], votes: list[dict[str, Any]], heldout: float, seed: int, hard: bool) -> Row:
    order = 1 if label.better >= 0.5 else -1
    sides = ("first", "second")[::order]
    row: Row = {"prompt": pair["messages"], "chosen": pair[sides[0]], "rejected": pair[sides[1]], "annotator": "people"}
    if pair["category"]:
        row["category"] = pair["category"]
    if not hard:
        row["confidence"] = max(label.better, 1 - label.better)
    share = int(hashlib.sha256(f"{seed} {pair['key']}".encode()).hexdigest()[:13], 16) / 16**13
    row["split"] = "heldout" if share < heldout else "train"
    row["provenance"] = {
        "pair": label.pair,
        "state": label.state,
        "responses": [{"checkpoint": pair[f"{side}_checkpoint"], "seed": pair[f"{side}_seed"]} for side in sides],
        "criteria": _means([vote for vote in votes if vote["kind"] != "repeat"], -order),
        "votes": [
            {
                "annotator": vote["pseudonym"],
                "kind": vote["kind"],
                "preference": -order * vote["preference"],  # positive for the chosen response
                "criteria": {name: -order * value for name, value in vote["criteria"].items()},
                "ok": None if vote["arm"] == IMPORTED else [vote["first_ok"], vote["second_ok"]][::order],
                "swapped": vote["swapped"],
                "seconds": vote["seconds"],
                "flags": vote["flags"],
            }
            for vote in votes
        ],
    }
    return row


def _means(votes: Sequence[dict[str, Any]], sign: int) -> dict[str, float]:
    """The mean answer under each criterion, on its own scale, positive for the chosen response."""
    names = sorted({name for vote in votes for name in vote["criteria"]})
    given = {name: [sign * vote["criteria"][name] for vote in votes if name in vote["criteria"]] for name in names}
    return {name: sum(values) / len(values) for name, values in given.items()}


def demonstrations(store: Store) -> list[Row]:
    """Better answers that annotators wrote, as rows for supervised fine-tuning."""
    pairs = pairs_of(store)
    return [
        {"prompt": pairs[v["pair"]]["messages"], "completion": v["better_answer"], "annotator": v["pseudonym"]}
        for v in counting_votes(store)
        if v["better_answer"].strip() and v["state"] == "open"
    ]


def judged(store: Store) -> list[Judged]:
    """Every open pair with its first votes and the decisions of seniors, annotators by pseudonym. Which side a response
    was shown on has no place in it: the forms of other tools have none."""
    votes: dict[int, list[Vote]] = {}
    for vote in counting_votes(store):
        if vote["kind"] in ("normal", "adjudication"):
            decides = vote["kind"] == "adjudication"
            one = Vote(vote["pseudonym"], vote["preference"], vote["seconds"], vote["at"], decides)
            votes.setdefault(vote["pair"], []).append(one)
    return [
        Judged(pair["messages"], pair["first"], pair["second"], pair["category"], tuple(votes.get(number, [])))
        for number, pair in pairs_of(store).items()
    ]


def pairs_of(store: Store) -> dict[int, dict[str, Any]]:
    """Every open pair whose answer is not known, by number: its prompt as messages and as a key, its category, and the
    text, checkpoint and seed of its first and its second response."""
    first, second = t.response.alias(), t.response.alias()
    columns: list[Any] = [t.pair.c.id, t.prompt.c.messages, t.prompt.c.category, t.prompt.c.key]
    for name, table in (("first", first), ("second", second)):
        columns += [table.c.text.label(name), table.c.checkpoint.label(f"{name}_checkpoint")]
        columns += [table.c.seed.label(f"{name}_seed")]
    wanted = (t.pair.c.prompt == t.prompt.c.id) & (t.pair.c.first == first.c.id) & (t.pair.c.second == second.c.id)
    normal = (t.pair.c.kind == "normal") & (t.pair.c.state == "open")
    with store.read() as connection:
        rows = connection.execute(sa.select(*columns).where(wanted, normal).order_by(t.pair.c.id))
        return {row.id: dict(row._mapping) for row in rows}


# In ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Added:
    """What an import has brought."""

    pairs: int
    votes: int
    people: int
    replaced: int  # votes that were there with another answer; the old ones are marked as undone
    equal: int  # pairs of two equal responses, which cannot be compared and are left out


def add_votes(store: Store, items: Sequence[Judged], tool: str) -> Added:
    """Add pairs of another tool with their votes; what is there already stays, so that a file may be read again.

    Its annotators become people of their own, without an invitation. Their votes count as votes given here do, in the
    order of their times; the first response is taken to have been shown on the left.

    Raises:
        FeedbackError: with the line; nothing has been added.
    """
    different = [one for one in items if one.first != one.second]
    _check(different, tool)
    numbers = [store.add_prompt(one.prompt, [one.first, one.second], one.category)[0] for one in different]
    given = [(number, one.first, vote) for number, one in zip(numbers, different, strict=True) for vote in one.votes]
    counts = {"people": 0, "new": 0, "replaced": 0}
    with store.write() as connection:
        firsts = sa.select(t.pair.c.id, t.response.c.text).where(t.pair.c.first == t.response.c.id)
        shown = {row.id: row.text for row in connection.execute(firsts)}
        imported = sa.select(t.person.c.name, t.person.c.id).where(t.person.c.token_hash.is_(None))
        people = {row.name: row.id for row in connection.execute(imported)}
        for pair, first, vote in sorted(given, key=lambda one: one[2].at):
            name = f"{vote.annotator} ({tool})"
            if name not in people:
                people[name] = _add_person(connection, name)
                counts["people"] += 1
            found = _add_vote(connection, pair, people[name], vote, turned=shown[pair] != first)
            if found:
                counts[found] += 1
    return Added(len(set(numbers)), counts["new"], counts["people"], counts["replaced"], len(items) - len(different))


def _check(items: Sequence[Judged], tool: str) -> None:
    """Refuse what the store would refuse, and second votes of a person on a pair, before anything is written."""
    seen: dict[Any, str] = {}
    for one in items:
        try:
            for text in (one.first, one.second):
                checked_text(text, "response", MOST_TEXT)
            prompt = json.dumps(one.prompt, sort_keys=True, ensure_ascii=False)
            checked_text(prompt, "prompt", MOST_TEXT)
            checked_text(one.category, "category", MOST_NAME)
            for vote in one.votes:
                checked_text(f"{vote.annotator} ({tool})", "annotator", MOST_NAME)
        except FeedbackError as error:
            raise FeedbackError(f"{one.name}: {error}") from None
        for vote in one.votes:
            key = (prompt, frozenset((one.first, one.second)), vote.annotator, vote.decides)
            if key in seen:
                raise FeedbackError(f"{one.name}: {vote.annotator} has judged this pair in {seen[key]} already")
            seen[key] = one.name


def _add_person(connection: sa.Connection, name: str) -> int:
    new = {"name": name, "role": "annotator", "pseudonym": f"annotator-{secrets.token_hex(6)}", "invited": time.time()}
    return int(connection.execute(t.person.insert().values(**new).returning(t.person.c.id)).scalar_one())


def _add_vote(connection: sa.Connection, pair: int, person: int, vote: Vote, turned: bool) -> str:
    """`new`, `replaced`, or nothing if it is there already. `turned`: the pair's first response was on the right."""
    kind, at = "adjudication" if vote.decides else "normal", vote.at or time.time()
    preference = -vote.preference if turned else vote.preference
    same = (t.assignment.c.person == person) & (t.assignment.c.pair == pair) & (t.assignment.c.kind == kind)
    task = connection.execute(sa.select(t.assignment.c.id).where(same)).scalar()
    known = task is not None
    if known:
        counts = (t.vote.c.assignment == task) & t.vote.c.undone.is_(None)
        if connection.execute(sa.select(t.vote.c.preference).where(counts)).scalar() == preference:
            return ""
        connection.execute(t.vote.update().where(counts).values(undone=time.time()))
    else:
        place = {"pair": pair, "person": person, "kind": kind, "swapped": turned, "arm": IMPORTED, "state": "done"}
        new = t.assignment.insert().values(**place, opened=at, until=at, draft={})
        task = connection.execute(new.returning(t.assignment.c.id)).scalar_one()
        if kind == "normal":
            connection.execute(t.pair.update().where(t.pair.c.id == pair).values(taken=t.pair.c.taken + 1))
    about = {"assignment": task, "pair": pair, "person": person, "kind": kind, "swapped": turned}
    unknown = {"first_ok": True, "second_ok": True, "criteria": {}, "comment": "", "better_answer": "", "flags": []}
    connection.execute(t.vote.insert().values(**about, **unknown, preference=preference, seconds=vote.seconds, at=at))
    return "replaced" if known else "new"
