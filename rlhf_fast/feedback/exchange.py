"""Comparisons in and out: files for the trainers, and the forms of Label Studio, Argilla, HH-RLHF and RewardBench.

Label Studio and Argilla keep votes (`Judged`), HH-RLHF and RewardBench labels (rows of a comparisons file).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from rlhf_fast.data.comparisons import comparison_of
from rlhf_fast.data.messages import messages_of
from rlhf_fast.data.rows import RecordError, Row, rows_of
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.quality import Label, Soft, counting_votes, labels
from rlhf_fast.feedback.store import Store

_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Judged:
    """A pair with the votes on it: (annotator, preference from -3 for the first to 3 for the second, seconds)."""

    prompt: list[dict[str, Any]]
    first: str
    second: str
    category: str = ""
    votes: tuple[tuple[str, int, float], ...] = ()


# Ours ----------------------------------------------------------------------------------------------------------------


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
    pairs = _pairs(store)
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
                "ok": [vote["first_ok"], vote["second_ok"]][::order],
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
    pairs = _pairs(store)
    return [
        {"prompt": pairs[v["pair"]]["messages"], "completion": v["better_answer"], "annotator": v["pseudonym"]}
        for v in counting_votes(store)
        if v["better_answer"].strip() and v["state"] == "open"
    ]


def judged(store: Store) -> list[Judged]:
    """Every open pair with its first votes, annotators by pseudonym."""
    votes: dict[int, list[tuple[str, int, float]]] = {}
    for vote in counting_votes(store):
        if vote["kind"] == "normal":
            votes.setdefault(vote["pair"], []).append((vote["pseudonym"], vote["preference"], vote["seconds"]))
    return [
        Judged(pair["messages"], pair["first"], pair["second"], pair["category"], tuple(votes.get(number, [])))
        for number, pair in _pairs(store).items()
    ]


def add_pairs(store: Store, items: Iterable[Judged]) -> int:
    """Add pairs of another tool to the queue, without their votes; returns how many."""
    return sum(len(store.add_prompt(one.prompt, [one.first, one.second], one.category)) for one in items)


def _pairs(store: Store) -> dict[int, dict[str, Any]]:
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


# Label Studio and Argilla --------------------------------------------------------------------------------------------


def to_label_studio(items: Sequence[Judged]) -> list[Row]:
    """Tasks with annotations of a Pairwise tag named `side`; strength and ties go into choices named `preference`."""
    return [
        {
            "data": {"prompt": one.prompt, "answer1": one.first, "answer2": one.second, "category": one.category},
            "annotations": [
                {"completed_by": who, "lead_time": seconds, "result": _studio_result(preference)}
                for who, preference, seconds in one.votes
            ],
        }
        for one in items
    ]


def _studio_result(preference: int) -> list[Row]:
    names: Row = {"from_name": "preference", "to_name": "answer1"}
    result: list[Row] = [{**names, "type": "choices", "value": {"choices": [str(preference)]}}]
    if preference:
        side = "left" if preference < 0 else "right"
        names = {"from_name": "side", "to_name": ["answer1", "answer2"]}
        result.append({**names, "type": "pairwise", "value": {"selected": side}})
    return result


def from_label_studio(source: Any) -> list[Judged]:
    """Pairs of Label Studio's JSON export; annotations that were cancelled are left out."""
    return [_studio_item(row, name) for name, row in rows_of(source)]


def _studio_item(row: Row, name: str) -> Judged:
    data = _object(row.get("data"), "data", name)
    votes = []
    for one in _list(row.get("annotations", []), "annotations", name):
        given = _object(one, "an annotation", name)
        if given.get("was_cancelled"):
            continue
        who = given.get("completed_by", "")
        who = who.get("id", "") if isinstance(who, dict) else who
        preference: Any = None
        for part in _list(given.get("result"), "result", name):
            value = _object(_object(part, "a result", name).get("value"), "value", name)
            if part.get("type") == "choices" and part.get("from_name") == "preference":
                choices = _list(value.get("choices"), "choices", name)
                preference = _preference(choices[0] if choices else None, name)
            elif part.get("type") == "pairwise" and preference is None:
                preference = {"left": -1, "right": 1}.get(str(value.get("selected")))
        if preference is None:
            raise RecordError(f"{name}: an annotation has no side; expected a pairwise result of left or right")
        votes.append((str(who), preference, _seconds(given.get("lead_time"), name)))
    return _judged(data, ("answer1", "answer2"), votes, name)


def to_argilla(items: Sequence[Judged], found: Sequence[float] = ()) -> list[Row]:
    """Records of a rating question `preference`, with `found` (probability of the first) as suggestions."""
    records = []
    for place, one in enumerate(items):
        values = [{"value": preference, "user_id": who} for who, preference, _ in one.votes]
        suggestions: Row = {}
        if found:
            better = found[place]
            suggested = {"value": -1 if better > 0.5 else 1 if better < 0.5 else 0, "score": max(better, 1 - better)}
            suggestions["preference"] = {**suggested, "agent": "rlhf-fast"}
        records.append(
            {
                "fields": {"prompt": one.prompt, "response1": one.first, "response2": one.second},
                "metadata": {"category": one.category, "seconds": [seconds for *_, seconds in one.votes]},
                "responses": {"preference": values},
                "suggestions": suggestions,
            }
        )
    return records


