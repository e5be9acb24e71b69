"""The forms of other tools, both ways: votes of Label Studio and Argilla, labels of HH-RLHF and RewardBench.

A file is read whole or refused with its line: whatever could be read in two ways (a bare "1", a rating alone, two
questions of which none is named `preference`) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple

from rlhf_fast.data.comparisons import comparison_of
from rlhf_fast.data.messages import messages_of
from rlhf_fast.data.rows import RecordError, Row, rows_of

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = re.compile(r"(answer|response|reply|completion|generation|output|text)[-_ ]?([0-9a-f])", re.IGNORECASE)
_PROMPTS = ("prompt", "instruction", "question")


class Vote(NamedTuple):
    annotator: str
    preference: int  # -3: the first is much better .. 3: the second
    seconds: float = 0.0  # that it took; 0: not known
    at: float = 0.0  # seconds since 1970; 0: not known
    decides: bool = False  # a reviewer's answer that is taken for the truth, no vote


@dataclass(frozen=True)
class Judged:
    """A pair with the votes on it."""

    prompt: list[dict[str, Any]]
    first: str
    second: str
    category: str = ""
    votes: tuple[Vote, ...] = ()
    name: str = field(default="", compare=False)  # where it stands


def read_votes(source: Any) -> tuple[str, list[Judged]]:
    """The name of the tool whose export this is, and the pairs with their votes."""
    rows = rows_of(source)
    if not rows:
        raise RecordError(f"{source}: it has no rows; expected an export of Label Studio or Argilla")
    name, first = rows[0]
    if "data" in first or _is_studio_min(first):
        return "label-studio", [_studio_item(row, name) for name, row in rows]
    if "fields" in first or any(key.endswith(".responses") for key in first):
        return "argilla", [_argilla_item(row, name) for name, row in rows]
    if "chosen" in first:
        raise RecordError(f"{name}: it has labels and no votes; the trainers read it as it is")
    raise RecordError(
        f"{name}: keys {', '.join(map(repr, list(first)[:8]))} came; expected Label Studio's data and annotations, or "
        "Argilla's fields and responses"
    )


# Label Studio --------------------------------------------------------------------------------------------------------


def to_label_studio(items: Sequence[Judged]) -> list[Row]:
    """Tasks for a Pairwise tag named `side` and Choices named `preference` (-3 to -1, tie, +1 to +3)."""
    return [
        {
            "data": {"prompt": _said(one), "answer1": one.first, "answer2": one.second, "category": one.category},
            "annotations": [
                {
                    "completed_by": vote.annotator,
                    "lead_time": vote.seconds,
                    "created_at": datetime.fromtimestamp(vote.at, timezone.utc).isoformat(),
                    "ground_truth": vote.decides,
                    "was_cancelled": False,
                    "result": _studio_result(vote.preference),
                }
                for vote in one.votes
            ],
        }
        for one in items
    ]


def _studio_result(preference: int) -> list[Row]:
    names: Row = {"from_name": "preference", "to_name": "answer1"}
    result: list[Row] = [{**names, "type": "choices", "value": {"choices": [_word(preference)]}}]
    if preference:
        side = "left" if preference < 0 else "right"
        names = {"from_name": "side", "to_name": "side"}  # itself, as the editor writes it
        result.append({**names, "type": "pairwise", "value": {"selected": side}})
    return result


def from_label_studio(source: Any) -> list[Judged]:
    """Pairs of the JSON export (not JSON-MIN). Cancelled annotations are left out; `ground_truth` ones decide."""
    return [_studio_item(row, name) for name, row in rows_of(source)]


def _is_studio_min(row: Row) -> bool:
    return "data" not in row and {"annotator", "annotation_id"} <= row.keys()


def _studio_item(row: Row, name: str) -> Judged:
    if _is_studio_min(row):
        raise RecordError(f"{name}: this is Label Studio's JSON-MIN, without what was cancelled; export as JSON")
    data = _object(row.get("data"), "data", name)
    sides = _sides(data, name)
    votes = []
    for one in _list(row.get("annotations", []), "annotations", name):
        given = _object(one, "an annotation", name)
        if given.get("was_cancelled"):
            continue
        who = given.get("completed_by")
        who = who.get("id", who.get("email")) if isinstance(who, dict) else who
        answers = [
            _studio_answer(_object(part, "a result", name), sides, name)
            for part in _list(given.get("result"), "result", name)
        ]
        preference = _one_of(dict(answers), f"annotation {given.get('id', '')} of {who}", name)
        seconds, at = _seconds(given.get("lead_time"), name), _time(given.get("created_at"), name)
        votes.append(Vote(_person(who, name), preference, seconds, at, given.get("ground_truth") is True))
    return _judged(data, sides, votes, data.get("category"), name)


def _studio_answer(part: Row, sides: tuple[str, str], name: str) -> tuple[str, Any]:
    """The control's name and the preference that it says, or else what it holds."""
    value = _object(part.get("value"), "value", name)
    if part.get("type") == "pairwise":
        said = value.get("selected")
    elif part.get("type") == "choices":
        choices = _list(value.get("choices"), "choices", name)
        said = choices[0] if len(choices) == 1 else value  # several of them are no ranking
    else:
        said = value
    return str(part.get("from_name")), _preference(said, sides)


