"""Records: every shape that is read, and every malformed row named by its file, its line and what is wrong."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.records import (
    Columns,
    Comparison,
    Demonstration,
    PromptRecord,
    RecordError,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)

Reader = Callable[[Any], list[Any]]
READERS: list[Reader] = [read_prompts, read_demonstrations, read_comparisons]
HH_RLHF = Path(__file__).resolve().parents[4] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"

USER = {"role": "user", "content": "question"}
ANSWER = {"role": "assistant", "content": "answer"}
OTHER = {"role": "assistant", "content": "other"}


def write(file: Path, *lines: Any) -> Path:
    """A file of lines: bytes as they are, all else as JSON."""
    raw = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return file


def comparison(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": "c", "rejected": "r", **changes}


# Shapes --------------------------------------------------------------------------------------------------------------


def test_prompts_are_text_or_messages_with_an_optional_category() -> None:
    rows = [{"prompt": "p"}, {"prompt": [USER], "category": "simple", "other": 1}, {"prompt": "q", "category": None}]
    assert read_prompts(rows) == [
        PromptRecord("p", "", "row 0"),
        PromptRecord([USER], "simple", "row 1", Columns(category="simple", other=1)),
        PromptRecord("q", "", "row 2", Columns(category=None)),
    ]


def test_the_further_columns_of_a_prompt_are_kept_and_say_the_same_in_whatever_order_they_came() -> None:
    row = {"prompt": "p", "b": [1, {"deep": None}], "a": "x", 3: "no name"}
    (one,), (other,) = read_prompts([row]), read_prompts([dict(reversed(row.items()))])
    assert one.columns == {"a": "x", "b": [1, {"deep": None}]}
    assert repr(one) == repr(other) and "deep" in repr(one) and hash(one) == hash(other)
    assert repr(read_prompts([{**row, "a": "y"}])[0]) != repr(one)


def test_a_prompts_columns_are_described_without_addresses() -> None:
    first, second = (read_prompts([{"prompt": "p", "image": object()}])[0] for _ in range(2))
    assert repr(first) == repr(second) and "<object object>" in repr(first)


def test_prompts_of_one_split_are_picked_and_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "a", "split": "train"}, {"prompt": "b", "split": "eval"})
    assert [record.prompt for record in read_prompts(file, "eval")] == ["b"]
    with pytest.raises(RecordError, match=r"p\.jsonl: no rows whose split is 'evel'"):
        read_prompts(file, "evel")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "question", "completion": "answer"}, "question"),
        ({"prompt": [USER], "completion": "answer"}, [USER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER]),
        ({"messages": [USER, ANSWER]}, [USER]),
        ({"messages": [{**USER, "name": "extra"}, USER, ANSWER]}, [{**USER, "name": "extra"}, USER]),
        ({"messages": [OTHER, USER, ANSWER]}, [OTHER, USER]),  # what is said first answers nothing
    ],
)
def test_demonstrations_are_pairs_of_texts_or_conversations(row: dict[str, Any], prompt: Any) -> None:
    assert read_demonstrations([row]) == [Demonstration(prompt, "answer", "row 0")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, OTHER, {**USER, "name": None}, ANSWER]},
        {"prompt": [USER], "completion": [OTHER, USER, ANSWER]},
    ],
)
def test_the_turns_from_the_first_answer_on_are_the_completion(row: dict[str, Any]) -> None:
    assert read_demonstrations([row]) == [Demonstration([USER], [OTHER, USER, ANSWER], "row 0")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "question", "chosen": "answer", "rejected": "other"}, "question"),
        ({"prompt": [USER], "chosen": "answer", "rejected": "other"}, [USER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, [USER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        (
            {
                "chosen": "\n\nHuman: question\n\nAssistant: answer",
                "rejected": "\n\nHuman: question\n\nAssistant: other",
            },
            [USER],
        ),
        (
            {
                "chosen": "\n\nHuman: question\n\nAssistant: x\n\nHuman: question\n\nAssistant: answer",
                "rejected": "\n\nHuman: question\n\nAssistant: x\n\nHuman: question\n\nAssistant: other",
            },
            [USER, {"role": "assistant", "content": "x"}, USER],
        ),
    ],
)
def test_comparisons_are_texts_messages_or_whole_conversations(row: dict[str, Any], prompt: Any) -> None:
    assert read_comparisons([row]) == [Comparison(prompt, "answer", "other", name="row 0")]


def test_comparisons_carry_margin_annotator_category_and_ratings() -> None:
    extras = {"annotator": "eva", "category": "simple", "ratings": {"chosen": {"style": 0.5}}}
    (read,) = read_comparisons([comparison(margin=2, **extras)])
    assert read == Comparison("p", "c", "r", margin=2.0, name="row 0", **extras)  # type: ignore[arg-type]
    assert isinstance(read.margin, float)
    (plain,) = read_comparisons([comparison(annotator=3, ratings=None)])
    assert (plain.annotator, plain.ratings, plain.margin) == ("3", {}, 0.0)


def test_comparisons_carry_confidence_and_split() -> None:
    (read,) = read_comparisons([comparison(confidence=0.75, split="test")])
    assert (read.confidence, read.split) == (0.75, "test")
    (plain,) = read_comparisons([comparison(confidence=None)])
    assert (plain.confidence, plain.split) == (1.0, "")


def test_comparisons_carry_the_votes_of_their_provenance() -> None:
    votes = [{"annotator": "a", "preference": 2, "kind": "normal"}, {"annotator": "b", "preference": -1}]
    votes += [{"annotator": "c", "preference": -3, "kind": "adjudication"}]
    (read,) = read_comparisons([comparison(provenance={"votes": votes})])
    assert read.votes == (("a", 2.0), ("b", -1.0))
    for other in ("a web page", {"source": "x"}, {"votes": 3}, None):  # columns of others
        assert read_comparisons([comparison(provenance=other)])[0].votes == ()
    with pytest.raises(RecordError, match="row 0: a vote of its provenance needs an annotator and a preference"):
        read_comparisons([comparison(provenance={"votes": [{"annotator": 3, "preference": 1}]})])


@pytest.mark.parametrize("confidence", [0.4, 1.01, 5, "0.7", True, math.nan])
def test_a_confidence_on_another_scale_is_named(confidence: Any) -> None:
    with pytest.raises(RecordError, match=r"row 0: confidence should be the probability .* map another scale"):
        read_comparisons([comparison(confidence=confidence)])


def test_an_empty_answer_in_a_transcript_is_read_since_people_compared_it() -> None:
    row = {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: a"}
    (read,) = read_comparisons([row])
    assert (read.chosen, read.rejected) == ("", "a")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_paths_strings_and_lists_read_alike(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "één"}, {"prompt": "two\u2028lines\x85"}]
    file = write(tmp_path / name, *(json.dumps(row, ensure_ascii=False).encode() for row in rows))
    for source in (file, str(file)):
        read = read_prompts(source)
        assert [record.prompt for record in read] == [row["prompt"] for row in rows]
        assert [record.name for record in read] == [f"{file} line 1", f"{file} line 2"]
    assert [record.prompt for record in read_prompts(row for row in rows)] == [row["prompt"] for row in rows]


def test_blank_lines_are_skipped_and_line_numbers_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", b"", {"prompt": "a"}, b"  \t\r", {"prompt": "b"}, b"", b"nonsense")
    with pytest.raises(RecordError, match=r"rows\.jsonl line 6: not JSON"):
        read_prompts(file)
    write(file, b"", {"prompt": "a"}, b"  \t\r", {"prompt": "b"})
    assert [record.name for record in read_prompts(file)] == [f"{file} line 2", f"{file} line 4"]


@pytest.mark.skipif(not HH_RLHF.exists(), reason="the HH-RLHF sample is not here")
def test_hh_rlhf_reads_completely() -> None:
    read = read_comparisons(HH_RLHF)
    assert len(read) == 2312
    assert all(isinstance(c.prompt, list) and c.prompt[-1]["role"] == "user" for c in read)
    assert all(c.chosen != c.rejected for c in read)
    assert sum(not (c.chosen and c.rejected) for c in read) == 4  # empty answers that people compared


# Malformed files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b'{"prompt": "p"} trailing', "not JSON: Extra data"),
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
        (b'{"prompt": "p", "margin": ' + b"1" * 5000 + b"}", "not readable as JSON: Exceeds the limit"),
        (b"[" * 100_000, "not readable as JSON: maximum recursion depth"),
        (b"[1]", "expected an object {...}, got list"),
        (b'"prompt"', "expected an object {...}, got str"),
        (b"null", "expected an object {...}, got NoneType"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, reader: Reader, line: bytes, message: str) -> None:
    good = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"}
    file = write(tmp_path / "rows.jsonl", good, b"", line, good)
    with pytest.raises(RecordError) as caught:
        reader(file)
    assert str(caught.value).startswith(f"{file} line 3: {message}")


@pytest.mark.parametrize("reader", READERS)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, reader: Reader) -> None:
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % number for number in range(5000)))
    bad = {
        "truncated.jsonl.gz": (
            whole[: len(whole) // 2],
            r" line \d+: the file seems to have been cut off: Compressed file",
        ),
        "plain.jsonl.gz": (b'{"prompt": "p"}\n', " line 1: not readable as gzip: Not a gzipped file"),
        "broken.jsonl.gz": (whole[:20] + b"\x00" * 50 + whole[70:], r" line \d+: not readable as gzip: "),
        "empty.jsonl": (b"", ": no rows; expected at least one"),
        "blank.jsonl": (b"\n \n", ": no rows; expected at least one"),
        "empty.jsonl.gz": (gzip.compress(b""), ": no rows; expected at least one"),
    }
    for name, (raw, message) in bad.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(RecordError, match=f"^{tmp_path / name}{message}"):
            reader(tmp_path / name)
    with pytest.raises(RecordError, match=f"^{tmp_path / 'none.jsonl'}: cannot be read: No such file"):
        reader(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match=f"^{tmp_path}: cannot be read: Is a directory"):
        reader(tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_lists_without_rows_or_with_something_else_are_named(reader: Reader) -> None:
    with pytest.raises(RecordError, match="the list: no rows; expected at least one"):
        reader([])
    with pytest.raises(RecordError, match="row 0: expected a dict, got int"):
        reader([3])


# Malformed rows ------------------------------------------------------------------------------------------------------

BAD_PROMPTS = [
    ({}, "'prompt' is missing; the row has nothing"),
    ({"text": "p", "id": 1}, "'prompt' is missing; the row has 'text', 'id'"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n\t"}, "prompt is empty"),
    ({"prompt": 3}, "prompt should be text, got int"),
    ({"prompt": None, "id": 1}, "'prompt' is missing; the row has 'id'"),
    ({"prompt": []}, "prompt should be a list of messages"),
    ({"prompt": ["p"]}, "a message of prompt should be"),
    ({"prompt": [{"content": "p"}]}, "a message of prompt should be"),
    ({"prompt": [{"role": "user"}]}, "the content of a message of prompt should be text, got NoneType"),
    ({"prompt": [{"role": "user", "content": " "}]}, "the content of a message of prompt is empty"),
    ({"prompt": [{"role": "user", "content": [{"content": "p"}]}]}, "the content of a message of prompt has a part of"),
    ({"prompt": "half \ud83d"}, r"prompt holds half a character ('\ud83d')"),
    ({"prompt": [{"role": "\ud83d", "content": "p"}]}, "the role of a message of prompt holds half a character"),
    ({"prompt": "p", "category": ["simple"]}, "category should be text, got list"),
    ({"prompt": "p", "category": True}, "category should be text, got bool"),
]
BAD_DEMONSTRATIONS = [
    ({"prompt": "p"}, "'completion' is missing; the row has 'prompt'"),
    ({"prompt": "", "completion": "c"}, "prompt is empty"),
    ({"prompt": "p", "completion": ""}, "completion is empty"),
    ({"prompt": "p", "completion": "\n"}, "completion is empty"),
    ({"prompt": "p", "completion": 1}, "completion should be text, got int"),
    ({"prompt": "p", "completion": [USER, ANSWER]}, "completion should be text, or messages that begin and end with"),
    ({"prompt": "p", "completion": [ANSWER, USER]}, "completion should be text, or messages that begin and end with"),
    ({"prompt": "p", "completion": []}, "completion should be a list of messages"),
    ({"messages": "text"}, "messages should be a list of messages, got str"),
    ({"messages": []}, "messages should be a list of messages"),
    ({"messages": [ANSWER]}, "messages should end with an assistant's answer to something"),
    ({"messages": [USER]}, "messages should end with an assistant's answer"),
    ({"messages": [USER, ANSWER, USER]}, "messages should end with an assistant's answer"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the content of a message of messages is empty"),
]
BAD_COMPARISONS = [
    ({"prompt": "p", "rejected": "r"}, "'chosen' is missing; the row has 'prompt', 'rejected'"),
    (comparison(prompt=""), "prompt is empty"),
    (comparison(chosen=""), "chosen is empty"),
    (comparison(rejected="  "), "rejected is empty"),
    (comparison(chosen=None), "'chosen' is missing; the row has 'prompt', 'rejected'"),
    (comparison(rejected={"role": "assistant"}), "the content of a message of rejected should be text, got NoneType"),
    (comparison(chosen=[]), "chosen should be a list of messages"),
    (comparison(chosen=[USER]), "chosen is a whole conversation and the other is not; expected two"),
    (comparison(chosen=[ANSWER, USER]), "chosen should be text, or messages that begin and end with the assistant's"),
    (comparison(margin="big"), "margin should be a number, got 'big'"),
    (comparison(margin=True), "margin should be a number, got True"),
    (comparison(margin=float("nan")), "margin should be a number, got nan"),
    (comparison(margin=float("inf")), "margin should be a number, got inf"),
    (comparison(margin=10**400), "margin should be a number, got 1000"),
    (comparison(annotator=[1]), "annotator should be text, got list"),
    (comparison(category=1.5), "category should be text, got float"),
    (comparison(ratings=[1]), "ratings should be an object {...}, got list"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "'rejected' is missing; the row has 'chosen'"),
    ({"chosen": "a", "rejected": "b"}, 'there is no "prompt", so chosen should be messages or begin "\\n\\nHuman:"'),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
        "chosen and rejected do not share a beginning that ends with the human's turn",
    ),
    (
        {"chosen": "\n\nHuman: \n\nAssistant: x", "rejected": "\n\nHuman: \n\nAssistant: y"},
        "the content of a message of the prompt is empty",
    ),
    ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "chosen and rejected do not share a beginning"),
    ({"chosen": [USER], "rejected": [USER]}, "chosen and rejected do not share a beginning"),
    (
        {"chosen": "\n\nHuman: \udc00\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"},
        "chosen holds half a character",
    ),
]
BAD_ROWS = [
    *((read_prompts, *case) for case in BAD_PROMPTS),
    *((read_demonstrations, *case) for case in BAD_DEMONSTRATIONS),
    *((read_comparisons, *case) for case in BAD_COMPARISONS),
]


@pytest.mark.parametrize(
    ("reader", "row", "message"), BAD_ROWS, ids=lambda value: getattr(value, "__name__", str(value))[:40]
)
def test_a_malformed_row_is_named_with_what_is_wrong(
    tmp_path: Path, reader: Reader, row: dict[str, Any], message: str
) -> None:
    good = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"}
    with pytest.raises(RecordError) as in_a_list:
        reader([good, row])
    assert str(in_a_list.value).startswith(f"row 1: {message}")
    if max(len(str(value)) for value in (row or {"": ""}).values()) < 300:  # JSON readers refuse longer numbers
        file = write(tmp_path / "rows.jsonl", good, row)
        with pytest.raises(RecordError) as in_a_file:
            reader(file)
        assert str(in_a_file.value).startswith(f"{file} line 2: {message}")


# Properties ----------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    "prompt completion chosen rejected messages margin annotator category ratings role content split".split()
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["user", "assistant", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "\n\nHuman:", "\ud800"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
MESSAGE_LISTS = st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS | VALUES}), max_size=4)
ROWS = st.dictionaries(KEYS, VALUES | TEXTS | MESSAGE_LISTS, max_size=6)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROWS | VALUES, min_size=1, max_size=2))
@pytest.mark.seconds(3)
def test_any_json_is_read_or_refused_as_a_record_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "any.jsonl", *rows)
    for reader in READERS:
        for source in (file, rows):
            try:
                records = reader(source)
            except RecordError as error:
                assert str(error).startswith((str(file), "row "))
            else:
                assert len(records) == len(rows) or (source is file and isinstance(rows[0], list))  # an array
                for record in records:  # what was read can be written
                    json.dumps(record.prompt, ensure_ascii=False).encode()


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=60), packed=st.booleans())
def test_any_bytes_are_read_or_refused_as_a_record_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, packed: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / ("any.jsonl.gz" if packed else "any.jsonl")
    file.write_bytes(raw)
    with pytest.raises(RecordError) as caught:  # sixty random bytes hold no prompt
        read_prompts(file)
    assert str(caught.value).startswith(str(file))


said = st.text(min_size=1, max_size=20).filter(str.strip)
messages = st.lists(st.fixed_dictionaries({"role": said, "content": said}), min_size=1, max_size=3)
comparisons = st.builds(
    Comparison,
    prompt=said | messages,
    chosen=said,
    rejected=said,
    margin=st.floats(-100, 100),
    annotator=st.text(max_size=5),
    category=st.text(max_size=5),
    confidence=st.floats(0.5, 1),
    split=st.text(max_size=5),
    ratings=st.dictionaries(st.sampled_from(["chosen", "rejected"]), st.dictionaries(said, st.floats(0, 1))),
    name=st.just("row 0"),
)


@settings(max_examples=100, deadline=None)
@given(comparisons)
def test_a_comparison_comes_back_from_its_row(written: Comparison) -> None:
    row = json.loads(json.dumps(written.as_dict()))
    assert read_comparisons([row]) == [written]


def test_a_row_leaves_out_what_says_nothing() -> None:
    assert Comparison("p", "c", "r", name="row 0").as_dict() == {"prompt": "p", "chosen": "c", "rejected": "r"}
