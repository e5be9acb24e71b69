"""What the documents point to exists."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_every_detail_of_ppo_names_tests_that_exist() -> None:
    table = (ROOT / "docs" / "ppo.md").read_text()
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(range(1, 33))
    named = re.findall(r"`((?:tests/)?[\w/]+\.py)(?:::(\w+))?`", table)
    assert len(named) > 25
    for file, test in named:
        path = ROOT / "tests" / file.removeprefix("tests/")
        assert path.exists(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_environment_variable_that_the_code_reads_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE))
    sources = [*ROOT.glob("rlhf_fast/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    reading = re.compile(r"""(?:getenv\(|environ(?:\.get\(|\[)|Compile\()\s*["'](\w+)["']""")
    read = {name for source in sources for name in reading.findall(source.read_text())}
    others = {"CUDA_HOME", "CUDA_PATH", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"}  # whose meaning is not ours
    others |= {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"}
    assert read - others == listed


def test_the_ci_script_runs_what_a_person_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
