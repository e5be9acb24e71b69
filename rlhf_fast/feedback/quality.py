"""What the votes of a store are worth: agreement, people, disputed items, and labels made of votes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.store import Store, plan_of
from rlhf_fast.statistics.agreement import Agreement, Ceiling, ceiling, krippendorff_alpha, raw_agreement
from rlhf_fast.statistics.annotators import gold_accuracy, self_consistency, side_bias
from rlhf_fast.statistics.intervals import Interval
from rlhf_fast.statistics.sequential import Progress, enough_for_width
from rlhf_fast.statistics.vote_model import PairVotes, fit_votes, votes_for_first
from rlhf_fast.statistics.votes import Votes

IMPORTED = "imported"  # the arm of votes that another tool has collected
Soft = Callable[[PairVotes], np.ndarray]  # (I,): probability that the first response of each pair is the better


@dataclass(frozen=True)
class Quality:
    """The agreement of one criterion, one category, or all votes."""

    name: str
    votes: int
    raw: Agreement
    alpha: Agreement


@dataclass(frozen=True)
class PersonQuality:
    id: int
    name: str
    votes: int
    seconds: float  # median of a vote
    flagged: int
    left: Interval | None  # share of decided votes for the left side
    gold: Interval | None  # share of gold items answered right
    consistency: Interval | None  # share of silent repeats answered alike


@dataclass(frozen=True)
class Dashboard:
    pairs: int
    judged: int  # pairs with all the judgements that the plan wants
    votes: int
    wanted: int
    overall: Quality
    ceiling: Ceiling | None  # what the agreement of decided votes lets a reward model reach
    criteria: list[Quality]
    categories: list[Quality]
    people: list[PersonQuality]
    enough: Progress | None  # until agreement is known to 5 points
    reported: int
    discarded: int


@dataclass(frozen=True)
class Disputed:
    pair: int
    category: str
    agreement: float  # share of equal answers among the pairs of votes
    votes: list[dict[str, Any]]


@dataclass(frozen=True)
class Label:
    """What a pair's votes come to. `better` is the probability that the first response is the better."""

    pair: int
    better: float
    state: str  # agreed, split, adjudicated
    votes: int
    share: float  # of votes for the first response, ties half


def counting_votes(store: Store) -> list[dict[str, Any]]:
    """All votes that count, with category, gold answer and state of their pair and what chose it, oldest first."""
    pair = [t.prompt.c.category, t.pair.c.gold, t.pair.c.state]
    columns = [*t.vote.c, *pair, t.person.c.pseudonym, t.assignment.c.arm]
    wanted = (t.vote.c.undone.is_(None)) & (t.pair.c.id == t.vote.c.pair) & (t.person.c.id == t.vote.c.person)
    wanted &= t.assignment.c.id == t.vote.c.assignment
    with store.read() as connection:
        rows = connection.execute(
            sa.select(*columns).where(wanted, t.prompt.c.id == t.pair.c.prompt).order_by(t.vote.c.id)
        )
        return [dict(row._mapping) for row in rows]


def dashboard(store: Store) -> Dashboard:
    """All figures of a store as it stands."""
    votes = counting_votes(store)
    normal = [vote for vote in votes if vote["kind"] == "normal"]
    with store.read() as connection:
        plan = plan_of(connection)
        pairs = connection.execute(sa.select(t.pair.c.state, t.pair.c.id).where(t.pair.c.kind == "normal")).all()
        names = connection.execute(sa.select(t.person.c.id, t.person.c.name).order_by(t.person.c.id)).all()
    open_pairs = {row.id for row in pairs if row.state == "open"}
    counts: dict[int, int] = {}
    for vote in normal:
        counts[vote["pair"]] = counts.get(vote["pair"], 0) + 1
    overall = _quality("all", normal, _answer)
    decided = raw_agreement(_votes([vote for vote in normal if vote["preference"]], _answer))
    criteria = sorted({name for vote in normal for name in vote["criteria"]})
    categories = sorted({vote["category"] for vote in normal})
    doubles = overall.raw.doubles
    mean = overall.raw.interval.mean if overall.raw.interval else 0.0
    return Dashboard(
        pairs=len(pairs),
        judged=sum(counts.get(pair, 0) >= plan.judgements for pair in open_pairs),
        votes=len(normal),
        wanted=len(open_pairs) * plan.judgements,
        overall=overall,
        ceiling=ceiling(decided.interval) if decided.interval else None,
        criteria=[_criterion(name, normal) for name in criteria],
        categories=[_quality(name, [v for v in normal if v["category"] == name], _answer) for name in categories],
        people=[_person(row.id, row.name, votes) for row in names],
        enough=enough_for_width(mean * doubles, doubles, 0.05) if doubles else None,
        reported=sum(row.state == "reported" for row in pairs),
        discarded=sum(row.state == "discarded" for row in pairs),
    )


