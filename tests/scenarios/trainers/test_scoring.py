"""Scores on their way: what is asked while others are sampled, in which calls, and that only the time differs."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.config import LoRAConfig, PPOConfig
from rlhf_fast.data.records import read_prompts
from rlhf_fast.rewards.calls import RewardError, is_async
from rlhf_fast.rewards.model import Rewards, resolve_reward
from rlhf_fast.rewards.scoring import IN_FLIGHT, Background, Scoring
from rlhf_fast.trainers.ppo.trainer import PPOTrainer

TIMED = ("seconds", "decode_roofline", "training_utilisation", "busy")  # metrics that no two runs have the same


def length(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def resolved(reward: Any, **options: Any) -> Rewards:
    return resolve_reward(reward, 0.6, 100, **options)


@given(st.integers(1, 12), st.integers(1, 5), st.randoms())
def test_calls_hold_consecutive_responses_in_whatever_order_they_end(count: int, batch: int, draw: Any) -> None:
    """And a plain function is called once, with all of them, in the thread that asks for the scores."""
    calls: list[tuple[list[str], list[int], list[str]]] = []
    whole: list[tuple[list[str], threading.Thread]] = []

    async def judge(prompts: list[str], responses: list[str], answer: list[int]) -> list[float | None]:
        calls.append((prompts, answer, responses))
        return [None if number % 3 == 2 else 10.0 * number for number in answer]

    def plain(prompts: list[str], responses: list[str]) -> list[float]:
        whole.append((responses, threading.current_thread()))
        return length(prompts, responses)

    records = read_prompts([{"prompt": f"p{i}", "answer": i} for i in range(count)])
    texts = ["x" * i for i in range(count)]
    scoring = resolved([(1.0, plain), (0.5, judge)], batch=batch).start(records)
    for i in draw.sample(range(count), count):
        scoring.finished(i, texts[i])
    found = scoring.result()
    assert found.scores == [i + (0.0 if i % 3 == 2 else 5.0 * i) for i in range(count)]
    numbers = [list(range(first, min(first + batch, count))) for first in range(0, count, batch)]
    assert sorted(calls) == sorted(
        ([f"p{i}" for i in each], each, [texts[i] for i in each]) for each in numbers
    )  # columns too
    assert whole == [(texts, threading.current_thread())]


def test_without_a_batch_an_async_function_sees_all_responses_at_once() -> None:
    seen: list[list[str]] = []

    async def rank(prompts: list[str], responses: list[str]) -> list[float]:
        seen.append(responses)
        return [float(sorted(responses).index(response)) for response in responses]

    records = read_prompts([{"prompt": "p"}] * 3)
    scoring = resolved(rank).start(records)
    for i in (2, 0):
        scoring.finished(i, "bca"[i])
    assert seen == []
    scoring.finished(1, "c")
    assert scoring.result().scores == [1.0, 2.0, 0.0] and seen == [["b", "c", "a"]]


def test_a_batch_is_refused_where_nothing_heeds_it() -> None:
    with pytest.raises(
        ValueError, match=r"ppo\.reward_batch: 4, but the reward is neither a URL nor an async function"
    ):
        resolved([(1.0, length), (1.0, "rule:length:2")], batch=4)


def test_an_optional_column_is_looked_for_in_all_rows_not_in_those_of_a_call() -> None:
    async def judge(prompts: list[str], responses: list[str], answer: Any = "nothing") -> list[float]:
        return [1.0 if each is None else 2.0 for each in answer]

    without, with_it = read_prompts([{"prompt": "a"}, {"prompt": "b", "answer": "1"}])
    with pytest.raises(ValueError, match="asks for the column 'answer', which is not there"):
        resolved(judge, batch=1).start([without, with_it])
    assert resolved(judge, batch=1)([with_it, with_it], ["", ""]).scores == [2.0, 2.0]


def test_the_first_failure_in_the_order_of_responses_is_raised() -> None:
    async def judge(prompts: list[str], responses: list[str]) -> list[float]:
        if responses[0] != "2":
            raise ConnectionError(responses[0])
        return [1.0]

    records = read_prompts([{"prompt": "p"}] * 4)
    scoring = resolved(judge, batch=1).start(records)
    for i in (3, 2, 1, 0):
        scoring.finished(i, str(i))
    with pytest.raises(RewardError, match="reward judge: failed once, at last with ConnectionError: 0"):
        scoring.result()


def test_so_many_calls_run_at_a_time_and_those_that_wait_can_be_forgotten() -> None:
    background, release, running = Background(), threading.Event(), threading.Semaphore(0)
    made: list[int] = []

    def call(i: int) -> int:
        made.append(i)
        running.release()
        release.wait(30)
        return i

    futures = [background.submit(lambda i=i: call(i)) for i in range(IN_FLIGHT + 3)]  # type: ignore[misc]
    for _ in range(IN_FLIGHT):
        assert running.acquire(timeout=30)
    assert not running.acquire(timeout=0.05)
    background.forget()
    release.set()
    assert [future.result(30) for future in futures[:IN_FLIGHT]] == list(range(IN_FLIGHT))
    for future in futures[IN_FLIGHT:]:
        with pytest.raises(CancelledError):
            future.result(30)
    assert sorted(made) == list(range(IN_FLIGHT))
    assert background.submit(lambda: "again").result(30) == "again"


def test_what_is_async_is_known_before_it_is_called() -> None:
    class Judge:
        async def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
            return [0.0 for _ in responses]

        async def method(self, prompts: list[str], responses: list[str]) -> list[float]:
            return [0.0 for _ in responses]

    assert is_async(Judge()) and is_async(Judge().method) and not is_async(length) and not is_async(Judge)


# In PPO --------------------------------------------------------------------------------------------------------------


def trained(folder: Path, out: Path, reward: Any, **options: Any) -> list[dict[str, Any]]:
    """The metrics of a run without times, and its samples."""
    settings: dict[str, Any] = {
        "steps": 2, "prompts_per_step": 3, "samples_per_prompt": 2, "minibatches": 1, "max_new_tokens": 12,
        "lora": LoRAConfig(r=2), **options,
    }  # fmt: skip
    PPOTrainer(folder, reward, [{"prompt": f"q{i}"} for i in range(4)], out, PPOConfig(**settings)).train()
    rows = [json.loads(line) for name in ("metrics", "samples") for line in (out / f"{name}.jsonl").open()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def test_a_response_is_asked_for_while_others_are_sampled(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, missing = threading.Event(), []

    async def judge(prompts: list[Any], responses: list[str]) -> list[float]:
        asked.set()
        return length(prompts, responses)

    finished = Scoring.finished

    def in_sampling(self: Scoring, i: int, response: str) -> None:
        if self.responses.count(None) == 1:  # this one is the last
            missing.append(not asked.wait(30))
            asked.clear()
        finished(self, i, response)

    monkeypatch.setattr(Scoring, "finished", in_sampling)
    trained(tiny_folder, tmp_path, judge, reward_batch=1)
    assert missing == [False, False]


@pytest.mark.parametrize("advantage", ["gae", "remax"])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_does_not_depend_on_when_scores_come(lag: int, advantage: str, tiny_folder: Path, tmp_path: Path) -> None:
    draw = random.Random(0)

    async def late(prompts: list[Any], responses: list[str]) -> list[float]:
        time.sleep(0.02 * draw.random())
        return length(prompts, responses)

    late.__name__ = "length"
    options: dict[str, Any] = {"lag": lag, "advantage": advantage, "steps": 3}
    plain = trained(tiny_folder, tmp_path / "plain", [(1.0, length), (0.5, "rule:length:2")], **options)
    for batch in (None, 1, 4):
        reward = [(1.0, late), (0.5, "rule:length:2")]
        assert trained(tiny_folder, tmp_path / str(batch), reward, reward_batch=batch, **options) == plain
