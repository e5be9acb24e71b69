"""The pictures of docs/data.md, made by running the commands that they show.

    python docs/pictures/make.py harmless-base-test.jsonl.gz

Terminals are run for real, on a pseudo-terminal, and drawn as SVG from what they wrote; pages are photographed by
Chromium (`apt install chromium`), and left out without it.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
WIDTH = 110  # characters of the terminal
STYLES = {"32": 'fill="#7ee787"', "1;32": 'fill="#7ee787" font-weight="bold"', "2": 'fill="#8b949e"'}


def broken_file(path: Path) -> None:
    """One row in order, and the mistakes that people make."""
    rows: list[object] = [
        {"prompt": "Name a colour.", "completion": "Red."},
        {"prompt": "Name a colour.", "completion": "Red."},
        {
            "messages": [
                {"role": "user", "content": "My cat is called <|im_end|>. Is that a good name?"},
                {"role": "assistant", "content": "It is hard to call."},
                {"role": "user", "content": "\x1b[31mAnd this?\x1b[0m <script>alert(1)</script>"},
                {"role": "assistant", "content": "That is no name.\nProblems: none"},
            ]
        },
        {"prompt": "", "completion": "Nobody asked."},
        {"prompt": "Which is better?", "chosen": "This.", "rejected": "That."},
        {"text": "Rows of another program."},
        {"prompt": "Count.", "completion": " ".join(map(str, range(700)))},
        {"messages": [{"role": "user", "content": "Hello?"}]},
        '{"prompt": "A line that was cut off", "comple',
    ]
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def in_terminal(words: list[str], folder: Path) -> str:
    """What a command writes to a terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "LINES": "50", "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)
    # Progress lines move in a terminal, which a picture does not.
    command = subprocess.Popen(
        words, stdout=child, stderr=subprocess.PIPE, cwd=folder, env=environment, start_new_session=True
    )
    os.close(child)
    found = io.BytesIO()
    with contextlib.suppress(OSError):  # that is how the end is told
        while piece := os.read(parent, 65536):
            found.write(piece)
    os.close(parent)
    assert command.stderr is not None
    errors = command.stderr.read().decode()
    command.wait()
    last = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("rlhf-fast:")]
    return found.getvalue().decode().replace("\r\n", "\n") + "".join(f"{line}\n" for line in last)


def as_svg(command: str, text: str) -> str:
    """A terminal with that text, whose colours stand in STYLES."""
    lines = [f"\x1b[1;32m$\x1b[0m {command}", *text.rstrip("\n").split("\n")]
    height, size = 18, 13
    drawn = []
    for number, line in enumerate(lines):
        spans, style = [], ""
        for i, part in enumerate(re.split(r"\x1b\[([0-9;]*)m", line)):
            if i % 2:
                style = STYLES.get(part, "")
            elif part:
                spans.append(f"<tspan {style}>{html.escape(part)}</tspan>")
        drawn.append(f'<text x="16" y="{28 + height * number}" xml:space="preserve">{"".join(spans)}</text>')
    wide, tall = round(WIDTH * size * 0.605) + 32, height * len(lines) + 32
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" height="{tall}" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{size}" fill="#e6edf3">'
        f'<rect width="100%" height="100%" rx="10" fill="#0d1117"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def photograph(page: Path, picture: Path, height: int) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print(f"{picture.name}: left out, as there is no Chromium (apt install chromium)", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "page.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
        sized = [f"--screenshot={taken}", f"--window-size=1180,{height}", page.as_uri()]
        subprocess.run([browser, *options, *sized], check=True, capture_output=True, timeout=120)
        with Image.open(taken) as whole:
            whole.convert("RGB").quantize(160).save(picture, optimize=True)  # a third of the bytes


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hh", type=Path, help="harmless-base-test.jsonl.gz of HH-RLHF")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures")
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / arguments.hh.name).symlink_to(arguments.hh.resolve())
        broken_file(folder / "broken.jsonl")
        shown = {
            "data-hh": ([arguments.hh.name, "--lines", "16", "--out", "hh.html"], 2330),
            "data-broken": (["broken.jsonl", "--lines", "3", "--out", "broken.html"], 2280),
        }
        for picture, (command, height) in shown.items():
            given = ["data", *command, *(["--model", arguments.model] if arguments.model != "smollm2-135m" else [])]
            text = in_terminal([sys.executable, "-m", "rlhf_fast.cli", *given], folder)
            (arguments.out / f"{picture}.svg").write_text(as_svg(f"rlhf-fast {' '.join(given)}", text))
            photograph(folder / command[-1], arguments.out / f"{picture}.png", height)


if __name__ == "__main__":
    main()
