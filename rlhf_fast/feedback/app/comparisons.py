"""The judged pairs of a store as rows of a comparisons file, which the reward and DPO trainers read."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from rlhf_fast.feedback import quality
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.store import Store


def comparison_rows(store: Store) -> list[dict[str, Any]]:
    """One row a pair with a better side, by majority or a senior's decision; split pairs have none and stay out."""
    columns = [t.pair.c.id, t.pair.c.first, t.pair.c.second, t.prompt.c.messages, t.prompt.c.category]
    with store.read() as connection:
        pairs = connection.execute(sa.select(*columns).where(t.prompt.c.id == t.pair.c.prompt)).all()
        said = {row.id: row.text for row in connection.execute(sa.select(t.response.c.id, t.response.c.text))}
    known = {row.id: row for row in pairs}
    rows = []
    for label in quality.labels(store):
        if label.better == 0.5:
            continue
        row = known[label.pair]
        chosen, rejected = (row.first, row.second)[:: 1 if label.better > 0.5 else -1]
        comparison = {"prompt": row.messages, "chosen": said[chosen], "rejected": said[rejected]}
        confidence = max(label.better, 1 - label.better)
        rows.append({**comparison, "category": row.category, "annotator": "people", "confidence": confidence,
                     "votes": label.votes, "state": label.state})  # fmt: skip
    return rows