# Argilla -------------------------------------------------------------------------------------------------------------


def to_argilla(items: Sequence[Judged], found: Sequence[float] = ()) -> list[Row]:
    """Records of a label question `preference` (-3 to -1, tie, +1 to +3; Argilla's ratings go from 0 to 10 alone), with
    `found` (probability of the first) as suggestions. Times and decisions have no place in them and are left out."""
    records = []
    for place, one in enumerate(items):
        votes = [vote for vote in one.votes if not vote.decides]
        values = [{"value": _word(vote.preference), "user_id": vote.annotator} for vote in votes]
        suggestions: Row = {}
        if found:
            better = found[place]
            side = _word(-1 if better > 0.5 else 1 if better < 0.5 else 0)
            suggestions["preference"] = {"value": side, "score": max(better, 1 - better), "agent": "rlhf-fast"}
        records.append(
            {
                "fields": {"prompt": _said(one), "response1": one.first, "response2": one.second},
                "metadata": {"category": one.category} if one.category else {},
                "responses": {"preference": values} if values else {},
                "suggestions": suggestions,
            }
        )
    return records


def from_argilla(source: Any) -> list[Judged]:
    """Pairs of Argilla 2's `to_json`, `to_list` or `to_datasets`, nested or flattened.

    A label or ranking question says which is better, or two rating questions named after the two responses do. Drafts
    and discarded responses are left out where their status is written: Argilla's nested form does not write it.
    """
    return [_argilla_item(row, name) for name, row in rows_of(source)]


def _argilla_item(row: Row, name: str) -> Judged:
    fields, metadata, responses = _argilla_parts(row, name)
    sides = _sides(fields, name)
    by_person: dict[str, Row] = {}
    for question, given in responses.items():
        for one in _list(given, f"responses.{question}", name):
            answer = _object(one, "a response", name)
            if answer.get("status") in ("draft", "discarded"):
                continue
            said = by_person.setdefault(_person(answer.get("user_id"), name), {})
            if question in said:
                raise RecordError(f"{name}: {answer['user_id']} answered {question} twice; expected one answer")
            said[question] = answer.get("value")
    votes = []
    for who, said in by_person.items():
        if "preference" in responses:
            if "preference" not in said:
                continue
            said = {"preference": said["preference"]}
        answers = {question: _preference(value, sides) for question, value in said.items()}
        votes.append(Vote(who, _one_of(_by_ratings(said, answers, sides), f"the responses of {who}", name)))
    return _judged(fields, sides, votes, metadata.get("category"), name)


