"""Keep the last few checkpoints of a run and the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.config import RunConfig
from rlhf_fast.runs.folder import RunFolder


@dataclass(frozen=True)
class Goal:
    """A metric by which steps are told better from worse."""

    metric: str
    higher: bool  # is better


class Checkpoints:
    """Saves a run's checkpoints, counts how long none was better, and removes those that need not be kept.

    Args:
        save: writes a checkpoint into a folder.
        patience: evaluations in a row that may be no better than the best before them; None: any number.
    """

    def __init__(
        self, run: RunFolder, config: RunConfig, goal: Goal, save: Callable[[Path], None], patience: int | None = None
    ) -> None:
        self.run, self.config, self.goal, self._save, self.patience = run, config, goal, save, patience
        self.best: dict[str, float] = {}  # what was measured after the best step
        self.best_step, self.worse = 0, 0
        self.saved: list[int] = []  # steps, in order; those that this run wrote and has not removed
        self._needed = 0  # the best step of the state that the run would go on from, if it were killed now

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.worse >= self.patience

    def after(self, step: int, row: dict[str, float], save: bool) -> None:
        """Judge a step by its metrics; save it, if that is asked for, now or of all that are judged. Of steps that
        nothing was measured after the last is the best."""
        metric, sign = self.goal.metric, 1.0 if self.goal.higher else -1.0
        if not self.best or metric not in row or sign * row[metric] > sign * self.best[metric]:
            self.best, self.best_step, self.worse = row, step, 0
        else:  # no better, or not a number
            self.worse += 1
        if save or self.config.save_every > 0 or self.patience is not None:
            self.keep(step)

    def keep(self, step: int) -> None:
        """Save a step, and then remove what is neither the best nor among the last, now or in the kept state."""
        self._save(self.run.will_write(step))
        self.run.has_written(step)
        self.saved = [*[at for at in self.saved if at != step], step]
        self._forget_all_but({self._needed, *self._kept()})

    def _kept(self) -> set[int]:
        return {self.best_step, *self.saved[-self.config.keep_last :]}

    def _forget_all_but(self, kept: set[int]) -> None:
        for at in set(self.saved) - kept:
            self.run.forget(at)
        self.saved = [at for at in self.saved if at in kept]

    def outcome(self, last: int, row: dict[str, float]) -> tuple[int, dict[str, float]]:
        """Choose the step whose checkpoint is the outcome, and its metrics: with patience the best, else the last."""
        self._forget_all_but(self._kept())
        for step in set(self.run.written()) - set(self.saved):  # of before a kill; not saved again
            self.run.forget(step)
        return (last, row) if self.patience is None else (self.best_step, self.best)

    def state_dict(self) -> dict[str, Any]:
        self._needed = self.best_step
        return {"best": self.best, "best_step": self.best_step, "worse": self.worse, "saved": self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
        self.saved, self._needed = state["saved"], self.best_step
