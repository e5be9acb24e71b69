"""What a survey finds in a file: counts against those of plain Python, every problem by its line, and no exception."""

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data.fitting import Fitting
from rlhf_fast.data.records import (
    Comparison,
    Demonstration,
    RecordError,
    read_demonstrations,
    read_prompts,
    read_record,
)
from rlhf_fast.data.survey import BINS, survey
from rlhf_fast.data.tokenize import tokenize_record
from rlhf_fast.models.byte_tokenizer import byte_tokenizer

GOOD = [{"prompt": f"question {i}", "completion": "yes " * (i % 7 + 1)} for i in range(40)]
TALK = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "A café?"},
        {"role": "assistant", "content": "Oui, un café."},
    ]
}


def write(path: Path, *lines: Any) -> str:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return str(path)


def test_lengths_are_those_that_training_reads() -> None:
    tokenizer = byte_tokenizer()
    found = survey(GOOD, tokenizer)
    each = [tokenize_record(row, tokenizer)[0] for row in GOOD]
    assert (found.kind, found.rows, found.usable, found.refused) == ("demonstrations", 40, 40, 0)
    for name, expected in {
        "prompt": [one.loss_mask.index(True) for one in each],
        "learned": [one.learned for one in each],
        "whole": [len(one) for one in each],
    }.items():
        lengths, rank = found.lengths[name], sorted(expected)
        assert (lengths.max, lengths.total) == (max(expected), sum(expected))
        # The least length that so many of a hundred rows do not exceed.
        by_rank = [rank[math.ceil(share * 40) - 1] for share in (0.05, 0.5, 0.95)]
        assert [lengths.p5, lengths.p50, lengths.p95] == by_rank
        assert sum(lengths.counts) == 40 and len(lengths.edges) == len(lengths.counts) + 1 <= BINS + 1


def test_a_single_long_row_does_not_flatten_the_histogram() -> None:
    rows = [{"prompt": "q", "completion": "a" * (i % 30 + 1)} for i in range(199)]
    found = survey([*rows, {"prompt": "q", "completion": "a" * 5000}], byte_tokenizer(), max_length=10_000)
    learned = found.lengths["learned"]
    assert learned.max == 5001 and learned.edges[-1] == 32
    assert min(learned.counts) > 0 and sum(learned.counts) == 200


def test_every_problem_is_found_and_named_by_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        GOOD[0],
        b'{"prompt": "cut off", "comple',
        b"",
        b"[1, 2]",
        {"prompt": "", "completion": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        GOOD[1],
        {"text": "?"},
        {"prompt": "p", "completion": "x" * 300},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
        b'\xff{"prompt": "p"}',
    )
    found = survey(file, byte_tokenizer(), max_length=100)
    assert (found.kind, found.rows, found.usable, found.refused) == ("demonstrations", 10, 2, 8)
    said = {one.line: one.what for one in found.problems}
    assert list(said) == [2, 4, 5, 6, 8, 9, 10, 11] and found.more_problems == 0
    for line, word in {
        2: "JSON", 4: "list", 5: "prompt is empty", 6: "one of the comparisons, where most rows are demonstrations",
        8: "'text'", 9: "304 tokens, more than max_length = 100", 10: "image", 11: "UTF-8",
    }.items():  # fmt: skip
        assert word in said[line] and file not in said[line], said[line]
    # Training stops at the first of them, by the same words.
    with pytest.raises(RecordError) as caught:
        read_demonstrations(file)
    assert str(caught.value) == f"{file} line 2: {said[2]}"


def test_problems_beyond_those_that_are_kept_are_counted() -> None:
    rows = [*({"prompt": ""} for _ in range(50)), *GOOD]
    found = survey(rows, byte_tokenizer(), kept=3)
    assert [one.line for one in found.problems] == [0, 1, 2]
    assert (found.refused, found.more_problems, found.usable) == (50, 47, 40)


def test_duplicates_are_counted_by_rows_prompts_and_sides() -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"rejected": "b", "chosen": "a", "prompt": "p"},  # the same
        {"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": "c"},  # the same tokens
        {"prompt": "q", "chosen": "a", "rejected": "b", "split": "test"},
    ]
    found = survey(rows, byte_tokenizer())
    assert (found.duplicate_rows, found.duplicate_prompts, found.identical_sides) == (1, 2, 1)
    assert found.splits == {"": 3, "test": 1}


