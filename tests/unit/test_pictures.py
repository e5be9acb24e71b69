"""The script that makes the pictures of docs/data.md."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

from rlhf_fast.data.survey import survey
from rlhf_fast.models.byte_tokenizer import byte_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
spec = importlib.util.spec_from_file_location("make_pictures", FOLDER / "make.py")
assert spec is not None and spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_the_broken_file_is_broken_where_its_picture_says(tmp_path: Path) -> None:
    make.broken_file(tmp_path / "broken.jsonl")
    found = survey(str(tmp_path / "broken.jsonl"), byte_tokenizer())
    assert (found.usable, [one.line for one in found.problems]) == (3, [4, 5, 6, 7, 8, 9])
    drawn = "".join(ElementTree.parse(FOLDER / "data-broken.svg").getroot().itertext())
    assert "9 rows, of which 3 are usable as demonstrations" in drawn
    assert "<script>alert(1)</script>" in drawn


def test_a_terminal_is_drawn_with_its_colours_and_stays_text() -> None:
    root = ElementTree.fromstring(make.as_svg("x <y>", "plain \x1b[32mgreen\x1b[0m <b>\n\x1b[2mfaint\x1b[0m\n"))
    spans = [(span.text, span.get("fill")) for span in root.iter("{http://www.w3.org/2000/svg}tspan")]
    assert ("green", "#7ee787") in spans and ("faint", "#8b949e") in spans and ("plain ", None) in spans
    assert (" <b>", None) in spans and (" x <y>", None) in spans
