"""What the votes of a store are worth: agreement, people, disputed items, and labels made of votes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa

from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.people import (
    RESAMPLES,
    PairOfPeople,
    PersonQuality,
    Vote,
    answer,
    pairs_of,
    people_of,
    table_of,
)
from rlhf_fast.feedback.store import Store, plan_of
from rlhf_fast.statistics.agreement import (
    Agreement,
    Ceiling,
    ceiling,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    raw_agreement,
)
from rlhf_fast.statistics.annotators import Drift, drift
from rlhf_fast.statistics.sequential import Progress, enough_for_width
from rlhf_fast.statistics.vote_model import PairVotes, fit_votes, votes_for_first

IMPORTED = "imported"  # the arm of votes that another tool has collected
Soft = Callable[[PairVotes], np.ndarray]  # (I,): probability that the first response of each pair is the better


@dataclass(frozen=True)
class Quality:
    """The agreement of one criterion, one category, one annotator, or all votes."""

    name: str
    votes: int
    raw: Agreement
    cohen: Agreement  # mean over pairs of people
    fleiss: Agreement
    alpha: Agreement


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
    annotators: list[Quality]  # of those who have voted
    people: list[PersonQuality]
    pairs_of_people: list[PairOfPeople]
    drift: Drift  # of everybody together
    needs: Quality | None  # the criterion that people agree least on: its guideline needs work
    needs_clearly: bool  # whether its interval is below those of the other criteria
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
        rows = connection.execute(sa.select(t.person.c.id, t.person.c.name).order_by(t.person.c.id)).all()
        longer = _longer(connection)
    names = {row.id: row.name for row in rows}
    open_pairs = {row.id for row in pairs if row.state == "open"}
    counts: dict[int, int] = {}
    for vote in normal:
        counts[vote["pair"]] = counts.get(vote["pair"], 0) + 1
    overall = _quality("all", normal)
    decided = raw_agreement(table_of([vote for vote in normal if vote["preference"]]))
    asked = sorted({name for vote in normal for name in vote["criteria"]})
    criteria = [_criterion(name, normal) for name in asked]
    people = people_of(list(names.items()), votes, longer)
    needs, clearly = _needs(criteria)
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
        criteria=criteria,
        categories=[_quality(name, [v for v in normal if v["category"] == name]) for name in categories],
        annotators=[_annotator(one, normal) for one in people if one.votes],
        people=people,
        pairs_of_people=pairs_of(names, votes),
        drift=drift(table_of(normal), np.array([vote["at"] for vote in normal])),
        needs=needs,
        needs_clearly=clearly,
        enough=enough_for_width(mean * doubles, doubles, 0.05) if doubles else None,
        reported=sum(row.state == "reported" for row in pairs),
        discarded=sum(row.state == "discarded" for row in pairs),
    )


def _longer(connection: sa.Connection) -> dict[int, int]:
    """Of each pair, by how many characters the second response is the longer one."""
    first, second = t.response.alias(), t.response.alias()
    both = (t.pair.c.first == first.c.id) & (t.pair.c.second == second.c.id)
    by = sa.func.length(second.c.text) - sa.func.length(first.c.text)
    return {number: by for number, by in connection.execute(sa.select(t.pair.c.id, by).where(both))}


def disputed(store: Store, threshold: float | None = None, criterion: str = "") -> list[Disputed]:
    """Pairs whose votes agree less than `threshold`, worst first, that no senior has decided.

    Args:
        store: the votes.
        threshold: share of equal answers among the pairs of votes on the pair; by default the plan's.
        criterion: by the answers to this one, not by the preference.
    """
    threshold = store.plan.dispute_below if threshold is None else threshold
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


def discard_disputed(store: Store, threshold: float | None = None) -> list[int]:
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


def _quality(
    name: str, votes: Sequence[dict[str, Any]], value: Callable[[Vote], int] = answer, person: int | None = None
) -> Quality:
    """Agreement by sides; alpha takes them as ordered: first, same, second. Cohen's kappa is of the pairs with
    `person`, where one is given."""
    table = table_of(votes, value)
    return Quality(
        name,
        len(votes),
        raw_agreement(table),
        cohen_kappa(table, person, resamples=RESAMPLES),
        fleiss_kappa(table, resamples=RESAMPLES),
        krippendorff_alpha(table, "ordinal", resamples=RESAMPLES),
    )


def _criterion(name: str, votes: Sequence[dict[str, Any]]) -> Quality:
    asked = [vote for vote in votes if name in vote["criteria"]]
    return _quality(name, asked, lambda vote: int(np.sign(vote["criteria"][name])))


def _annotator(person: PersonQuality, votes: Sequence[dict[str, Any]]) -> Quality:
    """The share and Cohen's kappa are of this person with each other one; Fleiss's kappa and alpha know no pairs of
    people and are of all votes on this person's items."""
    items = {vote["pair"] for vote in votes if vote["person"] == person.id}
    found = _quality(person.name, [vote for vote in votes if vote["pair"] in items], person=person.id)
    return replace(found, votes=person.votes, raw=person.agreement)


def _needs(criteria: Sequence[Quality]) -> tuple[Quality | None, bool]:
    """The criterion that people agree least on, and whether its interval is below those of the others."""
    measured = [(one.raw.interval, one) for one in criteria if one.raw.interval]
    if not measured:
        return None, False
    lowest, worst = min(measured, key=lambda row: row[0].mean)
    rest = [interval.low for interval, one in measured if one is not worst]
    return worst, bool(rest) and lowest.high < min(rest)
