"""State that an interrupted run goes on from: weights, optimiser, schedule, step; kept now and then, whole or not.

All that is random in a trainer is drawn anew from (seed, step), and no response depends on what was sampled before it.
So these alone decide how a run goes on: to the bit as if it had not been interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_fast.models.fingerprint import fingerprint
from rlhf_fast.runs.files import write_folder_atomic
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.optimizer import Optimizer

EVERY = 60.0  # seconds from one time to the next, at least
MOST = 0.05  # share of the time that keeping may take
FIELDS = "fields:"  # begins a digest of records by their fields


class Stateful(Protocol):
    """Protocol of an object whose state can be kept as JSON and restored."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Interrupt of a run by a signal, after its state was kept; says at which step, and how to go on."""


class TrainState:
    """Keeps the state of a run while it is the context, and brings it back. SIGTERM and Ctrl-C then end the run after
    its step; a second Ctrl-C ends it at once, and what was kept last is what it goes on from.

    Args:
        identity: what must be the same for a run to go on, by name: its data, and a hash of its first weights.
        stateful: what else must come back, by name.
    """

    def __init__(
        self, run: RunFolder, optimizer: Optimizer, identity: dict[str, str | Data], stateful: Mapping[str, Stateful]
    ) -> None:
        self.run, self.optimizer, self.identity, self.stateful = run, optimizer, identity, stateful
        self._kept, self._cost = time.monotonic(), 0.0
        self.step = 0  # that was kept last
        self._ending = ""  # the signal that ends the run after its step
        self._before: dict[int, Any] = {}  # what was done at a signal

    def load(self) -> int:
        """Restore the kept state; return the step that it is of, 0 where there is none.

        Raises:
            ValueError: something that must be the same has changed; names it.
        """
        if not self.run.resumes:
            return 0
        kept = json.loads((self.run.state / "state.json").read_text(encoding="utf-8"))
        changed = [name for name, value in kept["identity"].items() if not self._is_still(name, value)]
        if changed:
            raise ValueError(
                f"{self.run.path}: the {' and the '.join(changed)} changed since this run was interrupted; "
                "put back what it was to go on, or choose another --out"
            )
        if missing := [name for name in kept["stateful"] if name not in self.stateful]:
            raise ValueError(
                f"{self.run.path}: this run was interrupted with {' and '.join(missing)}; put back what it was to go "
                "on, or choose another --out"
            )
        self._set(load_file(self.run.state / "state.safetensors", device="cpu"))
        self.optimizer.steps, self.optimizer.skipped = kept["optimizer_steps"], kept["skipped"]
        for name, state in kept["stateful"].items():
            self.stateful[name].load_state_dict(state)
        self.run.rewind(kept["files"], kept["seconds"])
        self.step = int(kept["step"])
        return self.step

    def _is_still(self, name: str, kept: str) -> bool:
        value = self.identity.get(name)
        return value.kept_as(kept) if isinstance(value, Data) else value == kept

    def after(self, step: int) -> None:
        """Keep the state after a step, if that is due or the run is to end here."""
        since = time.monotonic() - self._kept
        if self._ending or since >= max(EVERY, self._cost / MOST):
            started = time.monotonic()
            self._keep(step)
            self._kept = time.monotonic()
            self._cost = self._kept - started
        self.end_if_told()

    def end_if_told(self) -> None:
        """End the run here, if a signal asked for it.

        Raises:
            Interrupted: after Ctrl-C.
            SystemExit: after SIGTERM, with the code that says so.
        """
        if not self._ending:
            return
        at = f"after step {self.step}" if self.step else "before its first step"
        said = f"{self.run.path}: ended {at} by {self._ending}; the same command goes on from there"
        if self._ending == "Ctrl-C":
            raise Interrupted(said)
        print(said, file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)

    def _keep(self, step: int) -> None:
        state = {
            "step": step,
            "identity": {n: x.digest if isinstance(x, Data) else x for n, x in self.identity.items()},
            "optimizer_steps": self.optimizer.steps,
            "skipped": self.optimizer.skipped,
            "stateful": {name: each.state_dict() for name, each in self.stateful.items()},
            "files": self.run.sizes(),
            "seconds": self.run.seconds(),
        }

        def fill(folder: Path) -> None:
            save_file(self._tensors(), folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

        write_folder_atomic(self.run.state, fill)
        self.step = step

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for i, parameter in enumerate(self.optimizer.masters):
            tensors[f"{i}.weight"] = parameter.detach().contiguous()
            for name, value in self.optimizer.adam.state.get(parameter, {}).items():
                tensors[f"{i}.{name}"] = value.contiguous()
        return tensors

    @torch.no_grad()
    def _set(self, tensors: dict[str, torch.Tensor]) -> None:
        of: dict[str, dict[str, torch.Tensor]] = {}  # by parameter
        for key, value in tensors.items():
            number, _, name = key.partition(".")
            of.setdefault(number, {})[name] = value
        for i, parameter in enumerate(self.optimizer.masters):
            mine = of.get(str(i), {})
            weight = mine.pop("weight", None)
            if weight is None or weight.shape != parameter.shape:
                raise ValueError(f"{self.run.state}: holds the state of another model; choose another --out")
            parameter.copy_(weight)
            # Adam counts its steps on the CPU whatever device the weights are on.
            self.optimizer.adam.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device) for name, value in mine.items()
            }
        self.optimizer.show()

    def __enter__(self) -> TrainState:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            at = f"goes on from step {self.step}" if self.step else "starts over, as no step was kept yet"
            raise Interrupted(f"{self.run.path}: stopped at once; the same command {at}") from error

    def _end(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self._ending:
            raise KeyboardInterrupt
        self._ending = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        # Not by print, in the middle of which the signal may have come.
        os.write(2, f"\n{self.run.path}: ending after this step; Ctrl-C ends it at once\n".encode())


class Data:
    """Records that a run trains on, with the digest by which an interrupted run knows them again.

    Fields at their defaults are left out, so that a field which a later version adds changes no digest.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    @functools.cached_property
    def digest(self) -> str:
        return FIELDS + _hashed(map(_told, self.items))

    def kept_as(self, kept: str) -> bool:
        """Return whether these records are those of a digest, which earlier versions made of their reprs."""
        return kept == (self.digest if kept.startswith(FIELDS) else _hashed(map(repr, self.items)))


def _told(item: Any) -> str:
    """Write all that a record holds, the same in every process."""
    try:
        return json.dumps(item, default=_fields)
    except (TypeError, ValueError):  # keys that JSON has not, or something within itself
        return _without_address(item)


def _without_address(item: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(item))


def _fields(item: Any) -> Any:
    """Convert values that JSON does not know."""
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        return _without_address(item)
    telling = [field for field in dataclasses.fields(item) if field.repr]
    values = {field.name: getattr(item, field.name) for field in telling}
    return {field.name: values[field.name] for field in telling if values[field.name] != _default(field)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _hashed(texts: Iterable[str]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for text in texts:
        state.update(text.encode())
    return state.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Digest a model's weights, with their names, shapes and dtypes."""
    described = [*((name, x.shape, x.dtype) for name, x in model.named_parameters()), fingerprint(model)]
    return _hashed(map(repr, described))
