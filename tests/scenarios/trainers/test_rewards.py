"""Where rewards come from: functions, rules, weighted lists; what is handed to them, and what their failures say."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import re
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.config import LoRAConfig, PPOConfig
from rlhf_fast.data.records import PromptRecord, RecordError, read_prompts
from rlhf_fast.rewards import calls as reward_calls
from rlhf_fast.rewards.calls import RewardError
from rlhf_fast.rewards.model import resolve_reward
from rlhf_fast.rewards.rules import RULES, rule
from rlhf_fast.trainers.ppo.trainer import PPOTrainer

ROWS = [{"prompt": "one", "answer": "1", "kind": "a"}, {"prompt": "two", "answer": "2", "kind": "b"}]
RECORDS = read_prompts(ROWS)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited between calls, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(reward_calls.time, "sleep", waited.append)
    return waited


def scores(reward: Any, responses: list[str] | None = None, records: Any = None, **options: Any) -> list[float]:
    asked = RECORDS if records is None else records
    return resolve_reward(reward, 0.6, 100, **options)(asked, responses or ["first", "second"]).scores


# Functions -----------------------------------------------------------------------------------------------------------


def test_a_function_gets_prompts_and_responses_as_they_are_in_lists_of_its_own() -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        seen.append((prompts[:], responses[:]))
        prompts.clear()
        return [float(len(responses.pop())) for _ in range(2)]

    texts, records = ["\x00 \ud800", "<b>"], [PromptRecord([{"role": "user", "content": "a"}]), PromptRecord("b")]
    assert scores([(1.0, reward), (1.0, reward)], texts, records) == [6.0, 6.0]
    assert seen == [([[{"role": "user", "content": "a"}], "b"], texts)] * 2
    assert texts == ["\x00 \ud800", "<b>"]


@pytest.mark.parametrize(
    "returned",
    [[1, 2], (True, 2), [np.float32(1), Fraction(2)], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), range(1, 3),
     [torch.tensor(1.0), torch.tensor([2.0])]],
)  # fmt: skip
def test_scores_may_be_numbers_of_any_kind(returned: Any) -> None:
    assert scores(lambda prompts, responses: returned) == [1.0, 2.0]
    assert all(type(score) is float for score in scores(lambda prompts, responses: returned))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "reward function: returned 1 scores for 2 responses; return one for each, None for one"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 responses"),
        ([1.0, math.nan], "the score of response 1 is nan, expected a finite number or None; it is 'second' to row 1"),
        ([-math.inf, 1.0], "the score of response 0 is -inf"),
        ([1.0, "0.5"], "the score of response 1 is '0.5', expected a finite number"),
        ([1.0, [2.0]], r"the score of response 1 is \[2.0\], expected a finite number"),
        ([10**400, 1.0], "the score of response 0 is 10+, expected a finite number"),
        (None, "returned NoneType; expected a list of one score a response"),
        (1.0, "returned float; expected a list"),
        ("11", "returned str; expected a list"),
        ({"a": 1.0, "b": 2.0}, "returned dict; expected a list"),
    ],
)
def test_a_wrong_answer_of_a_function_is_named_and_not_asked_for_again(
    returned: Any, message: str, pauses: list[float]
) -> None:
    with pytest.raises(ValueError, match=message):
        scores(lambda prompts, responses: returned, retries=3)
    assert pauses == []


def test_a_function_that_raises_is_called_again_after_growing_pauses(
    pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = itertools.count(1)

    def flaky(prompts: list[Any], responses: list[str]) -> list[float]:
        if next(calls) < 4:
            raise ConnectionError("not now")
        return [1.0, 2.0]

    assert scores(flaky, retries=3) == [1.0, 2.0]
    assert pauses == [1.0, 2.0, 4.0]
    (line,) = re.findall("reward flaky: ConnectionError: not now (.*); call 4 of 4 in 4 s", capsys.readouterr().err)
    assert re.fullmatch(r"\(test_rewards.py line [0-9]+\)", line)


def test_a_function_that_goes_on_raising_is_named_with_its_last_error(pauses: list[float]) -> None:
    def judge(prompts: list[Any], responses: list[str]) -> list[float]:
        raise KeyError("choices")

    place = r"\(test_rewards.py line [0-9]+\)"
    advice = "mend the function, or allow more by ppo.reward_timeout and ppo.reward_retries"
    with pytest.raises(
        RewardError, match=f"reward judge: failed 9 times, at last with KeyError: 'choices' {place}; {advice}"
    ):
        scores(judge, retries=8)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    with pytest.raises(RewardError, match="failed once") as caught:
        scores(judge)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("how", ["waits", "loops", "catches all"])
def test_a_function_that_takes_too_long_is_stopped(how: str) -> None:
    ended = threading.Event()

    def slow(prompts: list[Any], responses: list[str]) -> list[float]:
        try:
            while True:
                try:
                    if how == "waits":
                        threading.Event().wait(60)
                except Exception:
                    assert how == "catches all"
        finally:
            ended.set()

    before, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(RewardError, match=r"reward slow: failed 2 times, at last with TimeoutError: no answer within"):
        scores(slow, timeout=0.1, retries=1)
    assert time.monotonic() - started < 5.0 and ended.is_set()
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_function_runs_in_the_thread_that_calls_it_and_other_alarms_are_left_alone() -> None:
    """Where checkers with alarms of their own have to be."""
    threads: list[Any] = []

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        return [1.0, 2.0]

    signal.setitimer(signal.ITIMER_REAL, 100.0)
    try:
        assert scores(reward, timeout=5.0) == [1.0, 2.0]
        assert 90.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    assert threads == [threading.main_thread()]
    other = threading.Thread(target=lambda: threads.append(scores(reward, timeout=5.0)))
    other.start()
    other.join()
    assert threads[1:] == [other, [1.0, 2.0]]


# Async functions -----------------------------------------------------------------------------------------------------


async def by_length(prompts: list[Any], responses: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(response)) for response in responses]


def test_an_async_function_is_waited_for_also_where_a_loop_is_running() -> None:
    class Judge:
        async def __call__(self, prompts: list[Any], responses: list[str], answer: list[str]) -> list[float]:
            return [float(each) for each in answer]

    async def as_in_a_notebook() -> list[float]:
        return scores([(1.0, by_length), (0.5, Judge())], timeout=5.0)

    assert scores(by_length) == [5.0, 6.0]
    assert asyncio.run(as_in_a_notebook()) == [5.5, 7.0]


def test_what_an_async_function_keeps_between_calls_stays_in_its_loop() -> None:
    loops = []

    async def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0, 0.0]

    function = resolve_reward(reward, 0.6, 100)
    for _ in range(2):
        function(RECORDS, ["a", "b"])
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_an_async_function_that_takes_too_long_is_cancelled_and_called_again() -> None:
    cancelled = []

    async def slow(prompts: list[Any], responses: list[str]) -> list[float]:
        try:
            await asyncio.sleep(0 if cancelled else 60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return [1.0, 2.0]

    assert scores(slow, timeout=0.1, retries=1) == [1.0, 2.0]
    assert cancelled == [True]


def test_an_async_functions_own_timeout_is_told_from_ours() -> None:
    async def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        raise TimeoutError("the judge's")

    with pytest.raises(RewardError, match="failed once, at last with TimeoutError: the judge's"):
        scores(reward, timeout=5.0)


def test_an_async_function_that_holds_up_its_loop_is_not_called_again(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setattr(reward_calls, "GRACE", 0.1)
    release = threading.Event()

    async def blocking(prompts: list[Any], responses: list[str]) -> list[float]:
        release.wait(30)
        return [1.0, 2.0]

    with pytest.raises(RewardError, match=r"reward blocking: no answer within 0\.1 s, and it holds up its event loop"):
        scores(blocking, timeout=0.1, retries=3)
    release.set()
    assert pauses == []
    assert scores(by_length) == [5.0, 6.0]  # the loop is free again


# Columns -------------------------------------------------------------------------------------------------------------


def test_columns_come_to_parameters_of_their_names() -> None:
    def plain(prompts: list[Any], responses: list[str], answer: list[str]) -> list[float]:
        return [float(each) for each in answer]

    def keyword(prompts: list[Any], responses: list[str], *, kind: list[str], weight: float = 3.0) -> list[float]:
        return [weight * (each == "b") for each in kind]

    def rest(prompts: list[Any], responses: list[str], **columns: list[Any]) -> list[float]:
        assert columns == {"answer": ["1", "2"], "kind": ["a", "b"]}
        return [0.0, 0.0]

    assert scores([(1.0, plain), (1.0, keyword), (1.0, rest)]) == [1.0, 5.0]


def test_a_missing_column_is_named_with_its_row_before_anything_starts(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": str(i)} for i in range(16)]
    del rows[3]["answer"]
    config = PPOConfig(steps=1, max_new_tokens=4)
    with pytest.raises(RecordError, match=r"^row 3: reward math asks for the column 'answer', which is not there; the"):
        PPOTrainer(tiny_folder, "rule:math", rows, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_an_optional_column_is_in_all_rows_or_in_none() -> None:
    def reward(prompts: list[Any], responses: list[str], answer: Any = "default") -> list[float]:
        return [1.0 if answer == "default" else 2.0] * 2

    with_it, without = PromptRecord("a", columns=RECORDS[0].columns), PromptRecord("b", name="line 9")
    assert scores(reward, records=[without, without]) == [1.0, 1.0]
    assert scores(reward, records=[with_it, with_it]) == [2.0, 2.0]
    with pytest.raises(RecordError, match=r"line 9: reward reward asks .* 'answer'.*; the row has only a prompt"):
        scores(reward, records=[with_it, without])


@pytest.mark.parametrize(
    "function", [lambda responses: [], lambda: [], lambda completions, **columns: [], lambda responses, prompts: []]
)
def test_a_function_that_takes_something_else_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match=r"its parameters are \(.*\); it is called with \(prompts, responses\)"):
        resolve_reward(function, 0.6, 100)


# Lists ---------------------------------------------------------------------------------------------------------------


def letters(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_a_list_is_the_weighted_sum_and_tells_the_mean_of_each_part() -> None:
    reward = resolve_reward([(1.0, letters), (-0.5, "rule:math"), (2.0, [(0.5, letters), (3, "rule:json")])], 0.6, 100)
    found = reward(RECORDS, ["1", "{}"])
    assert found.scores == [1.0 - 0.5 + 1.0, 2.0 + 2.0 + 6.0]
    assert found.means == {"letters": 1.5, "math": 0.5, "letters_2": 1.5, "json": 0.5}
    assert resolve_reward(letters, 0.6, 100)(RECORDS, ["1", "{}"]).means == {}


def test_a_list_may_be_written_as_text() -> None:
    text = "1*rule:json:a,b, -.5*rule:length:2,1e1*rule:tags:a,b"
    found = resolve_reward(text, 0.6, 100)(RECORDS, ['{"a": 1}', "<a></a><b></b>"])
    assert found.scores == [0.5 - 0.5 * 1.0, -0.5 * 0.5 + 10.0]
    assert list(found.means) == ["json", "length", "tags"]


def test_no_score_of_a_part_is_left_out_and_none_at_all_is_an_error() -> None:
    def one(prompts: list[Any], responses: list[str]) -> list[float | None]:
        return [None if response == "second" else 4.0 for response in responses]

    found = resolve_reward([(0.5, one), (1.0, letters)], 0.6, 100)(RECORDS, ["first", "second"])
    assert found.scores == [7.0, 6.0] and found.means == {"one": 4.0, "letters": 5.5}
    records = read_prompts([{"prompt": "p", "answer": "5"}, {"prompt": "p", "answer": None}])
    with pytest.raises(ValueError, match="response 1, to row 1, was scored by none of one, math; at least one must"):
        scores([(0.5, one), (1.0, "rule:math")], records=records)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8), st.randoms())
def test_a_score_does_not_depend_on_what_else_is_scored(responses: list[str], draw: Any) -> None:
    records = read_prompts([{"prompt": "p", "answer": str(i % 3)} for i in range(len(responses))])
    reward = resolve_reward([(1.0, letters), (0.3, "rule:math"), (0.1, "rule:length:3")], 0.6, 100)
    whole = reward(records, responses).scores
    order = draw.sample(range(len(responses)), len(responses))
    assert reward([records[i] for i in order], [responses[i] for i in order]).scores == [whole[i] for i in order]
    assert [reward([r], [t]).scores[0] for r, t in zip(records, responses, strict=True)] == whole


@pytest.mark.parametrize(
    ("reward", "kind", "message"),
    [
        (3, TypeError, "got int; expected a checkpoint, a function"),
        ([], TypeError, "got list; expected a checkpoint"),
        ([letters], TypeError, r"a list holds <function .*; expected \(weight, reward\)"),
        ([(letters, 1.0)], ValueError, "the weight <function .*; expected a finite number"),
        ([(math.inf, letters)], ValueError, "the weight inf; expected a finite number"),
        ([(True, letters)], ValueError, "the weight True; expected a finite number"),
        ("rule:maths", ValueError, "there is no rule 'maths'; the nearest one is 'math'"),
    ],
)
def test_what_is_no_reward_is_refused(reward: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        resolve_reward(reward, 0.6, 100)


# In PPO --------------------------------------------------------------------------------------------------------------


def test_ppo_pays_the_sum_and_logs_the_parts(tiny_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def match(prompts: list[Any], responses: list[str], answer: list[str]) -> list[float]:
        seen.extend(zip(prompts, answer, strict=True))
        return [float(len(response)) for response in responses]

    rows = [{"prompt": f"q{i}", "answer": f"a{i}"} for i in range(4)]
    config = PPOConfig(
        steps=2, prompts_per_step=2, samples_per_prompt=2, minibatches=1, max_new_tokens=6, lora=LoRAConfig(r=2)
    )
    PPOTrainer(tiny_folder, [(1.0, match), (0.5, "rule:length:3")], rows, tmp_path, config).train()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    for row in metrics:
        assert row["score"] == pytest.approx(row["score/match"] + 0.5 * row["score/length"], abs=1e-9)
    assert len(seen) == 8 and all(prompt[1:] == answer[1:] for prompt, answer in seen)


def test_the_example_of_the_page_on_rewards_works_with_a_tiny_model(tiny_folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert '"smollm2-135m"' in code and '"runs/sums"' in code and "samples_per_prompt=8" in code
    code = code.replace('"smollm2-135m"', repr(str(tiny_folder))).replace('"runs/sums"', repr(str(tmp_path)))
    code = code.replace("samples_per_prompt=8", "samples_per_prompt=2, steps=1, prompts_per_step=4, max_new_tokens=4")
    exec(code, {})
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {"score", "score/near", "score/length"} <= set(row)


def test_every_rule_of_the_page_on_rewards_is_one_and_every_rule_is_there() -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    named = re.findall(r"`rule:([\w:,]+)`", page)
    assert {rule(name) and name.partition(":")[0] for name in named} == set(RULES)


def test_a_run_whose_reward_fails_says_so_and_goes_on_from_what_was_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_fast.trainers.loop import state

    monkeypatch.setattr(state, "EVERY", 0.0)
    monkeypatch.setattr(state, "MOST", 1e9)
    broken, calls = [True], []

    def judge(prompts: list[Any], responses: list[str]) -> list[float]:
        calls.append(len(responses))
        if broken and len(calls) > 1:
            raise ConnectionError("gone")
        return [float(len(response)) for response in responses]

    config = PPOConfig(
        steps=2, prompts_per_step=2, samples_per_prompt=1, minibatches=1, max_new_tokens=4, lora=LoRAConfig(r=2),
        reward_retries=2,
    )  # fmt: skip
    rows = [{"prompt": f"q{i}"} for i in range(4)]
    with pytest.raises(RewardError, match="reward judge: failed 3 times, at last with ConnectionError: gone"):
        PPOTrainer(tiny_folder, judge, rows, tmp_path, config).train()
    broken.clear()
    more = dataclasses.replace(config, reward_timeout=None, reward_retries=9)  # as the message proposes
    PPOTrainer(tiny_folder, judge, rows, tmp_path, more).train()
    assert len(calls) == 1 + 3 + 1  # the first step was not done again
