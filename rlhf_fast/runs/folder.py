"""Folder of a run: run.json, config.yaml, metrics.jsonl, samples.jsonl, skipped.jsonl, monitors.jsonl,
checkpoints/step-N and, once it is finished, result.json.

`run.json` is written first: it says whose the folder is, and is locked while a process writes there (claim.py).
`result.json` is written last and at once, so a folder is finished exactly when it is there. An unfinished run goes on
from its state/, if a trainer has kept one there, and otherwise starts over. Nothing that the run did not write is
written over or removed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, settings
from rlhf_fast.runs.claim import Claim, check_claim, refuse_foreign
from rlhf_fast.runs.files import append_line, restore_folder, whole_lines, write_atomic
from rlhf_fast.runs.trackers import Tracker, open_trackers, require_trackers

GROWING = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl", "monitors.jsonl")
PATIENCE = ("ppo.reward_timeout", "ppo.reward_retries")  # decide nothing but whether a run goes on
WRITTEN = "checkpoints.jsonl"  # which checkpoints the run has written, and the files of each


class RunFolder:
    """Writes one run, and holds its folder until it is finished or closed.

    Raises:
        FileExistsError: something else is there, or it is in use; says what, and changes nothing.
        ValueError: the run that is there was begun with other settings; lists them.
    """

    def __init__(self, path: str | Path, phase: str, config_yaml: str, trackers: tuple[str, ...] = ()) -> None:
        self.path, self.phase = Path(path), phase
        check_folder(path, phase, config_yaml, trackers)
        self._claim = Claim(self.path, phase)
        try:
            _refuse_finished(self.path)  # since it was looked at
            _refuse_other(self.path, config_yaml)
            self.state = self.path / "state"
            restore_folder(self.state)
            self.resumes = (self.state / "state.json").exists()
            if not self.resumes:
                for name in (*GROWING, "wandb_id"):
                    (self.path / name).unlink(missing_ok=True)
            write_atomic(self.path / "config.yaml", config_yaml)
            self.trackers: list[Tracker] = open_trackers(trackers, self.path, config_yaml)
        except BaseException:
            self._claim.close()
            raise
        self.started = time.monotonic()
        self.shown: tuple[int, list[dict[str, Any]]] = (0, [])  # the last step of which there were samples, and these

    def close(self) -> None:
        """Release the folder, for another process to go on with."""
        self._claim.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def seconds(self) -> float:
        """Return the seconds since the run began, without the time in which it was interrupted."""
        return time.monotonic() - self.started

    def sizes(self) -> dict[str, int]:
        """Return how long the growing files are."""
        files = [self.path / name for name in GROWING]
        return {file.name: file.stat().st_size for file in files if file.exists()}

    def rewind(self, sizes: dict[str, int], seconds: float) -> None:
        """Cut the growing files back to these sizes, remove those that have none as they began later, and go on
        counting from so many seconds."""
        for name in GROWING:
            if name not in sizes:
                (self.path / name).unlink(missing_ok=True)
            elif (self.path / name).exists():
                os.truncate(self.path / name, sizes[name])
        self.started = time.monotonic() - seconds

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, with the seconds since the start."""
        elapsed = round(self.seconds(), 3)
        append_line(self.path / "metrics.jsonl", {**_finite(row), "seconds": elapsed})
        for tracker in self.trackers:
            tracker.log(row["step"], {key: value for key, value in row.items() if key != "step"})

    def sample(self, row: dict[str, Any]) -> None:
        """Append one line to samples.jsonl."""
        append_line(self.path / "samples.jsonl", _finite(row))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append what the model said at a step."""
        self.shown = (step, rows)
        for row in rows:
            self.sample({"step": step, **row})
        for tracker in self.trackers:
            tracker.samples(step, rows)

    def skip(self, row: dict[str, Any]) -> None:
        """A batch that nothing could be learned from: one line of skipped.jsonl."""
        append_line(self.path / "skipped.jsonl", _finite(row))

    def answer(self, row: dict[str, Any]) -> None:
        """Append what a monitor said of a step: one line of monitors.jsonl."""
        append_line(self.path / "monitors.jsonl", _finite(row))

    def before(self, names: Iterable[str]) -> dict[str, float]:
        """The first value of each of these metrics, as NAME_before."""
        first: dict[str, float] = {}
        for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            first = {**{name: row[name] for name in names if row.get(name) is not None}, **first}
            if all(name in first for name in names):
                break
        return {f"{name}_before": value for name, value in first.items()}

    def checkpoint(self, step: int) -> Path:
        """The folder that a checkpoint of `step` goes to (`models.save` writes it aside and renames it)."""
        return self.path / "checkpoints" / f"step-{step}"

    def will_write(self, step: int) -> Path:
        """Note that this run writes the checkpoint of `step`, before it does; returns its folder."""
        append_line(self.path / WRITTEN, {"step": step})
        return self.checkpoint(step)

    def has_written(self, step: int) -> None:
        """Note which files the checkpoint of `step` has."""
        folder = self.checkpoint(step)
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        append_line(self.path / WRITTEN, {"step": step, "files": files})

    def written(self) -> list[int]:
        """The steps whose checkpoints this run has written, those that it has removed again too."""
        return [*_written(self.path)]

    def forget(self, step: int) -> None:
        """Remove a checkpoint, but nothing that somebody put beside its files."""
        folder = self.checkpoint(step)
        if foreign := _foreign(self.path, step):
            for name in set(_names(folder)) - set(foreign):
                (folder / name).unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)

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
        shutil.rmtree(self.state, ignore_errors=True)
        self.close()
        return result


def check_folder(
    path: str | Path, phase: str, config_yaml: str, trackers: tuple[str, ...] = (), but: Collection[str] = ()
) -> None:
    """Raise what `RunFolder` would raise, and change nothing: before a model is loaded.

    Args:
        but: settings that may differ from those of the run that was begun there, as they are not known yet.
    """
    check_place(path, phase, trackers)
    _refuse_other(Path(path), config_yaml, but)


def check_place(path: str | Path, phase: str, trackers: tuple[str, ...] = ()) -> None:
    """Raise if no run of `phase` can be in this folder, or be shown by these trackers, whatever its settings."""
    path = Path(path)
    refuse_foreign(path)
    _refuse_finished(path)
    check_claim(path, phase)
    require_trackers(trackers)


def _refuse_finished(path: Path) -> None:
    if is_finished(path):
        raise FileExistsError(f"{path} holds a finished run; choose another --out, or remove it first")


def _refuse_other(path: Path, config_yaml: str, but: Collection[str] = ()) -> None:
    """Raise if the run in a folder is another one than that of these settings, or not all is this run's own."""
    config = path / "config.yaml"
    if not config.exists():
        if left := [name for name in (*GROWING, "state", "checkpoints") if (path / name).exists()]:
            raise FileExistsError(f"{path / left[0]} is there without the config.yaml of its run; choose another --out")
        return
    before = config.read_text(encoding="utf-8")
    if changed := settings.changes(before, config_yaml, but=(*PATIENCE, *but), defaults=_defaults()):
        raise ValueError(
            f"{path} holds a run that was interrupted with other settings ({changed}); go on with the same ones, or "
            "choose another --out"
        )
    for folder in (path / "checkpoints").glob("step-*"):
        step = folder.name.removeprefix("step-")
        if step.isdigit() and (foreign := _foreign(path, int(step))):
            raise FileExistsError(
                f"{folder / foreign[0]} is there, and this run did not write it; move it out of {path / 'checkpoints'}"
            )