def _argilla_parts(row: Row, name: str) -> tuple[Row, Row, Row]:
    """Fields, metadata and responses by question, of either form."""
    if "fields" in row:
        metadata, responses = (_object(row.get(key) or {}, key, name) for key in ("metadata", "responses"))
        return _object(row["fields"], "fields", name), metadata, responses
    responses = {}
    for key, values in row.items():
        if not key.endswith(".responses") or values is None:
            continue
        columns = [values, row.get(f"{key}.users"), row.get(f"{key}.status") or [None] * len(values)]
        lengths = {len(_list(column, key, name)) for column in columns}
        if len(lengths) > 1:
            raise RecordError(
                f"{name}: {key} and its users and status have {sorted(lengths)} entries; expected as many"
            )
        responses[key.removesuffix(".responses")] = [
            {"value": value, "user_id": who, "status": status} for value, who, status in zip(*columns, strict=True)
        ]
    return row, row, responses


def _by_ratings(said: Row, answers: Row, sides: tuple[str, str]) -> Row:
    """What one rating for each response comes to, where no question compares them."""
    if any(isinstance(answer, int) for answer in answers.values()):
        return answers
    found = [
        [value for question, value in said.items() if _plain(side) in _plain(question) and type(value) is int]
        for side in sides
    ]
    if any(len(ratings) != 1 for ratings in found):
        return answers
    (first,), (second,) = found
    return {"ratings": (second > first) - (second < first)}


# Answers -------------------------------------------------------------------------------------------------------------


def _preference(value: Any, sides: tuple[str, str]) -> Any:
    """The preference that a value says, as a whole number; the value as text if it says none.

    A side is its field's name, left or right; strengths have a sign, for a bare 1 may be the first or a step to the
    second. A ranking is a list of both sides, best first, or of {"value", "rank"}.
    """
    if isinstance(value, str):
        if re.fullmatch(r"[+-][1-3]", value):
            return int(value)
        words = {"left": -1, "right": 1, "tie": 0, _plain(sides[0]): -1, _plain(sides[1]): 1}
        return words.get(_plain(value), repr(value))
    if isinstance(value, list) and len(value) == 2:
        ranked = [one if isinstance(one, dict) else {"value": one, "rank": place} for place, one in enumerate(value)]
        ranks = {_preference(one.get("value"), sides): one.get("rank", place) for place, one in enumerate(ranked)}
        if ranks.keys() == {-1, 1} and all(type(rank) is int for rank in ranks.values()):
            return (ranks[-1] > ranks[1]) - (ranks[-1] < ranks[1])
    return repr(value)


def _one_of(answers: dict[str, Any], what: str, name: str) -> int:
    """The one answer that says which is better: that of `preference`, or else the only one."""
    known = {key: value for key, value in answers.items() if isinstance(value, int)}
    if "preference" in answers:
        known = {key: value for key, value in known.items() if key == "preference"}
    if len(known) > 1:
        raise RecordError(
            f"{name}: {what} says by {' and by '.join(known)} which is better; name one of them preference"
        )
    if not known:
        came = "; ".join(f"{key}: {value}" for key, value in answers.items()) or "nothing"
        raise RecordError(
            f"{name}: {what} does not say which is better ({came:.200}); expected left, right or tie, a response's "
            "name, -3 to -1 or +1 to +3, a ranking of both, or a rating for each"
        )
    return int(next(iter(known.values())))


def _word(preference: int) -> str:
    return f"{preference:+d}" if preference else "tie"


def _sides(data: Row, name: str) -> tuple[str, str]:
    """The keys of the two responses, such as answer1 and answer2."""
    found = sorted(key for key, value in data.items() if _ANSWER.fullmatch(key) and value is not None)
    if len(found) != 2 or _plain(found[0])[:-1] != _plain(found[1])[:-1]:
        came = ", ".join(map(repr, found or list(data)[:8])) or "none"
        raise RecordError(f"{name}: keys {came} came; expected two responses, such as answer1 and answer2")
    return found[0], found[1]


def _plain(word: str) -> str:
    return re.sub(r"[\W_]", "", word.lower())


