"""Runs shown elsewhere, if asked for: TensorBoard, Weights & Biases, trackio. metrics.jsonl is written in any case."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Protocol

import yaml

PROJECT = "rlhf-fast"


class Tracker(Protocol):
    """Protocol of a service that shows runs: metrics and samples by step."""

    def log(self, step: int, row: dict[str, float]) -> None: ...
    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...
    def close(self) -> None: ...


def open_trackers(names: tuple[str, ...], path: Path, config_yaml: str) -> list[Tracker]:
    """Open the trackers named, of tensorboard, wandb and trackio, for the run in `path`; an interrupted run goes on.

    Raises:
        ModuleNotFoundError: one that is not installed; says how to install it.
    """
    makers: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Hosted, "trackio": _Hosted}
    return [makers[name](name, path, config_yaml) for name in names]


def require_trackers(names: tuple[str, ...]) -> None:
    """Raise for one that is not installed, without importing any."""
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise _missing(name)


class _TensorBoard:
    def __init__(self, name: str, path: Path, config_yaml: str) -> None:
        self._writer: Any = _module("torch.utils.tensorboard", name).SummaryWriter(str(path / "tensorboard"))
        self._writer.add_text("config", _code(config_yaml))

    def log(self, step: int, row: dict[str, float]) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        text = "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows)
        self._writer.add_text("samples", _code(text), step)

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """wandb, or trackio, which has the same functions."""

    def __init__(self, name: str, path: Path, config_yaml: str) -> None:
        self._module: Any = _module(name, name)
        where = {"dir": str(path), "id": _identifier(path)} if name == "wandb" else {}
        self._run = self._module.init(
            project=PROJECT, name=path.name, config=yaml.safe_load(config_yaml) or {}, resume="allow", **where
        )

    def log(self, step: int, row: dict[str, float]) -> None:
        self._module.log(row, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = list(rows[0])
        data = [[row.get(column) for column in columns] for row in rows]
        self._module.log({"samples": self._module.Table(columns=columns, data=data)}, step=step)

    def close(self) -> None:
        self._module.finish()


def _identifier(path: Path) -> str:
    """Identify a run for a tracker: the same when the run goes on, another for a new run in the same folder."""
    file = path / "wandb_id"
    if not file.exists():
        import uuid

        file.write_text(uuid.uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(package) from error


def _missing(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"run.trackers: {package} is not installed; pip install {package}")


def _code(text: str) -> str:
    """Quote a text as Markdown that shows it as it is, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())
