"""A survey for people: the verb's exit codes, what stands in the terminal and on the page, and that no text escapes."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast import cli
from rlhf_fast.data.survey import survey
from rlhf_fast.models.byte_tokenizer import byte_tokenizer
from rlhf_fast.pages.data_report import as_text, blocks, require_page, write_page

HOSTILE = "</p><script>alert(1)</script>\x1b[2J\x1b]0;title\x07\u202e\r\nProblems: none"
ROWS = [{"prompt": "Name a colour.", "completion": "Red."}, {"prompt": HOSTILE, "completion": HOSTILE}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["data", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_verb_shows_counts_lengths_and_learned_tokens(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = write(tmp_path / "rows.jsonl", ROWS[:1] * 3), tmp_path / "pages" / "rows.html"
    code, out, err = data(capsys, file, "--model", str(tiny_folder), "--out", str(page))
    assert code == 0
    assert f"{file}: 3 demonstrations, all usable" in out
    assert re.search(r"duplicates +2 rows; the prompts of 2 rows", out)
    assert re.search(r"learned +5 +5 +5 +5   5 █ 5", out)
    assert "│ <user>Name a colour.<assistant>⟦Red.⟧⟦<eos>⟧" in out
    assert "3/3" in err and f"Report: {page}" in out
    text = page.read_text()
    assert "<mark>Red.</mark><mark><code>&lt;eos&gt;</code></mark>" in text
    assert "rows.jsonl" in text and "3 demonstrations, all usable" in text


def test_special_tokens_in_texts_are_counted_where_there_are_any(tmp_path: Path) -> None:
    for text, said in (("a<eos>b", "spelled out in the texts of 2 rows"), ("a b", None)):
        file = write(tmp_path / "rows.jsonl", [{"prompt": f"{text} {i}", "completion": "c"} for i in range(2)])
        found = re.search(r"special tokens +(.*)", as_text(survey(file, byte_tokenizer()), file, "model"))
        assert (found and found[1].rstrip()) == said


def test_rows_that_training_would_refuse_end_with_exit_code_1(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": ""}, [1], {"prompt": "p", "completion": "long" * 20}])
    words = [file, "--model", str(tiny_folder), "--max_length", "50"]
    code, out, err = data(capsys, *words, "--problems", "2")
    assert code == 1 and err.endswith(f"rlhf-fast: {file}: training would refuse 3 of 4 rows\n")
    assert "line 2         prompt is empty" in out and "line 3 " in out and "line 4 " not in out and "and 1 more" in out
    code, out, _ = data(capsys, *words, "--overlong", "drop", "--json")
    found = json.loads(out)
    assert code == 1 and (found["refused"], found["usable"], found["longer"]) == (2, 1, 1)
    assert [one["line"] for one in found["problems"]] == [2, 3]
    code, out, _ = data(capsys, write(tmp_path / "long.jsonl", [ROWS[0]] * 2), "--model", str(tiny_folder), "--json")
    assert code == 0 and json.loads(out)["refused"] == 0


def test_no_weights_are_read(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in tiny_folder.glob("*"):
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, out, _ = data(capsys, write(tmp_path / "rows.jsonl", ROWS), "--model", str(tmp_path))
    assert code == 0 and "2 demonstrations, all usable" in out


def test_a_page_takes_the_place_of_a_page_only(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any work: the file of the data, typed twice, stays as it is."""
    file = write(tmp_path / "rows.jsonl", ROWS)
    other = tmp_path / "mine.html"
    other.write_text("<title>mine</title>")
    for name, words in ((file, "ends in .html"), (str(other), "no page of `rlhf-fast data`"), ("x.txt", "in .html")):
        before = Path(name).read_bytes() if Path(name).exists() else None
        code, out, err = data(capsys, file, "--model", "no/such/model", "--out", name)
        assert (code, out) == (1, "") and words in err and "model" not in err
        assert (Path(name).read_bytes() if Path(name).exists() else None) == before
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        require_page(tmp_path / "folder.html")
    page = str(tmp_path / "page.html")
    for _ in range(2):
        assert data(capsys, file, "--model", str(tiny_folder), "--out", page)[0] == 0


def test_hostile_text_moves_no_terminal_and_writes_no_line_of_its_own() -> None:
    found = survey([*ROWS, {HOSTILE: 1}, {"prompt": "p", "chosen": "a", "rejected": "b"}], byte_tokenizer())
    for colour in (False, True):
        text = as_text(found, HOSTILE, HOSTILE, colour)
        without = re.sub(r"\033\[[0-9;]*m", "", text)
        assert without.isprintable() or set(c for c in without if not c.isprintable()) == {"\n"}
        assert "Problems: none" in text
        assert not any(line.lstrip("\033[0123456789;m").startswith("Problems") for line in text.splitlines())
        assert ("\033[32m" in text) == colour == ("⟦" not in text)
    as_text(found, "a", "b", False, 60, "ascii").encode("ascii")


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts = self.opened = 0
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.scripts += tag == "script"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_hostile_text_stays_text_on_the_page(tmp_path: Path) -> None:
    found = survey([*ROWS, {HOSTILE: 1}], byte_tokenizer(), lines=(0, 1))
    write_page(tmp_path / "page.html", found, HOSTILE, HOSTILE)
    tags = _Tags()
    tags.feed((tmp_path / "page.html").read_text())
    assert tags.scripts == 1  # the page's own
    assert sum("<script>alert(1)</script>" in text for text in tags.texts) >= 4  # prompt, answer, problem, file
    require_page(tmp_path / "page.html")


