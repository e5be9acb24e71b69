"""The verb doctor: what this machine has, and whether a run fits into it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from rlhf_fast.config.settings import ConfigError


@dataclass(frozen=True)
class DoctorCommand:
    """Say what this machine has and what is missing; with --config, whether a run fits into its memory.

    The file is that of a run, as `rlhf-fast sft|reward|dpo|ppo --config` takes it. Nothing is loaded: what each part
    takes is counted from shapes, phase by phase, with micro-batches as full as the settings let them be. If it is more
    than there is, the exit code is 1, and what to change is listed, the least harmful first (docs/cost.md).

      rlhf-fast doctor --config runs/ppo/config.yaml
      rlhf-fast doctor --config examples/7b/ppo.yaml --model examples/7b --device cuda --memory 80GB --price 3
    """

    config: str = ""  # YAML of a run; empty: only what this machine has
    model: str = ""  # folder with the config.json of the model, in place of those that the file names
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where it is to run; auto: what is here
    memory: str = ""  # of the device, such as 80GB or 24GiB; empty: what is free here
    price: float | None = None  # dollars an hour; with it, the hours and dollars that the run takes
    tflops: float = 989.0  # 10^12 operations a second that the device can do; the default is an H100 in bfloat16
    bandwidth: float = 3.35  # 10^12 bytes a second that it can read
    utilisation: float = 0.4  # share of both that the run reaches
    sequences: int = 10_000  # demonstrations or comparisons, for the hours; of PPO the file says it
    prompt_tokens: int = 256  # of one, on average
    response_tokens: int = 256  # of one response, on average
    json: bool = False  # for programs: one JSON object

    def __post_init__(self) -> None:
        for name in ("tflops", "bandwidth", "utilisation", "sequences", "prompt_tokens", "response_tokens"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)}; expected more than 0")
        if self.price is not None and not 0 <= self.price < float("inf"):
            raise ValueError(f"price: {self.price}; expected dollars an hour")


def diagnose(command: DoctorCommand) -> None:
    if not command.config:
        _require_nothing_else(command)
        from rlhf_fast import doctor

        doctor.main()
        return
    from rlhf_fast.planning import cost, forecast

    run = forecast.read_run(Path(command.config), command.model)
    device, memory = forecast.device_and_memory(command.device, command.memory)
    if sys.stderr.isatty():
        print(f"{command.config}: counting; billions of weights take some ten seconds", file=sys.stderr)
    predicted = forecast.forecast(run, device, memory)
    hours: dict[str, float] = {}
    if command.price is not None:
        data = cost.Data(command.sequences, command.prompt_tokens, command.response_tokens)
        hours = forecast.hours(run, data, cost.Machine(command.tflops, command.bandwidth, command.utilisation))
    if command.json:
        price = {"hours": hours, "dollars": sum(hours.values()) * (command.price or 0.0)} if hours else {}
        print(json.dumps({**forecast.as_dict(predicted), **price}, indent=2))
    else:
        print(forecast.as_text(predicted))
        if command.price is not None:
            print("\n" + forecast.cost_table(hours, command.price))
    if not predicted.fits:
        raise RuntimeError(f"{command.config}: {forecast.refusal(predicted)}")


def _require_nothing_else(command: DoctorCommand) -> None:
    """Refuse settings that would be ignored, as they are of a run."""
    given = [item.name for item in fields(command) if getattr(command, item.name) != item.default]
    if given:
        raise ConfigError(
            f"--{given[0]} is about a run, which --config FILE.yaml names; without it doctor only says what this "
            "machine has"
        )