def disputed(store: Store, threshold: float = 0.67, criterion: str = "") -> list[Disputed]:
    """Pairs whose votes agree less than `threshold`, worst first, that no senior has decided.

    Args:
        store: the votes.
        threshold: share of equal answers among the pairs of votes on the pair.
        criterion: by the answers to this one, not by the preference.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: {threshold} came; expected a share from 0 to 1")
    votes = counting_votes(store)
    decided = {vote["pair"] for vote in votes if vote["kind"] == "adjudication"}
    by_pair: dict[int, list[dict[str, Any]]] = {}
    for vote in votes:
        asked = not criterion or criterion in vote["criteria"]
        if vote["kind"] == "normal" and vote["state"] == "open" and vote["pair"] not in decided and asked:
            by_pair.setdefault(vote["pair"], []).append(vote)
    found = []
    for pair, given in by_pair.items():
        answers = [np.sign(vote["criteria"][criterion] if criterion else vote["preference"]) for vote in given]
        same = [one == other for place, one in enumerate(answers) for other in answers[place + 1 :]]
        if same and np.mean(same) < threshold:
            found.append(Disputed(pair, given[0]["category"], float(np.mean(same)), given))
    return sorted(found, key=lambda item: (item.agreement, item.pair))


def discard_disputed(store: Store, threshold: float = 0.67) -> list[int]:
    """Take all disputed pairs out in place of adjudicating them; returns their numbers."""
    pairs = [item.pair for item in disputed(store, threshold)]
    store.discard(pairs)
    return pairs


def model_labels(votes: PairVotes) -> np.ndarray:
    """Soft labels by the vote model of skill and side bias."""
    return fit_votes(votes).better


def labels(store: Store, soft: Soft | None = None, drop_flagged: bool = False) -> list[Label]:
    """What each open pair's votes come to: a senior's decision, else the majority, else split.

    Args:
        store: the votes.
        soft: gives the probabilities in place of the shares of votes, such as `model_labels`.
        drop_flagged: leave out votes that were too fast, and those that missed a known answer.
    """
    votes = [vote for vote in counting_votes(store) if vote["state"] == "open"]
    decisions = {vote["pair"]: vote for vote in votes if vote["kind"] == "adjudication"}  # the newest one
    normal = [v for v in votes if v["kind"] == "normal" and not (drop_flagged and v["flags"])]
    voted = {vote["pair"] for vote in normal}
    found = [Label(pair, _decided(v), "adjudicated", 0, 0.5) for pair, v in decisions.items() if pair not in voted]
    if not normal:
        return sorted(found, key=lambda one: one.pair)
    given = pair_votes(normal)
    row = np.searchsorted(given.pair_names, given.pairs)
    counts = np.bincount(row)
    shares = np.bincount(row, given.first) / counts
    better = shares if soft is None else soft(given)
    for pair, share, probability, count in zip(given.pair_names, shares, better, counts, strict=True):
        state = "split" if share == 0.5 else "agreed"
        if int(pair) in decisions:
            state = "adjudicated"
            probability = _decided(decisions[int(pair)])
        found.append(Label(int(pair), float(probability), state, int(count), float(share)))
    return sorted(found, key=lambda one: one.pair)


def _decided(vote: dict[str, Any]) -> float:
    """The probability that the first response is better, by a senior's decision."""
    return float(1 - np.sign(vote["preference"])) / 2


def changed(found: Sequence[Label]) -> list[Label]:
    """The labels whose side is not that of the majority, split pairs with a side included, the surest first."""
    moved = [one for one in found if np.sign(one.better - 0.5) != np.sign(one.share - 0.5)]
    return sorted(moved, key=lambda one: (-abs(one.better - 0.5), one.pair))


def pair_votes(votes: Sequence[dict[str, Any]]) -> PairVotes:
    """Votes as the vote model takes them; a negative preference is one for the first response."""
    numbers = {key: np.array([vote[key] for vote in votes]) for key in ("pair", "person", "preference", "swapped")}
    first = votes_for_first(-numbers["preference"])
    return PairVotes(numbers["pair"], numbers["person"], first, ~numbers["swapped"].astype(bool))


def _answer(vote: dict[str, Any]) -> int:
    return int(np.sign(vote["preference"]))


def _votes(votes: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], int]) -> Votes:
    columns = [[vote["pair"] for vote in votes], [vote["person"] for vote in votes], [value(vote) for vote in votes]]
    return Votes(*(np.array(column, np.int64) for column in columns))


def _quality(name: str, votes: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], int]) -> Quality:
    table = _votes(votes, value)
    return Quality(name, len(votes), raw_agreement(table), krippendorff_alpha(table, "ordinal", resamples=500))


def _criterion(name: str, votes: Sequence[dict[str, Any]]) -> Quality:
    asked = [vote for vote in votes if name in vote["criteria"]]
    return _quality(name, asked, lambda vote: int(np.sign(vote["criteria"][name])))


def _person(number: int, name: str, votes: Sequence[dict[str, Any]]) -> PersonQuality:
    mine = [vote for vote in votes if vote["person"] == number]
    normal = {vote["pair"]: vote for vote in mine if vote["kind"] == "normal"}
    sides = [_answer(vote) * (-1 if vote["swapped"] else 1) for vote in mine]
    known = [vote for vote in mine if vote["gold"] is not None]
    again = [(normal[v["pair"]], v) for v in mine if v["kind"] == "repeat" and v["pair"] in normal]

    def of_one(function: Callable[..., dict[int, Interval]], *columns: list[int]) -> Interval | None:
        if not columns[0]:
            return None
        arrays = [np.array(column, np.int64) for column in columns]
        return function(np.full(len(arrays[0]), number), *arrays).get(number)

    return PersonQuality(
        id=number,
        name=name,
        votes=len(normal),
        seconds=float(np.median([vote["seconds"] for vote in mine])) if mine else 0.0,
        flagged=sum(bool(vote["flags"]) for vote in mine),
        left=of_one(side_bias, sides),
        gold=of_one(gold_accuracy, [_answer(vote) for vote in known], [vote["gold"] for vote in known]),
        consistency=of_one(self_consistency, [_answer(one) for one, _ in again], [_answer(two) for _, two in again]),
    )
