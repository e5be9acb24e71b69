"""Monitors: what looks on while a run trains, and may warn, ask for a checkpoint or end it.

A monitor is any callable that is given a :class:`Step` and returns None, :class:`Warn`, :class:`Save` or :class:`Stop`.
All trainers take some as `monitors=`; they are asked after every step, in order, and each answer is a line of
`monitors.jsonl` in the run's folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.state import Stateful


@dataclass(frozen=True)
class Step:
    """Record of one step of a run, as a monitor sees it: a copy, through which nothing can be changed."""

    phase: str  # sft, reward, dpo or ppo
    step: int  # that was done, from 1
    steps: int  # that the run has
    metrics: dict[str, float]  # of the step, with what was measured on held-out data after it, if anything was
    samples: list[dict[str, Any]]  # that the step added to samples.jsonl
    folder: Path  # of the run
    checkpoints: tuple[int, ...]  # the steps whose checkpoints are there


@dataclass(frozen=True)
class Warn:
    """Show words in the terminal, and go on."""

    words: str


@dataclass(frozen=True)
class Save(Warn):
    """Save a checkpoint of this step, too; it counts among the `run.keep_last` that are kept."""


@dataclass(frozen=True)
class Stop(Warn):
    """End the run after this step, which is evaluated and saved as its last."""


class Monitor(Protocol):
    """A callable that is asked after every step.

    With `state_dict` and `load_state_dict` besides, its state (of what JSON can hold) comes back when the run goes on
    after an interruption.
    """

    def __call__(self, step: Step) -> Warn | None: ...


class Answers(NamedTuple):
    """Answers of all monitors to one step."""

    told: list[str]  # lines for the terminal
    save: bool
    stop: str  # why the run is to end; empty if it is not


class Monitors:
    """The monitors of one run, each by its name: that of its function or class.

    Raises:
        TypeError: one cannot be called, or can keep a state but not take it back; names it.
    """

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        if not isinstance(monitors, Sequence):
            raise TypeError(f"monitors: {monitors!r:.80}; expected a list of monitors")
        self.named: dict[str, Monitor] = {}
        for monitor in monitors:
            name = getattr(monitor, "__name__", None) or type(monitor).__name__
            if not callable(monitor):
                raise TypeError(f"monitors: {monitor!r:.80} ({name}) cannot be called; expected a function of a Step")
            if hasattr(monitor, "state_dict") != hasattr(monitor, "load_state_dict"):
                raise TypeError(f"monitors: {name} has one of state_dict and load_state_dict; expected both or neither")
            same = sum(other.partition(" ")[0] == name for other in self.named)
            self.named[f"{name} {same + 1}" if same else name] = monitor

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Return what must come back when a run goes on, by name."""
        return {f"monitor {name}": _State(name, m) for name, m in self.named.items() if hasattr(m, "state_dict")}

    def after(self, run: RunFolder, n: int, steps: int, row: dict[str, float], checkpoints: Sequence[int]) -> Answers:
        """Ask all monitors about step `n`, in order; the first that ends the run says why.

        Raises:
            RuntimeError: a monitor failed; names it.
            TypeError: a monitor returned something else than an answer; names it.
        """
        told, save, stop = [], False, ""
        samples = run.shown[1] if run.shown[0] == n else []
        for name, monitor in self.named.items():
            step = Step(run.phase, n, steps, {**row}, copy.deepcopy(samples), run.path, tuple(checkpoints))
            try:
                answer = monitor(step)
            except Exception as error:
                kind = type(error).__name__
                raise RuntimeError(f"monitor {name} failed after step {n}: {kind}: {error}") from error
            if answer is None:
                continue
            if not isinstance(answer, Warn):
                raise TypeError(
                    f"monitor {name} returned {answer!r:.80} after step {n}; expected Warn, Save, Stop or None"
                )
            run.answer({"step": n, "monitor": name, "answer": type(answer).__name__.lower(), "words": answer.words})
            if isinstance(answer, Stop):
                stop = stop or answer.words
            else:
                told.append(f"{run.phase}: {name} after step {n}: {answer.words}")
            save = save or isinstance(answer, Save)
        return Answers(told, save, stop)


class _State:
    """The state of one monitor, refused by its name where JSON cannot hold it."""

    def __init__(self, name: str, monitor: Any) -> None:
        self.name, self.monitor = name, monitor
        self.load_state_dict = monitor.load_state_dict

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.monitor.state_dict()
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise TypeError(f"monitor {self.name}: state_dict() returned what JSON cannot hold: {error}") from error
        return state
