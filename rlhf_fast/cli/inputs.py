"""Checks of what a verb is given, made before anything heavy is imported or loaded."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from rlhf_fast.rewards import names as reward_names
from rlhf_fast.runs import model_names


def check(
    model: dict[str, str] | None = None, file: dict[str, str] | None = None, reward: dict[str, str] | None = None
) -> None:
    """Refuse names by setting: {"policy": "runs/none"} as a model, {"data": "none.jsonl"} as a file that is read, or
    {"reward": "runs/sft"} as a reward.

    Raises:
        FileNotFoundError, ValueError: the first that is wrong, by its setting.
    """
    for setting, name in (file or {}).items():
        _require_file(name, setting)
    for setting, name in (model or {}).items():
        model_names.check(name, setting)
    for setting, name in (reward or {}).items():
        reward_names.check(name, setting)


def _require_file(name: str, setting: str) -> None:
    path = Path(name)
    if path.is_dir():
        raise FileNotFoundError(f"{setting}: {name} is a folder; expected a file, a JSON object a line{_has(path)}")
    if not path.exists():
        parent = path.absolute().parent
        if not parent.is_dir():
            hub = (
                ""
                if path.suffix or path.is_absolute() or len(path.parts) != 2
                else (
                    "; if it is a dataset of a hub, write it into a file: "
                    f"datasets.load_dataset({name!r}, split='train').to_json('data.jsonl')"
                )
            )
            raise FileNotFoundError(f"{setting}: there is no file {name} (nor the folder {path.parent}){hub}")
        near = difflib.get_close_matches(path.name, _files(parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"{setting}: there is no file {name}{hint}")


def require_free(name: str, setting: str) -> None:
    """Refuse a file that cannot be written when the work is done, or that would be lost.

    Raises:
        OSError: by its setting.
    """
    path = Path(name)
    if path.is_dir():
        raise IsADirectoryError(f"{setting}: {name} is a folder; expected a file, such as {path / 'answers.jsonl'}")
    if path.exists():
        raise FileExistsError(f"{setting}: {name} is there already; choose another name, or remove it first")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{setting}: {name} cannot be written, for {parent} takes no files; choose another place")


def _has(folder: Path) -> str:
    of_runs = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl", "monitors.jsonl")
    names = [name for name in _files(folder) if name.endswith((".jsonl", ".jsonl.gz")) and name not in of_runs]
    return f", such as {folder / names[0]}" if names else ""


def _files(folder: Path) -> list[str]:
    try:
        return sorted(child.name for child in folder.iterdir() if child.is_file())
    except OSError:
        return []
