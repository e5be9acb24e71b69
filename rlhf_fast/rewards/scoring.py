"""Scores of responses as they come: what waits for somebody else's computer is asked in the background, while others
are sampled or learned from; what computes here, when all are there."""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_fast.data.records import PromptRecord
from rlhf_fast.rewards.calls import Wants, checked

# (prompts, responses, columns by name) -> one score a response, None for one that it cannot score; async too
RewardFunction = Callable[..., Any]
Result = TypeVar("Result")
IN_FLIGHT, THREAD = 8, "rlhf-fast reward"  # calls in the background at a time, and what their threads are called


@dataclass(frozen=True)
class Part:
    """Summand of a reward.

    Without `waits` it may need the main thread (its time limit is an alarm there) or the device that samples, and is
    called with all responses.
    """

    weight: float
    name: str
    function: RewardFunction
    wants: Wants
    waits: bool = False  # for another computer: it is called in a thread
    batch: int | None = None  # responses in a call of one that waits; None: all


@dataclass(frozen=True)
class Scores:
    """Scores of responses, `scores` one each, and by the name of each part of a weighted list what it gave to each."""

    scores: list[float]
    parts: dict[str, list[float | None]]  # unweighted; empty for a reward of one part

    @property
    def means(self) -> dict[str, float]:
        """Average what each part gave; a part that gave nothing is left out."""
        given = {name: [score for score in scores if score is not None] for name, scores in self.parts.items()}
        return {name: math.fsum(scores) / len(scores) for name, scores in given.items() if scores}

    def result(self) -> Scores:
        """Return these scores, as a `Scoring` gives them that has ended."""
        return self


class Background:
    """Calls in threads of their own, the first come first, `IN_FLIGHT` at a time. They do not hold up the end of the
    process, as those of an executor would."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads, self._lock = 0, threading.Lock()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Schedule `call`, and give what it is to return."""
        future: Future[Result] = Future()
        with self._lock:
            self._waiting.append((future, call))
            starts = self._threads < IN_FLIGHT
            self._threads += starts
        if starts:
            threading.Thread(target=self._work, name=THREAD, daemon=True).start()
        return future

    def forget(self) -> None:
        """Cancel the calls that have not begun."""
        with self._lock:
            for future, _ in self._waiting:
                future.cancel()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                future, call = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # it is raised where the result is wanted
                    future.set_exception(error)


class Scoring:
    """Scoring of the responses to `records[i]`, which may end in any order.

    A call holds consecutive responses and is made once all of them have ended, so that what is asked does not depend on
    which ended first.

    Raises:
        RecordError: a row lacks a column that a part asks for.
    """

    def __init__(self, parts: Sequence[Part], records: Sequence[PromptRecord], background: Background) -> None:
        self.parts, self.records, self._background = parts, records, background
        self.responses: list[str | None] = [None] * len(records)
        self._columns = [part.wants.of(records, part.name) for part in parts]
        # Of each part that waits, by the first response of each call.
        self._asked: dict[tuple[int, int], Future[list[float | None]]] = {}

    def finished(self, i: int, response: str) -> None:
        """Response `i` has ended: ask for what can be asked now."""
        self.responses[i] = response
        for number, part in enumerate(self.parts):
            if part.waits:
                size = part.batch or len(self.records)
                which = slice(i // size * size, i // size * size + size)
                if None not in self.responses[which]:
                    self._asked[number, which.start] = self._background.submit(
                        functools.partial(self._call, number, which)
                    )

    def result(self) -> Scores:
        """The sum of all parts, once all responses have ended. A part that gives None to one is left out of its sum.

        Raises:
            RewardError: a part failed, and failed again.
            ValueError: a part gave a wrong number of scores, or one that is not finite, or none gave one to a response.
        """
        here = {n: self._call(n, slice(None)) for n, part in enumerate(self.parts) if not part.waits}
        by_part = [here[n] if n in here else self._answers(n) for n in range(len(self.parts))]
        names = [part.name for part in self.parts]
        return Scores(self._totals(by_part), dict(zip(names, by_part, strict=True)) if len(names) > 1 else {})

    def _answers(self, number: int) -> list[float | None]:
        calls = sorted((first, future) for (part, first), future in self._asked.items() if part == number)
        return [score for _, future in calls for score in future.result()]

    def _call(self, number: int, which: slice) -> list[float | None]:
        part, records, responses = self.parts[number], self.records[which], self.responses[which]
        texts = [response for response in responses if response is not None]
        assert len(texts) == len(records), "scores are asked for before all responses have ended"
        columns = {name: values[which] for name, values in self._columns[number].items()}
        scores = part.function([record.prompt for record in records], texts, **columns)
        return checked(scores, part.name, records, texts)

    def _totals(self, by_part: list[list[float | None]]) -> list[float]:
        totals = []
        for i, row in enumerate(zip(*by_part, strict=True)):
            paid = [part.weight * score for part, score in zip(self.parts, row, strict=True) if score is not None]
            if not paid:
                raise ValueError(
                    f"reward: response {i}, to {self.records[i].name or 'a prompt'}, was scored by none of "
                    f"{', '.join(part.name for part in self.parts)}; at least one must not return None"
                )
            totals.append(math.fsum(paid))
        return totals
