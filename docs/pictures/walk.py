"""Walk through `rlhf-fast demo --human` as somebody new: twenty pairs by keyboard in Chromium, with pictures.

    python docs/pictures/walk.py --out runs/walk [--answers answers.txt] [words for the demo, such as --tiny]

Photographs the sign-in, an item and the end into this folder, and prints what the terminal said. The answers are the
keys for each pair as it comes, such as 2qr; without a file each pair is shown in the terminal, and its keys asked for.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent


def photograph(page: Page, name: str, height: int = 300) -> None:
    """The upper part of the page in 64 colours, which keeps the file small."""
    taken = page.screenshot(clip={"x": 0, "y": 0, "width": 1100, "height": height})
    shot = Image.open(io.BytesIO(taken)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    shot.save(HERE / f"walk-{name}.png", optimize=True)


def printed_link(said: Path, demo: subprocess.Popen[bytes]) -> str:
    while not (found := re.search(r"http://\S+/join/\S+\n", said.read_text())):
        if demo.poll() is not None:
            sys.exit(said.read_text()[-2000:])
        time.sleep(0.2)
    return found[0].strip()


def shown_pair(page: Page) -> str:
    return "\n\n".join(one.inner_text() for one in page.locator(".prompt .said, .answer .said").all())


def keys_for(page: Page, number: int, answers: list[str]) -> str:
    if number < len(answers):
        return answers[number]
    return input(f"\n--- pair {number + 1}\n{shown_pair(page)}\n1 to 7, q or w (left), e or r (right): ").strip()


def press_enter(page: Page) -> None:
    with page.expect_navigation():
        page.keyboard.press("Enter")


def judge(page: Page, answers: list[str]) -> list[str]:
    """Judge until it is enough; returns the progress that was shown before each pair."""
    seen: list[str] = []
    while page.locator("#judgement").count():
        seen.append(page.locator(".progress").inner_text())
        for key in keys_for(page, len(seen) - 1, answers):
            page.keyboard.press(key)
        if len(seen) == 8:
            photograph(page, "item", 900)
        press_enter(page)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--answers", type=Path)
    given, words = parser.parse_known_args()
    answers = given.answers.read_text().split() if given.answers else []
    said = Path(tempfile.mkdtemp()) / "said"
    with open(said, "wb") as file:
        command = [sys.executable, "-m", "rlhf_fast.cli", "demo", "--human", "--out", given.out, *words]
        demo = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    link = printed_link(said, demo)
    with sync_playwright() as playwright:
        browser: Any = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(link)
        photograph(page, "sign-in")
        press_enter(page)  # the invitation
        press_enter(page)  # the guidelines
        began = time.monotonic()
        seen = judge(page, answers)
        photograph(page, "enough")
        browser.close()
    print(f"{len(seen)} pairs in {time.monotonic() - began:.0f} s, from {seen[0]!r} to {seen[-1]!r}")
    code = demo.wait()
    print(re.sub(r"[^\n]*\r", "", said.read_text()))
    sys.exit(code)


if __name__ == "__main__":
    os.chdir(HERE.parents[1])
    main()
