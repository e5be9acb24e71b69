"""Processes of tests that begin at once: copies of one that has imported everything, one for each process of pytest.

A server of copies can be told what to import only before its first copy, so all tests share this one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.scenarios.trainers.killed_run", "rlhf_fast.pipeline", "rlhf_fast.cli"])


def verb(words: Sequence[str], said: str) -> Any:
    """A process that does what `rlhf-fast WORDS` does, and puts what it says into a file."""
    return PROCESSES.Process(target=_verb, args=(list(words), said))


def code(text: str, folder: Path) -> str:
    """What a program says that is run in a folder; its last words are the error, if it fails."""
    said = folder / "said.txt"
    process = PROCESSES.Process(target=_code, args=(text, str(folder), str(said)))
    process.start()
    process.join()
    words = said.read_text()
    assert process.exitcode == 0, f"ended with {process.exitcode}: {words[-2000:]}"
    return words


def _code(text: str, folder: str, said: str) -> None:
    _say_into(said)
    os.chdir(folder)
    exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})


def _say_into(said: str) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _verb(words: list[str], said: str) -> None:
    _say_into(said)
    import torch

    from rlhf_fast.cli import main
    from rlhf_fast.pages import plots

    torch.set_num_threads(1)
    plots.available = lambda: False  # they take a second a page
    sys.exit(main(words))