def _said(one: Judged) -> Any:
    """The prompt as text where it is no more than that."""
    alone = len(one.prompt) == 1 and one.prompt[0].keys() == {"role", "content"} and one.prompt[0]["role"] == "user"
    return one.prompt[0]["content"] if alone else one.prompt


def _judged(data: Row, sides: tuple[str, str], votes: list[Vote], category: Any, name: str) -> Judged:
    prompts = [data[key] for key in _PROMPTS if data.get(key) is not None]
    if len(prompts) != 1:
        raise RecordError(f"{name}: {len(prompts)} prompts came; expected one of the keys {', '.join(_PROMPTS)}")
    (prompt,) = prompts
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    first, second = (_text(data[side], side, name) for side in sides)
    seen = set()
    for vote in votes:
        if (vote.annotator, vote.decides) in seen:
            raise RecordError(f"{name}: {vote.annotator} has judged it twice; leave out the one that does not count")
        seen.add((vote.annotator, vote.decides))
    category = _text(category or "", "category", name)
    return Judged(messages_of(prompt, "prompt", name), first, second, category, tuple(votes), name)


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
    """Records of RewardBench; what wrote the responses, where it is known, goes to chosen_model and rejected_model."""
    found = []
    for place, row in enumerate(rows):
        wrote = [one["checkpoint"] for one in row.get("provenance", {}).get("responses", [])] or ["", ""]
        sides: Row = {"chosen": row["chosen"], "chosen_model": wrote[0]}
        sides |= {"rejected": row["rejected"], "rejected_model": wrote[1]}
        found.append({"prompt": row["prompt"], **sides, "subset": row.get("category", ""), "id": place})
    return found


def from_rewardbench(source: Any) -> list[Row]:
    """Comparisons of RewardBench, and of RewardBench 2 one for each correct response beside each of the others."""
    found = []
    for name, row in rows_of(source):
        subset = _text(row.get("subset") or "", "subset", name)
        models = [row.get("chosen_model"), row.get("rejected_model")]
        for chosen in _each(row.get("chosen")):
            for rejected in _each(row.get("rejected")):
                given = {"prompt": row.get("prompt"), "chosen": chosen, "rejected": rejected, "category": subset}
                made = comparison_of(given, name).as_dict()
                if any(models):
                    wrote = [{"checkpoint": str(model or ""), "seed": None} for model in models]
                    made["provenance"] = {"responses": wrote}
                found.append(made)
    return found


def _each(side: Any) -> list[Any]:
    """The responses of a side: RewardBench 2 has a list of texts, where a list of messages is one response."""
    several = isinstance(side, list) and all(isinstance(one, str) for one in side)
    return side if several else [side]


FORMATS: dict[str, tuple[Callable[..., list[Any]], Callable[..., list[Any]]]] = {  # name: (out, in)
    "label-studio": (to_label_studio, from_label_studio),
    "argilla": (to_argilla, from_argilla),
    "hh": (to_hh, from_hh),
    "rewardbench": (to_rewardbench, from_rewardbench),
}
VOTES = ("label-studio", "argilla")  # those that keep votes (`Judged`); the others have labels, as rows


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


def _person(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise RecordError(f"{name}: {value!r:.40} came for who judged it; expected a name or number")
    return str(value)


def _seconds(value: Any, name: str) -> float:
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise RecordError(f"{name}: {value!r:.40} seconds came; expected a number of at least 0")
    return float(value)


def _time(value: Any, name: str) -> float:
    """Seconds since 1970 of a time such as 2026-03-09T22:16:08.728353Z, which is UTC where it has no zone."""
    if value is None:
        return 0.0
    try:
        at = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        return max(0.0, at.replace(tzinfo=at.tzinfo or timezone.utc).timestamp())
    except (ValueError, OverflowError):
        raise RecordError(f"{name}: {value!r:.40} came for a time; expected one such as 2026-03-09T22:16:08Z") from None
