"""A run's folder: config.yaml, metrics.jsonl, samples.jsonl, skipped.jsonl, checkpoints/step-N and, once it is
finished, result.json.

`result.json` is written last and at once, so a folder is finished exactly when it is there. An unfinished run goes on
from its state/, if a trainer has kept one there, and otherwise starts over: what it had written is cleared.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast import settings
from rlhf_fast.files import append_line, restore_folder, write_atomic
from rlhf_fast.trackers import Tracker, open_trackers

GROWING = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl")
PATIENCE = ("ppo.reward_timeout", "ppo.reward_retries")  # decide nothing but whether a run goes on


class RunFolder:
    """Writes one run. Create it when everything has been checked: it clears an unfinished run of the same folder."""

    def __init__(self, path: str | Path, phase: str, config_yaml: str, trackers: tuple[str, ...] = ()) -> None:
        self.path, self.phase = Path(path), phase
        if is_finished(self.path):
            raise FileExistsError(f"{self.path} holds a finished run; choose another --out, or remove it first")
        earlier = [self.path / name for name in (*GROWING, "checkpoints")]
        if not (self.path / "config.yaml").exists() and (strange := [file for file in earlier if file.exists()]):
            raise FileExistsError(f"{strange[0]} is there without a config.yaml of a run; choose another --out")
        self.state = self.path / "state"
        restore_folder(self.state)
        self.resumes = (self.state / "state.json").exists()
        if self.resumes:
            before = (self.path / "config.yaml").read_text(encoding="utf-8")
            if changed := settings.changes(before, config_yaml, but=PATIENCE):
                raise ValueError(
                    f"{self.path} holds a run that was interrupted with other settings ({changed}); go on with the "
                    "same ones, or choose another --out"
                )
        else:
            for file in (*earlier, self.state, self.path / "wandb_id"):
                _remove(file)
        write_atomic(self.path / "config.yaml", config_yaml)
        self.trackers: list[Tracker] = open_trackers(trackers, self.path, config_yaml)
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Since the run began, without the time in which it was interrupted."""
        return time.monotonic() - self.started

    def sizes(self) -> dict[str, int]:
        """How long the growing files are."""
        files = [self.path / name for name in GROWING]
        return {file.name: file.stat().st_size for file in files if file.exists()}

    def rewind(self, sizes: dict[str, int], seconds: float) -> None:
        """Cut the growing files back to these sizes, and go on counting from so many seconds."""
        for name in GROWING:
            if (self.path / name).exists():
                os.truncate(self.path / name, sizes.get(name, 0))
        self.started = time.monotonic() - seconds

    def log(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, with the seconds since the start."""
        elapsed = round(self.seconds(), 3)
        append_line(self.path / "metrics.jsonl", {**_finite(row), "seconds": elapsed})
        for tracker in self.trackers:
            tracker.log(row["step"], {key: value for key, value in row.items() if key != "step"})

    def sample(self, row: dict[str, Any]) -> None:
        """One line of samples.jsonl."""
        append_line(self.path / "samples.jsonl", _finite(row))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """What the model said at a step."""
        for row in rows:
            self.sample({"step": step, **row})
        for tracker in self.trackers:
            tracker.samples(step, rows)

    def skip(self, row: dict[str, Any]) -> None:
        """A batch that nothing could be learned from: one line of skipped.jsonl."""
        append_line(self.path / "skipped.jsonl", _finite(row))

    def checkpoint(self, step: int) -> Path:
        """The folder that a checkpoint of `step` goes to (`models.save` writes it aside and renames it)."""
        return self.path / "checkpoints" / f"step-{step}"

    def finish(self, summary: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """Mark the run as finished, name the step whose checkpoint is its outcome, and say what it cost."""
        for tracker in self.trackers:
            tracker.close()
        result = {
            "phase": self.phase,
            **({} if step is None else {"checkpoint": self.checkpoint(step).name}),
            "seconds": round(self.seconds(), 1),
            "peak_rss_gb": round(peak_rss_gb(), 3),
            "summary": _finite(summary),
        }
        write_atomic(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        _remove(self.state)
        return result


def interrupted_settings(path: Path) -> dict[str, Any]:
    """The settings, by dotted keys, of a run in this folder that is not finished; empty if there is none."""
    try:
        found = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {} if is_finished(path) or not isinstance(found, dict) else settings.flatten(found)


def is_finished(path: Path) -> bool:
    return (path / "result.json").exists()


def read_result(path: Path) -> dict[str, Any]:
    """What a finished run wrote as its result."""
    result: dict[str, Any] = json.loads((path / "result.json").read_text(encoding="utf-8"))
    return result


def peak_rss_gb() -> float:
    """The most memory this process has held so far, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # bytes there, KiB on Linux


def _finite(value: Any) -> Any:
    """`value` with NaN and infinity as null, at any depth: they are not JSON."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