def from_argilla(source: Any) -> list[Judged]:
    """Pairs of records of that question; a label question of `response1`, `response2` and `tie` is read as well."""
    return [_argilla_item(row, name) for name, row in rows_of(source)]


def _argilla_item(row: Row, name: str) -> Judged:
    metadata = _object(row.get("metadata") or {}, "metadata", name)
    responses = _object(row.get("responses") or {}, "responses", name)
    seconds = _list(metadata.get("seconds", []), "seconds", name)
    votes = []
    for place, one in enumerate(_list(responses.get("preference", []), "responses.preference", name)):
        given = _object(one, "a response", name)
        value = {"response1": -1, "response2": 1, "tie": 0}.get(str(given.get("value")), given.get("value"))
        taken = _seconds(seconds[place] if place < len(seconds) else 0, name)
        votes.append((str(given.get("user_id", "")), _preference(value, name), taken))
    data = {**_object(row.get("fields"), "fields", name), "category": metadata.get("category") or ""}
    return _judged(data, ("response1", "response2"), votes, name)


def _judged(data: Row, sides: tuple[str, str], votes: list[tuple[str, int, float]], name: str) -> Judged:
    texts = [data.get(side) for side in sides]
    for side, text in zip(sides, texts, strict=True):
        _text(text, side, name)
    prompt, category = data.get("prompt"), data.get("category", "")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": _text(prompt, "prompt", name)}]
    messages = messages_of(prompt, "prompt", name)
    return Judged(messages, str(texts[0]), str(texts[1]), _text(category, "category", name), tuple(votes))


# HH-RLHF and RewardBench ---------------------------------------------------------------------------------------------


def to_hh(rows: Sequence[Row]) -> list[Row]:
    """Transcripts of comparisons; those that a transcript cannot hold are refused by number."""
    return [_hh_row(row, f"row {place}") for place, row in enumerate(rows)]


def _hh_row(row: Row, name: str) -> Row:
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = ""
    for message in messages:
        speaker = {"user": "Human", "assistant": "Assistant"}.get(message["role"])
        if speaker is None:
            raise RecordError(f"{name}: a message of the {message['role']}; a transcript has Human and Assistant alone")
        said += f"\n\n{speaker}: {_spoken(message['content'], name)}"
    return {side: f"{said}\n\nAssistant: {_spoken(row[side], name)}" for side in ("chosen", "rejected")}


def _spoken(text: Any, name: str) -> str:
    if not isinstance(text, str) or _TURN.search(f"\n\n{text}") or text != text.strip():
        raise RecordError(f"{name}: a text with a turn of its own, or with space around it, would be read otherwise")
    return text


def from_hh(source: Any) -> list[Row]:
    return [comparison_of(row, name).as_dict() for name, row in rows_of(source)]


def to_rewardbench(rows: Sequence[Row]) -> list[Row]:
    return [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"],
         "subset": row.get("category", ""), "id": place}
        for place, row in enumerate(rows)
    ]  # fmt: skip


def from_rewardbench(source: Any) -> list[Row]:
    found = []
    for name, row in rows_of(source):
        subset = _text(row.get("subset", ""), "subset", name)
        wanted: Row = {key: row[key] for key in ("prompt", "chosen", "rejected") if key in row}
        found.append(comparison_of({**wanted, "category": subset}, name).as_dict())
    return found


FORMATS: dict[str, tuple[Callable[..., list[Any]], Callable[..., list[Any]]]] = {  # name: (out, in)
    "label-studio": (to_label_studio, from_label_studio),
    "argilla": (to_argilla, from_argilla),
    "hh": (to_hh, from_hh),
    "rewardbench": (to_rewardbench, from_rewardbench),
}


# Checks --------------------------------------------------------------------------------------------------------------


def _object(value: Any, key: str, name: str) -> Row:
    if not isinstance(value, dict):
        raise RecordError(f"{name}: {key} should be an object {{...}}, got {type(value).__name__}")
    return value


def _list(value: Any, key: str, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RecordError(f"{name}: {key} should be a list, got {type(value).__name__}")
    return value


def _text(value: Any, key: str, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name}: {key} should be text, got {type(value).__name__}")
    return value


def _preference(value: Any, name: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?[0-3]", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 3:
        raise RecordError(f"{name}: a preference of {value!r:.40} came; expected a whole number from -3 to 3")
    return value


def _seconds(value: Any, name: str) -> float:
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise RecordError(f"{name}: {value!r:.40} seconds came; expected a number of at least 0")
    return float(value)