def test_both_answers_of_a_comparison_stand_side_by_side(tmp_path: Path) -> None:
    for row, sides in (({"prompt": "p", "completion": "c"}, 1), ({"prompt": "p", "chosen": "c", "rejected": "r"}, 2)):
        write_page(tmp_path / "page.html", survey([row], byte_tokenizer(), lines=(0,)), "f", "m")
        text = (tmp_path / "page.html").read_text()
        assert (text.count('<div class="reply">'), text.count('<div class="grid two">')) == (sides, sides - 1)


def test_the_last_bin_says_how_far_it_goes_where_something_lies_beyond_its_edge(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for longest, beyond in ((25, False), (3000, True)):
        rows = [{"prompt": "p" * 20, "completion": "c" * (20 + i % 10)} for i in range(300)]
        rows.append({"prompt": "p" * 20, "completion": "c" * longest})
        write_page(tmp_path / "page.html", survey(rows, byte_tokenizer(), max_length=10_000), "f", "m")
        assert ("the last bin goes up to" in (tmp_path / "page.html").read_text()) == beyond


def test_a_file_that_is_not_there_is_told_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = data(capsys, str(tmp_path / "none.jsonl"), "--model", "no/such/model")
    assert (code, out) == (1, "") and "none.jsonl" in err and "no/such/model" not in err


def test_long_texts_show_their_two_ends_and_problems_are_cut() -> None:
    rows = [{"prompt": "begin " + "x" * 5000 + " end", "completion": "y"}, {"z" * 5000: 1}]
    text = as_text(survey(rows, byte_tokenizer(), max_length=10_000), "f", "m")
    assert "begin xxx" in text and "xxx end" in text and "characters ...]" in text and len(text) < 3500


def test_lines_are_no_wider_than_the_terminal_and_each_of_a_record_has_its_bar() -> None:
    rows = [{"prompt": "p" * 150 + "\n" + "q" * 20, "completion": "word " * 40}, {"z" * 200: 1}]
    found = survey(rows, byte_tokenizer())
    text = re.sub(r"\033\[[0-9;]*m", "", as_text(found, "f", "m", True, 80))
    assert max(len(line) for line in text.splitlines() if "█" not in line) == 80
    shown = text[text.index("  line 0;") :].splitlines()[1:]
    assert all(line.startswith("  │ ") for line in shown)
    said = [line.removeprefix("  │ ") for line in shown]
    assert "".join(said).replace(" ", "") == f"<user>{'p' * 150}{'q' * 20}<assistant>{'word' * 40}<eos>"
    assert all(line.strip(" ").endswith("word") for line in said[-4:-1])  # between words


def test_what_max_length_does_is_said_for_each_way() -> None:
    rows = [{"prompt": "p", "completion": "c" * size} for size in (1, 50, 60)]
    ways = {"error": "training refuses them", "truncate": "78 tokens are cut", "drop": "1 row is left"}
    for overlong, now in ways.items():
        others = "".join(f"; with overlong = {name} {said}" for name, said in ways.items() if name != overlong)
        text = as_text(survey(rows, byte_tokenizer(), max_length=20, overlong=overlong), "f", "m")  # type: ignore[arg-type]
        assert f"2 rows longer than 20 tokens: {now}{others}" in text
    assert "no row is longer than 1,024 tokens" in as_text(survey(rows, byte_tokenizer()), "f", "m")


def test_a_bin_with_anything_in_it_shows() -> None:
    assert blocks([0, 1, 100, 1000]) == " ▁▁█"
    assert blocks([0, 0]) == "  "
    assert blocks([4, 8]) == "▄█"


def test_a_file_of_which_no_row_can_be_used(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": "a"}] * 3)
    page = str(tmp_path / "p.html")
    code, out, _ = data(capsys, file, "--model", str(tiny_folder), "--out", page, "--lines", "2")
    assert "line 2 is not shown: it is no row that can be used" in out
    assert "Line 2 is not shown" in Path(page).read_text()
    assert code == 1 and "none of 3 rows can be used" in out and "line 1 " in out


def test_a_model_of_fewer_positions_is_the_limit(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its config says, of an adapter's base model too."""
    config = json.loads((tiny_folder / "config.json").read_text())
    folder, adapter = tmp_path / "short", tmp_path / "adapter"
    for made, name in ((folder, "config.json"), (adapter, "adapter_config.json")):
        made.mkdir()
        for file in [*tiny_folder.glob("*token*"), tiny_folder / "chat_template.jinja"]:
            (made / file.name).write_bytes(file.read_bytes())
        kept = {**config, "max_position_embeddings": 40} if made == folder else {
            "base_model_name_or_path": str(folder), "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2,
        }  # fmt: skip
        (made / name).write_text(json.dumps(kept))
    file = write(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "p" * 30, "completion": "c" * 10}])
    for model in (folder, adapter):
        code, out, _ = data(capsys, file, "--model", str(model))
        assert code == 1 and "line 2         43 tokens, more than the model's 40 positions" in out
        assert "1 row longer than 40 tokens (the model has no more positions): training refuses it" in out
