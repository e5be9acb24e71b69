"""Calling what somebody else wrote for a reward: with the columns it asks for, within a time, again when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from rlhf_fast.data.records import PromptRecord, RecordError
from rlhf_fast.rewards.names import place_in

Result = TypeVar("Result")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two calls: doubled each time
GRACE = 5.0  # seconds that an async function has to end once it is cancelled


class RewardError(RuntimeError):
    """A score could not be had; the message says from whom, after how many calls, and what to do."""


# Columns -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wants:
    """The columns of the prompts' rows that a reward function asks for, by the names of its parameters."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # those with a default
    others: bool = False  # all there are, by **columns
    taken: tuple[str, ...] = ()  # the names of its first two parameters

    def of(self, records: Sequence[PromptRecord], who: str) -> dict[str, list[Any]]:
        """The columns as lists in the order of the records.

        Raises:
            RecordError: a row lacks a column that is required, or that other rows have.
        """
        names = list(self.required)
        names += [name for name in self.optional if any(name in record.columns for record in records)]
        for record in records:
            for name in names:
                if name not in record.columns:
                    raise RecordError(
                        f"{record.name or 'a prompt'}: reward {who} asks for the column {name!r}, which is not there; "
                        f"the row has {', '.join(map(repr, record.columns)) or 'only a prompt'}"
                    )
        if self.others:
            rest = dict.fromkeys(name for record in records for name in record.columns)
            names += [name for name in rest if name not in (*names, *self.taken)]
        return {name: [record.columns.get(name) for record in records] for name in names}


def wants(function: Callable[..., Any], who: str) -> Wants:
    """Find what the parameters of `function` after (prompts, responses) ask for.

    Raises:
        TypeError: it does not take prompts and responses first.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some that are written in C do not say
        return Wants()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    first = [p.name for p in plain[:2]]
    if (len(first) < 2 and not takes_any) or first[:1] in (["responses"], ["completions"]):
        raise TypeError(
            f"reward {who}: its parameters are ({', '.join(p.name for p in parameters)}); it is called with "
            "(prompts, responses), and with columns of the prompts by the names of further parameters"
        )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in first]
    return Wants(
        required=tuple(p.name for p in named if p.default is p.empty),
        optional=tuple(p.name for p in named if p.default is not p.empty),
        others=any(p.kind is p.VAR_KEYWORD for p in parameters),
        taken=tuple(first),
    )


# Calls ---------------------------------------------------------------------------------------------------------------


def patient(function: Callable[..., Any], who: str, timeout: float | None, retries: int) -> Callable[..., Any]:
    """`function` within a time and with retries; an async one is waited for."""

    def call(prompts: list[Any], responses: list[str], **columns: list[Any]) -> Any:
        def once() -> Any:
            # Copies, so that a function which sorts or pops what it gets changes nothing here.
            given = {name: list(values) for name, values in columns.items()}
            with _time_limit(timeout):
                result = function(list(prompts), list(responses), **given)
            return _awaited(result, timeout, who) if inspect.isawaitable(result) else result

        def where(error: BaseException) -> str:
            return place_in(error, function)

        advice = "mend the function, or allow more by ppo.reward_timeout and ppo.reward_retries"
        return with_retries(once, who, retries, advice, where=where)

    return call


def with_retries(
    once: Callable[[], Result],
    who: str,
    retries: int,
    advice: str,
    on: type[Exception] = Exception,
    where: Callable[[BaseException], str] = lambda error: "",
) -> Result:
    """Return what `once` returns; call it again after a pause while it raises `on`, up to `retries` times; `where` says
    where an error came up.

    A RewardError is final. An error with a `pause` (seconds) is waited for at least so long.

    Raises:
        RewardError: from the last error.
    """
    for attempt in range(1, retries + 2):
        try:
            return once()
        except RewardError:
            raise
        except on as error:
            what = _short(error) + where(error)
            if attempt > retries:
                times = "once" if attempt == 1 else f"{attempt} times"
                raise RewardError(f"reward {who}: failed {times}, at last with {what}; {advice}") from error
            pause = max(FIRST_PAUSE * 2 ** (attempt - 1), getattr(error, "pause", 0.0))
            pause = min(LONGEST_PAUSE, pause)
            tqdm.write(f"reward {who}: {what}; call {attempt + 1} of {retries + 1} in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    raise AssertionError("not reached: the last attempt returns or raises")


class _OutOfTime(BaseException):
    """Raised into a function that takes too long; no Exception, so that its own `except` does not catch it."""


@contextlib.contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in what runs inside when it takes longer.

    By an alarm, which stops waiting and loops alike and leaves the function in the thread that it is called in, where
    checkers with alarms of their own need to be. In another thread, or while somebody else's alarm is set, there is no
    limit.
    """
    mine = threading.current_thread() is threading.main_thread()
    if seconds is None or not mine or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of all calls, in a thread of its own: the caller may have one running, as notebooks do, and a
    client that a function keeps between calls belongs to the loop of its first."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlhf-fast rewards", daemon=True).start()
    return loop


def _awaited(awaitable: Awaitable[Any], seconds: float | None, who: str) -> Any:
    """The result of an async function, which is cancelled after `seconds`."""

    async def within() -> tuple[bool, Any]:
        task = asyncio.ensure_future(awaitable)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if done:
            return True, task.result()
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE)
        return False, None

    future = asyncio.run_coroutine_threadsafe(within(), _event_loop())
    try:
        answered, result = future.result(None if seconds is None else seconds + 2 * GRACE)
    except BaseException as error:
        if isinstance(error, Exception) and future.done():
            raise  # the function's own
        future.cancel()
        if isinstance(error, Exception):  # it neither answered nor let itself be cancelled
            raise RewardError(
                f"reward {who}: no answer within {seconds:g} s, and it holds up its event loop; await what takes time, "
                "or make it a plain function"
            ) from error
        raise
    if not answered:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return result


def is_async(function: Any) -> bool:
    """Return whether a call of `function` gives something to wait for, as far as that can be seen before it is made."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


# Scores --------------------------------------------------------------------------------------------------------------


def checked(returned: Any, who: str, records: Sequence[PromptRecord], responses: Sequence[str]) -> list[float | None]:
    """Scores as floats, None where there is none.

    Raises:
        ValueError: not as many as there are responses, or one that is no finite number.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned  # tensors and arrays, in one transfer
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__iter__"):
        raise ValueError(f"reward {who}: returned {type(returned).__name__}; expected a list of one score a response")
    values = list(values)
    if len(values) != len(responses):
        raise ValueError(
            f"reward {who}: returned {len(values)} scores for {len(responses)} responses; "
            "return one for each, None for one that it cannot score"
        )
    scores: list[float | None] = []
    for i, value in enumerate(values):
        try:
            score = None if value is None else float("nan" if isinstance(value, str | bytes) else value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if score is not None and not math.isfinite(score):
            raise ValueError(
                f"reward {who}: the score of response {i} is {value!r:.40}, expected a finite number or None; "
                f"it is {responses[i][:80]!r} to {records[i].name or 'a prompt'}"
            )
        scores.append(score)
    return scores


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