LONG: dict[str, list[dict[str, Any]]] = {
    "demonstrations": [
        {"prompt": "p" * 10, "completion": "c" * 7},  # 20 tokens with three that are special
        {"prompt": "p" * 10, "completion": "c" * 8},
        {"prompt": "p" * 30, "completion": "c"},  # whose prompt is cut
        {"prompt": "p", "completion": "c"},
        {
            "prompt": [{"role": "system", "content": "s" * 30}, TALK["messages"][0]],
            "completion": "c",
        },  # nothing is left
    ],
    "comparisons": [
        {"prompt": "p", "chosen": "a" * 30, "rejected": "b"},
        {"prompt": "p" * 40, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a" * 30, "rejected": "a" * 31},  # cut, they are the same
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"prompt": "p", "chosen": "c" * 40, "rejected": "c" * 40},  # both
    ],
    "prompts": [{"prompt": "p" * size} for size in (10, 11, 40)],
}


def kept(kind: str, overlong: Any) -> list[int]:
    """How many tokens the trainers' own fitting keeps of each row that it keeps."""
    fitting = Fitting(byte_tokenizer(), 20, overlong)
    found = []
    for row in map(read_record, LONG[kind]):
        if isinstance(row, Demonstration):
            found.append(sum(map(len, fitting.demonstration(row))))
        elif isinstance(row, Comparison):
            both = fitting.comparison(row)
            found.append(sum(map(len, both[1])) if both else 0)
        else:
            found += [len(tokenize_record(one, byte_tokenizer())[0]) for one in fitting.prompts([row], 8)]
    return [count for count in found if count]


@pytest.mark.parametrize("kind", LONG)
def test_longer_rows_are_refused_cut_or_dropped_as_trainers_do_it(kind: str) -> None:
    rows = LONG[kind]
    found = {
        overlong: survey(rows, byte_tokenizer(), max_length=20, max_new_tokens=8, overlong=overlong)  # type: ignore[arg-type]
        for overlong in ("error", "truncate", "drop")
    }
    sizes = [sum(map(len, tokenize_record(row, byte_tokenizer()))) for row in rows]
    for overlong in ("truncate", "drop"):
        assert found[overlong].usable == len(kept(kind, overlong)) and found[overlong].refused == 0
    same = found["error"].identical_sides
    assert found["error"].refused == found["error"].longer == len(rows) - len(kept(kind, "drop")) - same
    gone = sum(sizes) - sum(kept(kind, "truncate")) - (10 if same else 0)  # the row of two that are the same, uncut
    assert found["error"].beyond == gone


def test_prompts_leave_room_for_an_answer_and_one_just_fits() -> None:
    rows = [{"prompt": "p" * size} for size in (10, 11)]
    exactly = [len(tokenize_record(row, byte_tokenizer())[0]) for row in read_prompts(rows)]
    assert [survey(rows, byte_tokenizer(), max_length=length).longer for length in (exactly[1], exactly[0])] == [0, 1]
    found = survey(rows, byte_tokenizer(), max_length=20, max_new_tokens=8)
    assert found.kind == "prompts"
    assert [(one.line, one.what) for one in found.problems] == [
        (1, "21 tokens, 8 of them for an answer, more than max_length = 20")
    ]


def test_what_the_model_has_no_place_for_is_refused() -> None:
    found = survey(GOOD, byte_tokenizer(), context=30)
    assert found.limit == 30 and found.refused == found.longer
    assert found.longer == sum(len(tokenize_record(row, byte_tokenizer())[0]) > 30 for row in GOOD) > 0
    assert found.problems[0].what.endswith("tokens, more than the model's 30 positions")
    found = survey(GOOD, byte_tokenizer(), vocabulary=100)
    assert found.usable == 0 and "beyond the model's 100 embeddings" in found.problems[0].what


