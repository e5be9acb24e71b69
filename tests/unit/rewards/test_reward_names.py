"""Rewards as they are written: lists, and functions in Python files, whose every fault is named with its line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data.records import PromptRecord
from rlhf_fast.rewards import names as reward_names
from rlhf_fast.rewards.calls import RewardError
from rlhf_fast.rewards.model import resolve_reward

GOOD = """import beside

CONSTANT = 2


def shortest(prompts, responses):
    return [beside.SIGN * len(response) for response in responses]


async def near(prompts, responses, answer):
    return [float(r == a) for r, a in zip(responses, answer)]


class Judge:
    def __call__(self, prompts, responses):
        return [1.0] * len(responses)


judge = Judge()


def one(prompts):
    return [1.0]


def broken(prompts, responses):
    return inner(responses)


def inner(responses):
    return [1 / 0 for _ in responses]


def few(prompts, responses):
    return [1.0]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """my.py in the working folder, which imports beside.py."""
    (tmp_path / "my.py").write_text(GOOD)
    (tmp_path / "beside.py").write_text("SIGN = -1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    reward_names._module.cache_clear()
    return tmp_path / "my.py"


def scores(reward: Any, *responses: str, **columns: Any) -> list[float]:
    records = [PromptRecord("p", columns={"answer": r, **columns}) for r in ("a", "bb")]  # type: ignore[arg-type]
    return resolve_reward(reward, 0.0, 64)(records, responses or ("a", "cc")).scores


def test_functions_of_a_file_are_rewards(file: Path) -> None:
    assert scores("my.py:shortest") == [-1.0, -2.0]
    assert scores(f"{file}:near") == [1.0, 0.0]
    assert scores(file.parent / "my.py:judge") == [1.0, 1.0]
    found = resolve_reward("1*my.py:shortest, 0.5*rule:length:1, 2*my.py:near", 0.0, 64)
    assert [(part.weight, part.name) for part in found.parts] == [(1.0, "shortest"), (0.5, "length"), (2.0, "near")]
    assert found.parts[2].waits, "an async function is asked in the background"


def test_a_file_is_run_once_for_all_its_functions(file: Path) -> None:
    file.write_text("print('ran', flush=True)\n" + GOOD)
    first, second = (reward_names.load_function(f"{path}:shortest") for path in ("my.py", "./my.py"))
    assert first is second


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("my.py:near", []),
        ("1*runs/reward, 0.5*my.py:near, 2*rule:math, 1*http://x/y.py", ["runs/reward"]),
        ("runs/reward", ["runs/reward"]),
    ],
)
def test_only_checkpoints_are_models(text: str, models: list[str]) -> None:
    assert reward_names.reward_models(text) == models


def said(source: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        reward_names.check(source)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("my.py", "reward: my.py is a Python file; name the function in it, such as my.py:shortest; it has shortest, "
         "near, one, broken, inner, few"),
        ("my.py:", "reward: my.py is a Python file; name the function in it, such as my.py:shortest; it has shortest, "
         "near, one, broken, inner, few"),
        ("1*rule:math, 2*my.py:shotest", "reward: my.py has no 'shotest'; did you mean my.py:shortest?"),
        ("my.py:zzz", "reward: my.py has no 'zzz'; it has shortest, near, one, broken, inner, few"),
        ("my.py:CONSTANT", "reward: CONSTANT in my.py is int; expected a function (prompts, responses) -> scores"),
        ("none.py:score", "reward: there is no file none.py; expected FILE.py:function"),
        ("empty.py", "reward: empty.py is a Python file; name the function in it, such as empty.py:function; it "
         "defines no function"),
        ("rule:maths", "reward: there is no rule 'maths'; the nearest one is 'math'"),
        ("runs/none", "reward: there is no folder runs/none"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_written_reward_is_named(file: Path, source: str, words: str) -> None:
    (file.parent / "empty.py").write_text("")
    assert said(source).startswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(:\n", "bad.py line 1: invalid syntax"),
        ("import no_such_module\n\ndef score(p, r): ...\n", "line 1: ModuleNotFoundError: No module named 'no_such_"),
        ("def score(p, r): ...\n\nx = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("\x00", "null bytes"),
    ],
)
def test_an_error_in_a_file_is_named_with_its_line(file: Path, text: str, words: str) -> None:
    (file.parent / "bad.py").write_text(text)
    line = said("bad.py:score")
    assert line.startswith("reward: ") and words in line


def test_a_function_of_other_parameters_is_named_with_its_line(file: Path) -> None:
    with pytest.raises(TypeError, match=r"reward my\.py:one \(line 22\): its parameters are \(prompts\); it is called"):
        resolve_reward("my.py:one", 0.0, 64)


def test_an_exception_in_a_call_is_named_with_file_and_line(file: Path) -> None:
    words = r"reward my\.py:broken \(line 26\): failed once, at last with ZeroDivisionError: division by zero \(my\.py "
    with pytest.raises(RewardError, match=words + r"line 31\)"):
        scores("my.py:broken")


def test_a_wrong_number_of_scores_is_named(file: Path) -> None:
    with pytest.raises(ValueError, match="reward few: returned 1 scores for 2 responses"):
        scores("my.py:few")
