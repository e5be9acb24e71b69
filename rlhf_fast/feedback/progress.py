"""How far people are with the pairs of a store, and whether that is enough to go on with."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import sqlalchemy as sa

from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.quality import counting_votes
from rlhf_fast.feedback.store import Store

LEAST = 4  # pairs with a better side: two to learn from, two to measure on


@dataclass(frozen=True)
class Progress:
    judged: int  # open pairs with a vote
    equal: int  # of these, on which all said "about equal"
    left: int  # open pairs that nobody has judged or skipped
    seconds: float  # median of a vote; 0 without votes

    def is_enough(self, wanted: int) -> bool:
        """Whether `wanted` pairs are judged, enough of them with a better side; or nothing is left."""
        return not self.left or (self.judged >= wanted and self.judged - self.equal >= LEAST)


def progress(store: Store) -> Progress:
    votes = [vote for vote in counting_votes(store) if vote["kind"] == "normal" and vote["state"] == "open"]
    judged = {vote["pair"] for vote in votes}
    sided = {vote["pair"] for vote in votes if vote["preference"]}
    answered = sa.exists().where(t.assignment.c.pair == t.pair.c.id, t.assignment.c.state.in_(("done", "skipped")))
    wanted = (t.pair.c.kind == "normal") & (t.pair.c.state == "open") & ~answered
    with store.read() as connection:
        left = connection.execute(sa.select(sa.func.count()).select_from(t.pair).where(wanted)).scalar_one()
    seconds = statistics.median(vote["seconds"] for vote in votes) if votes else 0.0
    return Progress(len(judged), len(judged - sided), left, seconds)
