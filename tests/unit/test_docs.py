"""What the documents point to exists."""

from __future__ import annotations

import ast
import inspect
import os
import re
from pathlib import Path

import pytest
import yaml

from bench.reach import python_files
from rlhf_fast import ops
from rlhf_fast.config import (
    AnnotateConfig,
    ComparisonsConfig,
    DemoConfig,
    DPOConfig,
    EvaluationConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    settings,
    tiny_demo,
)
from rlhf_fast.ops import reference

ROOT = Path(__file__).resolve().parents[2]
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
    sources = [*python_files(ROOT / "rlhf_fast"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    reading = re.compile(r"""(?:getenv\(|environ(?:\.get\(|\[)|Compile\()\s*["'](\w+)["']""")
    read = {name for source in sources for name in reading.findall(source.read_text())}
    others = {"CUDA_HOME", "CUDA_PATH", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"}  # whose meaning is not ours
    others |= {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"}
    assert read - others == listed


def calls_of_ops() -> list[tuple[str, ast.Call, bool]]:
    """Those on the architecture page: the op, its arguments, and whether that is all."""
    text = re.sub(r"#.*", "", (ROOT / "docs" / "architecture.md").read_text())
    found = []
    for match in re.finditer(r"\bops\.(\w+)\(", text):
        ends = (i + 1 for i in range(match.end(), len(text)) if text[i] == ")")
        call = next(
            text[match.start() : end]
            for end in ends
            if text[match.end() : end].count(")") == 1 + text[match.end() : end].count("(")
        )
        parsed = ast.parse(call.replace(", ...", ""), mode="eval").body
        assert isinstance(parsed, ast.Call)
        found.append((match[1], parsed, ", ..." not in call))
    return found


def test_the_ops_on_the_architecture_page_have_these_arguments_and_defaults() -> None:
    calls = {name: (call, whole) for name, call, whole in calls_of_ops() if name != "use_backend"}
    assert calls.keys() == set(ops.__all__) - {"use_backend"}
    for name, (call, whole) in calls.items():
        signature = inspect.signature(getattr(ops, name)).parameters
        given, named = [ast.unparse(x) for x in call.args], [str(x.arg) for x in call.keywords]
        assert given == [*signature][: len(given)] and set(named) <= signature.keys(), name
        assert not whole or len(given) + len(named) == len(signature), name
        for keyword in call.keywords:
            value = keyword.value
            while isinstance(value, ast.BinOp):  # of several words the first
                value = value.left
            if isinstance(value, ast.Constant):
                assert signature[str(keyword.arg)].default == value.value, f"{name}: {keyword.arg}"
        assert all(signature[each].default is inspect.Parameter.empty for each in given), name


def test_an_op_of_an_output_layer_has_the_defaults_of_the_op_itself() -> None:
    for name in ("cross_entropy", "token_logprobs", "ppo_loss", "dpo_loss"):
        own, linear = (inspect.signature(getattr(ops, each)).parameters for each in (name, f"linear_{name}"))
        shared = [each for each in own if each in linear]
        assert len(shared) > 4
        assert {each: linear[each].default for each in shared} == {each: own[each].default for each in shared}, name


def test_the_definition_of_an_op_has_the_defaults_of_the_op() -> None:
    defined = {name for name in ops.__all__ if hasattr(reference, name)}
    assert len(defined) > 10
    for name in defined:
        op, definition = (inspect.signature(getattr(of, name)).parameters for of in (ops, reference))
        for each, parameter in definition.items():
            if each in op and parameter.default is not inspect.Parameter.empty:
                assert parameter.default == op[each].default, f"{name}: {each}"


def test_every_setting_has_the_default_that_the_page_of_defaults_says() -> None:
    """Who trains by defaults expects the same of the next version: with one, change this page and the changelog."""
    kinds = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig, "evaluate": EvaluationConfig}
    kinds |= {"comparisons": ComparisonsConfig, "annotate": AnnotateConfig}
    told = yaml.safe_load((ROOT / "docs" / "defaults.yaml").read_text())
    assert told == {name: settings.to_dict(kind()) for name, kind in kinds.items()} | {
        "demo": settings.to_dict(DemoConfig()),
        "demo --tiny": settings.to_dict(tiny_demo()),
    }


def test_the_ci_script_runs_what_a_person_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