@functools.cache
def _defaults() -> dict[str, Any]:
    """Return every trainer's default settings, by dotted keys."""
    phases = {"sft": SFTConfig(), "reward": RewardConfig(), "dpo": DPOConfig(), "ppo": PPOConfig()}
    return settings.flatten({phase: settings.to_dict(config) for phase, config in phases.items()})


def _names(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()]


def _written(path: Path) -> dict[int, list[str] | None]:
    """The steps whose checkpoints the run in `path` has written, with the files of each; None where it may have been
    killed before it could note them, so that all that is there is its own."""
    file = path / WRITTEN
    rows = map(json.loads, whole_lines(file))
    return {row["step"]: row.get("files") for row in rows}


def _foreign(path: Path, step: int) -> list[str]:
    """List what is in the folder of a checkpoint, but was not written by the run in `path`."""
    written, names = _written(path), sorted(_names(path / "checkpoints" / f"step-{step}"))
    if step not in written:
        return names or ["."]
    own = written[step]
    return [] if own is None else [name for name in names if name not in own]


def interrupted_settings(path: Path) -> dict[str, Any]:
    """The settings, by dotted keys, of a run in this folder that is not finished; empty if there is none."""
    try:
        content = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {} if is_finished(path) or not isinstance(content, dict) else settings.flatten(content)


def is_finished(path: Path) -> bool:
    return (path / "result.json").exists()


class PageError(RuntimeError):
    """Failure to write the page of a finished run, of which nothing else is lost; its cause is what went wrong."""

    def __init__(self, run: Path, write: Callable[..., Any], cause: Exception) -> None:
        code = f"from {write.__module__} import {write.__name__} as write; write({str(run)!r})"
        self.kept = f"{run}: the run is done and its results are kept, but its page, report.html, could not be written"
        self.remedy = f"python -c {shlex.quote(code)} writes it"
        super().__init__(f"{self.kept} ({type(cause).__name__}: {cause}); {self.remedy}")


@contextlib.contextmanager
def page_of(run: Path, write: Callable[..., Any]) -> Iterator[None]:
    """Let an error of `write`, which makes the page of a finished run, say that the run is whole, and what to do."""
    try:
        yield
    except Exception as error:
        raise PageError(run, write, error) from error


def read_result(path: Path) -> dict[str, Any]:
    """Read what a finished run wrote as its result."""
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
