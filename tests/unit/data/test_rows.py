"""Files as people have them: marks, arrays and other compressions are taken, files of another kind named as what they
are, and one that is cut off as that."""

import contextlib
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data.records import RecordError, read_comparisons, read_demonstrations, read_prompts

Reader = Callable[[Any], list[Any]]
ROW = {"prompt": "één", "completion": "c", "chosen": "c", "rejected": "r"}
LINE = json.dumps(ROW, ensure_ascii=False).encode()
BOM = b"\xef\xbb\xbf"


def refused(file: Path, raw: bytes, reader: Reader = read_prompts) -> str:
    """What is said of a file of these bytes, behind its name."""
    file.write_bytes(raw)
    with pytest.raises(RecordError) as caught:
        reader(file)
    assert str(caught.value).startswith(str(file))
    return str(caught.value).removeprefix(str(file))


@pytest.mark.parametrize("reader", [read_prompts, read_demonstrations, read_comparisons])
@pytest.mark.parametrize(
    ("name", "raw", "places"),
    [
        ("mark.jsonl", BOM + LINE + b"\n", ["line 1"]),
        ("mark.jsonl.gz", gzip.compress(BOM + LINE + b"\n" + LINE, mtime=0), ["line 1", "line 2"]),
        ("joined.jsonl", LINE + b"\n" + BOM + LINE + b"\n" + BOM, ["line 1", "line 2"]),
        ("named_otherwise.jsonl", gzip.compress(LINE, mtime=0), ["line 1"]),
        ("windows.jsonl", LINE + b"\r\n" + LINE + b"\r\n", ["line 1", "line 2"]),
        ("array.json", b" [" + LINE + b",\n\n" + LINE + b"]\n", ["entry 1", "entry 2"]),
        ("array.jsonl", BOM + b"[\n" + LINE + b"\n]", ["entry 1"]),
    ],
)
def test_files_as_other_programs_write_them_are_read(
    tmp_path: Path, reader: Reader, name: str, raw: bytes, places: list[str]
) -> None:
    (tmp_path / name).write_bytes(raw)
    read = reader(tmp_path / name)
    assert [record.prompt for record in read] == ["één"] * len(places)
    assert [record.name for record in read] == [f"{tmp_path / name} {place}" for place in places]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", b"prompt,completion\nhi,there\n", ": this looks like CSV (it begins 'prompt,completion'); expected"),
        ("a.jsonl", b'"prompt",completion\nhi,there\n', ": this looks like CSV"),
        ("one.csv", b"prompt\nhi\n", ": this looks like CSV"),
        ("a.tsv", b"prompt\tcompletion\nhi\tthere\n", ": this looks like TSV (it begins 'prompt"),
        ("a.jsonl", b"prompt\tcompletion\nhi\tthere\n", ": this looks like TSV"),
        (
            "a.parquet",
            b"PAR1\x15\x04",
            ": this is a Parquet file; expected JSON Lines, one object {...} a line: pandas",
        ),
        ("a.arrow", b"ARROW1\x00\x00", ": this is an Arrow file"),
        ("a.jsonl", b"PK\x03\x04abc", ": this is a zip archive or an Excel file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdabc", ": this is compressed by zstd"),
        ("a.yaml", b"- prompt: hi\n  completion: there\n", ": this looks like YAML (it begins '- prompt: hi')"),
        ("a.jsonl", b"---\nprompt: hi\n", ": this looks like YAML"),
        ("a.jsonl", LINE.decode().encode("utf-16"), ": this is UTF-16; expected UTF-8: iconv"),
        ("a.jsonl", LINE.decode().encode("utf-16-le"), ": this is UTF-16"),
        ("a.jsonl", ("   " + LINE.decode()).encode("utf-16-be"), ": this is UTF-16"),
        ("a.jsonl", ("   " + LINE.decode()).encode("utf-16-le"), ": this is UTF-16"),
        ("a.json", b'{\n  "data": []\n}\n', ": this looks like one JSON object over several lines"),
        ("a.json", b'[{"prompt": "p"}, 3]', " entry 2: expected an object {...}, got int"),
        ("a.json", b"[]", ": no rows; expected at least one"),
        (
            "a.json",
            b'[{"prompt": "p"}\n {"prompt": "q"}]',
            ": a JSON array that is not JSON: Expecting ',' delimiter at",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    assert refused(tmp_path / name, raw).startswith(message)


@pytest.mark.parametrize("cut", [1, 5, 13, len(LINE) - 2])  # 13: within a letter of two bytes
def test_a_last_line_that_is_cut_off_is_named_as_that(tmp_path: Path, cut: int) -> None:
    said = refused(tmp_path / "a.jsonl", LINE + b"\n" + LINE[:cut])
    assert said.startswith(" line 2: the line ends in the middle of a row: the file seems to have been cut off; get")
    assert "cut off" not in refused(tmp_path / "a.jsonl", LINE + b"\n" + LINE[:cut] + b"\n" + LINE)  # not the last
    said = refused(tmp_path / "a.json", b"[" + LINE + b",\n" + LINE[:5])
    assert said.endswith("the file seems to have been cut off")


def test_a_row_that_is_cut_off_anywhere_is_named_as_that(tmp_path: Path) -> None:
    row = b'{"prompt": "a\\u00e9\\"b", "deep": {"x": [true, null, -1.5e3]}, "completion": "\xc3\xa9"}'
    for cut in range(1, len(row)):
        said = refused(tmp_path / "a.jsonl", LINE + b"\n" + row[:cut])
        assert said.startswith(" line 2: the line ends in the middle of a row: the file seems to have been cut off"), (
            cut
        )


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_gzip_file_that_is_cut_off_is_named_as_that(tmp_path: Path, share: float) -> None:
    lines = [b'{"prompt": "%x"}\n' % hash((i, "salt")) for i in range(3000)]
    packed = gzip.compress(b"".join(lines))
    cut, whole = packed[: int(share * len(packed))], 0
    with contextlib.suppress(EOFError), gzip.open(io.BytesIO(cut)) as file:
        for _ in file:
            whole += 1
    assert whole > 100
    assert refused(tmp_path / "a.jsonl.gz", cut).startswith(f" line {whole + 1}: the file seems to have been cut off")
    packed = gzip.compress(b"prompt,completion\n" + b"".join(lines))  # and no JSON either
    assert "not JSON" in refused(tmp_path / "a.jsonl.gz", packed[: int(share * len(packed))])


def test_a_dataset_of_several_parts_is_named() -> None:
    with pytest.raises(RecordError, match=r"expected a list of rows, got dict of \['train', 'test'\]; give one of its"):
        read_prompts({"train": [ROW], "test": []})
