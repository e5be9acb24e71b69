"""Rows of a data file or a list, each with the place where it stands; a file of another kind is named as what it is."""

from __future__ import annotations

import gzip
import json
import os
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, BinaryIO, cast

Row = dict[str, Any]
Source = str | Path | Iterable[Row]

HEAD = 4096  # bytes of a file by which its kind is told
_BLANK = b"\xef\xbb\xbf \t\r\n"  # bytes of a line that holds nothing
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LINES = "expected JSON Lines, one object {...} a line"
_MAGIC = {  # what files begin with that are no text, and what to do with them
    b"PAR1": ("a Parquet file", 'pandas.read_parquet(...).to_json("data.jsonl", orient="records", lines=True)'),
    b"ARROW1": ("an Arrow file", 'datasets.Dataset.from_file(...).to_json("data.jsonl")'),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save it as JSON Lines"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd"),
    b"BZh": ("compressed by bzip2", "bunzip2"),
    b"\xfd7zXZ": ("compressed by xz", "unxz"),
}


class RecordError(ValueError):
    """A row that cannot be used; the message names the file, the line and what is wrong."""


def rows_of(source: Any) -> list[tuple[str, Row]]:
    """Read all rows as (name, row); the name says where the row is: "data.jsonl line 3"."""
    rows = []
    for _, name, row in scan_rows(source):
        if isinstance(row, RecordError):
            raise row
        rows.append((name, row))
    return rows


def scan_rows(source: Any) -> Iterator[tuple[int, str, Row | RecordError]]:
    """Yield (number, name, row) of every row; in place of a row that cannot be read, its RecordError.

    Raises:
        RecordError: the file cannot be read at all, or is of another kind.
    """
    if isinstance(source, str | os.PathLike):
        yield from _file_rows(Path(source))
        return
    if isinstance(source, Mapping):  # a DatasetDict is one, too
        raise RecordError(
            f"the data: expected a list of rows, got {type(source).__name__} of {reprlib.repr(list(source))}; give one "
            "of its parts, or a row in a list"
        )
    for number, row in enumerate(source):
        name = f"row {number}"
        yield number, name, _object(row, name)


def count_rows(source: Any) -> int:
    """Count the rows, without reading what is in them; 0 if that cannot be said."""
    if isinstance(source, str | os.PathLike):
        try:
            with _open(Path(source)) as file:
                if _is_array(file.peek(HEAD)):  # type: ignore[attr-defined]
                    return 0
                return sum(1 for line in file if line.strip(_BLANK))
        except (OSError, EOFError, zlib.error):
            return 0
    return len(source) if isinstance(source, Sized) else 0


def _file_rows(path: Path) -> Iterator[tuple[int, str, Row | RecordError]]:
    number, count = 0, 0
    try:
        with _open(path) as file:
            head = file.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
            _refuse_other_kinds(path, head)
            if _is_array(head):
                yield from _array_rows(path, file.read())
                return
            for number, line in enumerate(file, start=1):
                if not line.strip(_BLANK):
                    continue
                row = _row(line, f"{path} line {number}")
                if not count and isinstance(row, RecordError):
                    _explain(path, row)
                count += 1
                yield number, f"{path} line {number}", row
    except EOFError as error:
        name = f"{path} line {number + 1}"
        yield number + 1, name, RecordError(f"{name}: the file seems to have been cut off: {error}; get it again")
    except (gzip.BadGzipFile, zlib.error) as error:
        name = f"{path} line {number + 1}"
        yield (
            number + 1,
            name,
            RecordError(f"{name}: not readable as gzip: {error}; get it again, or take .gz from its name"),
        )
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"
    return cast(BinaryIO, gzip.open(path) if packed else open(path, "rb"))


def _row(line: bytes, name: str) -> Row | RecordError:
    """A row, or what is wrong with it."""
    whole = line.endswith(b"\n")  # only a file's last line may not be
    try:
        text = line.decode("utf-8-sig")  # a mark at its start is no part of it, in files that were joined too
        return _object(json.loads(text), name)
    except UnicodeDecodeError as error:
        cut = not whole and error.reason == "unexpected end of data"
        wrong = _cut_off() if cut else f"not UTF-8: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        ends = error.pos >= len(text.rstrip()) or not text.rstrip().endswith("}")
        cut = not whole and ends and text.startswith("{")
        wrong = _cut_off() if cut else f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        wrong = f"not readable as JSON: {error}"
    return RecordError(f"{name}: {wrong}")


def _object(row: Any, name: str) -> Row | RecordError:
    if isinstance(row, dict):
        return row
    kind = "a dict" if name.startswith("row ") else "an object {...}"
    return RecordError(f"{name}: expected {kind}, got {type(row).__name__}")


def _cut_off() -> str:
    return (
        "the line ends in the middle of a row: the file seems to have been cut off; get it again, or take the line out"
    )


def _array_rows(path: Path, raw: bytes) -> Iterator[tuple[int, str, Row | RecordError]]:
    """The rows of a file that is one JSON array."""
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
        cut = error.pos >= len(raw.decode("utf-8-sig").rstrip()) or error.msg.startswith("Unterminated string")
        seems = "; the file seems to have been cut off" if cut else ""
        raise RecordError(f"{path}: a JSON array that is not JSON: {error.msg} {where}{seems}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not readable as JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        name = f"{path} entry {number}"
        yield number, name, _object(row, name)


def _is_array(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


# Files of other kinds -------------------------------------------------------------------------------------------------


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Refuse files of other kinds, told by their first bytes."""
    for magic, (kind, way) in _MAGIC.items():
        if head.startswith(magic):
            raise RecordError(f"{path}: this is {kind}; {_LINES}: {way}")
    if head[:2] in _UTF16 or (b"{\x00" in head[:8] or b"\x00{" in head[:8]):
        raise RecordError(f"{path}: this is UTF-16; expected UTF-8: iconv -f utf-16 -t utf-8 {path.name} > data.jsonl")


def _explain(path: Path, error: RecordError) -> None:
    """Say what a file is whose very first row is no JSON, where that can be told."""
    if "not JSON" not in str(error) and "expected an object" not in str(error):
        return
    try:
        with _open(path) as file:
            raw = file.read(1 << 24)
    except (OSError, EOFError, zlib.error):  # what it says of its first row is enough
        return
    text = raw.decode("utf-8-sig", errors="replace")
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    kind, way = "", ""
    for separator, name, other in (("\t", "TSV", ', sep="\\t"'), (",", "CSV", "")):
        if path.suffix == f".{name.lower()}" or (not kind and first[:1] not in "{[" and _is_header(first, separator)):
            kind, way = name, f'pandas.read_csv(...{other}).to_json("data.jsonl", orient="records", lines=True)'
    if path.suffix in (".yaml", ".yml") or (not kind and re.match(r"(- )?[\w-]+:(\s|$)|---$", first)):
        kind, way = "YAML", "write each of its entries as a JSON object, one a line"
    if not kind and first.startswith("{") and _is_object(text):
        kind = "one JSON object over several lines"
        way = "write its rows one a line, or as one array [...]"
    if kind:
        raise RecordError(f"{path}: this looks like {kind} (it begins {first[:60]!r}); {_LINES}: {way}") from error


def _is_header(line: str, separator: str) -> bool:
    """Return whether a line looks like the names of columns."""
    return separator in line and all(re.fullmatch(r'"?[\w .-]+"?', cell) for cell in line.split(separator))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
