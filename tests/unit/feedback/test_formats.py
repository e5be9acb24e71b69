"""The forms of other tools: both ways, as those tools write them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.rows import RecordError
from rlhf_fast.feedback import formats as f

EXPORTS = Path(__file__).parent / "exports"
ANN, BO, CY = (f"00000000-0000-0000-0000-00000000000{n}" for n in (1, 2, 3))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(str.strip)
asked = st.one_of(
    texts.map(lambda text: [{"role": "user", "content": text}]),
    st.lists(texts, min_size=3, max_size=3).map(
        lambda said: [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), said, strict=True)]
    ),
)
one_vote = st.builds(
    f.Vote, texts, st.integers(-3, 3), st.floats(0, 1e6), st.integers(0, 2**32).map(float), st.booleans()
)
votes = st.lists(one_vote, max_size=4, unique_by=lambda vote: (vote.annotator, vote.decides)).map(tuple)
judged = st.builds(f.Judged, asked, texts, texts, texts, votes)


@settings(max_examples=30, deadline=None)
@given(st.lists(judged, min_size=1, max_size=3))
def test_votes_go_to_other_tools_and_back(items: list[f.Judged]) -> None:
    written = json.loads(json.dumps(f.to_label_studio(items)))
    assert f.from_label_studio(written) == items and f.read_votes(written) == ("label-studio", items)
    written = json.loads(json.dumps(f.to_argilla(items)))
    kept = [replace(one, votes=tuple(f.Vote(*v[:2]) for v in one.votes if not v.decides)) for one in items]
    assert f.from_argilla(written) == kept and f.read_votes(written) == ("argilla", kept)


def test_what_label_studio_writes_is_read() -> None:
    """Judged in the page of label-studio 1.23.2 and exported by it: by the Pairwise tag, by Choices, by both;
    the last was made ground truth, and the first was skipped by another annotation."""
    exports = json.loads((EXPORTS / "label-studio-1.23.2.json").read_text())
    first, second, third = f.from_label_studio(exports["json"])
    assert (first.prompt[0]["content"], first.first, first.second) == (
        "Where is my order?",
        "On its way.",
        "I cannot say.",
    )
    assert (first.category, second.category) == ("support", "")
    assert [one.votes for one in (first, second, third)] == [
        (f.Vote("1", -1, 4.721, 1796100655.967352),),
        (f.Vote("1", 0, 7.179, 1796100664.530678),),
        (f.Vote("1", 2, 7.002, 1796100673.068801, True),),
    ]
    with pytest.raises(RecordError, match="row 0: this is Label Studio's JSON-MIN"):
        f.from_label_studio(exports["json-min"])


def test_what_argilla_writes_is_read() -> None:
    """Written by argilla 2.8.0: records of label, ranking and rating questions by to_list, nested and flattened."""
    exports = json.loads((EXPORTS / "argilla-2.8.0.json").read_text())
    pair = ([{"role": "user", "content": "Where is my order?"}], "On its way.", "I cannot say.", "support")
    chat, unanswered = f.from_argilla(exports["label flat"])
    assert chat == f.Judged(*pair, (f.Vote(ANN, -1),))  # a draft and a discarded response are no votes
    assert [turn["role"] for turn in unanswered.prompt] == ["user", "assistant", "user"] and unanswered.votes == ()
    nested, _ = f.from_argilla(exports["label nested"])  # which does not say that they are
    assert nested.votes == (f.Vote(ANN, -1), f.Vote(BO, 1), f.Vote(CY, 0))
    for form in ("nested", "flat"):
        assert f.from_argilla(exports[f"ranking {form}"]) == [f.Judged(*pair, (f.Vote(ANN, 1), f.Vote(BO, 0)))]
        assert f.from_argilla(exports[f"rating {form}"]) == [f.Judged(*pair, (f.Vote(ANN, -1),))]


plain = st.text("abc \n<&é", min_size=1, max_size=20).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(plain, plain, plain)
def test_labels_go_to_other_tools_and_back(prompt: str, chosen: str, rejected: str) -> None:
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
    row |= {"category": "chat", "provenance": {"responses": [{"checkpoint": c, "seed": None} for c in ("sft", "ppo")]}}
    for name, lost in (("hh", ["category", "provenance"]), ("rewardbench", [])):
        out, back = f.FORMATS[name]
        assert back(json.loads(json.dumps(out([row])))) == [{k: v for k, v in row.items() if k not in lost}]


def test_every_correct_response_of_rewardbench_2_meets_every_other() -> None:
    row = {
        "id": "0",
        "prompt": "q",
        "chosen": ["a", "b"],
        "rejected": ["c", "d", "e"],
        "num_correct": 2,
        "subset": "Ties",
    }
    pairs = [(found["chosen"], found["rejected"]) for found in f.from_rewardbench([row])]
    assert pairs == [(chosen, rejected) for chosen in "ab" for rejected in "cde"]


def test_a_text_that_a_transcript_would_split_is_refused() -> None:
    row = {"prompt": "q", "chosen": "a\n\nHuman: b", "rejected": "c"}
    with pytest.raises(RecordError, match="row 0: a text with a turn of its own"):
        f.to_hh([row])


PAIR = {"prompt": "q", "answer1": "a", "answer2": "b"}


def studio(*results: dict[str, Any], data: Any = PAIR, **more: Any) -> dict[str, Any]:
    return {"data": data, "annotations": [{"id": 5, "completed_by": 7, "result": list(results), **more}]}


def choice(*words: str, name: str = "choice") -> dict[str, Any]:
    return {"type": "choices", "from_name": name, "value": {"choices": list(words)}}


def side(word: str, name: str = "side") -> dict[str, Any]:
    return {"type": "pairwise", "from_name": name, "value": {"selected": word}}


def argilla(answers: dict[str, Any], **fields: str) -> dict[str, Any]:
    given = {question: [{"value": value, "user_id": ANN}] for question, value in answers.items()}
    return {"fields": {"prompt": "q", "response1": "a", "response2": "b", **fields}, "responses": given}


@pytest.mark.parametrize(
    ("row", "preference"),
    [
        (studio(side("left")), -1),
        (studio(side("right"), choice("greeting", name="topic")), 1),
        (studio(choice("Answer 2")), 1),
        (studio(choice("tie"), {"type": "textarea", "from_name": "why", "value": {"text": ["equal"]}}), 0),
        (studio(side("left"), choice("-3", name="preference")), -3),
        (argilla({"preference": "+2"}), 2),
        (argilla({"better": "response-1", "comment": "Clear."}), -1),
        (argilla({"better": ["response2", "response1"]}), 1),
        (argilla({"rate response1": 3, "rate response2": 3}), 0),
    ],
)
def test_an_answer_is_read_as_it_is_meant(row: dict[str, Any], preference: int) -> None:
    (item,) = f.read_votes([row])[1]
    ((said, seconds, at),) = [(vote.preference, vote.seconds, vote.at) for vote in item.votes]
    assert (said, seconds, at) == (preference, 0.0, 0.0)  # no times were given


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "keys 'text' came; expected Label Studio's data and annotations, or Argilla's"),
        ({"chosen": "a", "rejected": "b"}, "it has labels and no votes; the trainers read it"),
        (studio(side("left"), data=[]), "data should be an object"),
        (studio(side("left"), data={**PAIR, "answer1": 1}), "answer1 should be text, got int"),
        (studio(side("left"), data={**PAIR, "answer3": "c"}), "'answer2', 'answer3' came; expected two resp"),
        (studio(side("left"), data={**PAIR, "instruction": "q"}), "2 prompts came; expected one of the keys prompt"),
        (studio(), r"annotation 5 of 7 does not say which is better \(nothing\)"),
        (studio(side("left"), side("right", "honesty")), "says by side and by honesty which is better; name one of"),
        (studio(choice("1")), r"does not say which is better \(choice: '1'\)"),
        (studio(choice("left", "right")), "does not say which is better"),
        (studio(side("left"), choice("maybe", name="preference")), "does not say which is better"),
        (studio(side("left"), completed_by=None), "None came for who judged it"),
        (studio(side("left"), lead_time=-1), "-1 seconds came"),
        (studio(side("left"), created_at="yesterday"), "'yesterday' came for a time"),
        ({**studio(side("left")), "annotations": [*studio(side("left"))["annotations"]] * 2}, "7 has judged it twice"),
        ({"prompt": "q", "annotator": 1, "annotation_id": 2}, "this is Label Studio's JSON-MIN"),
        ({"fields": []}, "fields should be an object"),
        (argilla({"preference": 9}), r"does not say which is better \(preference: 9\)"),
        (argilla({"preference": "response3"}), "does not say which is better"),
        (argilla({"ranking": ["response1", "response1"]}), "does not say which is better"),
        (argilla({"rating": 4}), "or a rating for each"),
        (argilla({"better": "response1", "safer": "tie"}), "says by better and by safer which is better"),
        ({**argilla({})["fields"], "p.responses": ["tie"], "p.responses.users": []}, "as many"),
    ],
)  # fmt: skip
def test_a_record_that_could_be_read_otherwise_is_refused_with_its_line(
    row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=rf"in.jsonl line 2: .*{words}"):
        f.read_votes(file)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("hh", {"chosen": "x", "rejected": "y"}, "Human:"),
        ("rewardbench", {"prompt": "q", "chosen": "a"}, "rejected"),
    ],
)
def test_a_broken_label_is_refused_with_its_line(name: str, row: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=rf"in.jsonl line 2: .*{words}"):
        f.FORMATS[name][1](file)