def test_examples_show_the_tokens_that_are_learned_and_where_turns_end() -> None:
    found = survey([*GOOD[:3], TALK], byte_tokenizer(), lines=(3,))
    (example,) = found.examples
    assert example.line == 3
    (pieces,) = example.conversations.values()
    assert [(one.text, one.learned, one.special) for one in pieces] == [
        ("<user>", False, True),
        ("Hi", False, False),
        ("<assistant>", False, True),
        ("Hello", True, False),
        ("<eos>", True, True),
        ("<user>", False, True),
        ("A café?", False, False),
        ("<assistant>", False, True),
        ("Oui, un café.", True, False),
        ("<eos>", True, True),
    ]
    assert found.not_shown == []
    assert survey([TALK, {"text": 1}], byte_tokenizer(), lines=(0, 1, 7)).not_shown == [1, 7]
    (last,) = survey([TALK], byte_tokenizer(), turns="last").examples
    assert [one.text for one in last.conversations[""] if one.learned] == ["Oui, un café.", "<eos>"]
    compared = survey([{"prompt": "p", "chosen": "a", "rejected": "b"}], byte_tokenizer()).examples[0]
    assert list(compared.conversations) == ["chosen", "rejected"]


def test_special_tokens_that_somebody_typed_are_counted_and_stay_text() -> None:
    found = survey([{"prompt": "say <eos> twice", "completion": "no"}, GOOD[0]], byte_tokenizer())
    assert found.spelled_out == 1
    prompt = found.examples[0].conversations[""][1]
    assert prompt.text == "say <eos> twice" and not prompt.special


def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    noise = random.Random(0)
    rows = [{"prompt": f"{i} {noise.random()}", "completion": str(noise.random())} for i in range(2000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(whole[: len(whole) // 2])
    found = survey(str(file), byte_tokenizer())
    assert 0 < found.usable < 2000 and found.refused == 1
    assert found.problems[0].line == found.rows and "cut off" in found.problems[0].what


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    for path, word in ((tmp_path / "none.jsonl", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(RecordError, match=word):
            survey(str(path), byte_tokenizer())
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(RecordError, match=r"empty\.jsonl: no rows; expected at least one"):
        survey(str(tmp_path / "empty.jsonl"), byte_tokenizer())
    with pytest.raises(RecordError, match="the data: no rows"):
        survey([], byte_tokenizer())


def test_progress_is_told_of_every_row(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    survey(write(tmp_path / "rows.jsonl", *GOOD), byte_tokenizer(), progress=lambda *both: told.append(both))
    assert told == [(i, 40) for i in range(1, 41)]


ATOMS: list[Any] = [
    None, True, 0, -1, 1e308, math.nan, 10**30, "", " ", "a", "\x1b[2J", "\u202e", "\ud800", "<eos>", "{}", "[1]",
    "\n\nHuman: a\n\nAssistant: b",
]  # fmt: skip
KEYS = (
    "prompt completion messages chosen rejected tools chat_template_kwargs margin confidence split category ratings "
    "role content weight tool_calls reasoning_content name annotator"
).split()


def anything(draw: random.Random, depth: int = 0) -> Any:
    if draw.random() < 0.55 or depth > 3:
        return draw.choice(ATOMS)
    if draw.random() < 0.5:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(3))]
    return {draw.choice(KEYS): anything(draw, depth + 1) for _ in range(draw.randrange(4))}


def a_message(draw: random.Random) -> dict[str, Any]:
    content = draw.choice([*ATOMS, *["hi"] * 20])
    more = {draw.choice(KEYS): anything(draw)} if draw.random() < 0.3 else {}
    return {"role": draw.choice(["user", "assistant", "system", "tool", "?"]), "content": content, **more}


def test_no_row_whatever_is_in_it_ends_a_survey() -> None:
    draw, rows = random.Random(0), []
    for _ in range(1500):
        messages = [a_message(draw) for _ in range(draw.randrange(1, 5))]
        compared = {"prompt": "p", "chosen": "a", "rejected": "b"}
        row = draw.choice([{"prompt": "p", "completion": "c"}, {"messages": messages}, compared])
        rows.append({**row, **{draw.choice(KEYS): anything(draw) for _ in range(draw.randrange(3))}})
    found = survey(rows, byte_tokenizer(), kept=10_000)
    assert found.rows == 1500 and found.usable > 300 and len(found.problems) == found.refused > 300
