"""The command line: one verb a phase, `--config FILE.yaml` and `--key value` over the dataclasses of config.py.

Each file here holds the settings of a few verbs, as dataclasses, and what they do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast import __version__
from rlhf_fast.cli import bench, doctor, evaluate, generate, help, training
from rlhf_fast.config import DemoConfig, tiny_demo
from rlhf_fast.settings import ConfigError, build, nearest


def _demo(command: DemoConfig) -> None:
    from rlhf_fast.pipeline import run_demo

    run_demo(command)


VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoConfig, _demo),
    "sft": (training.SFTCommand, training.sft),
    "reward": (training.RewardCommand, training.reward),
    "dpo": (training.DPOCommand, training.dpo),
    "ppo": (training.PPOCommand, training.ppo),
    "generate": (generate.GenerateCommand, generate.generate),
    "evaluate": (evaluate.EvaluateCommand, evaluate.run),
    "bench": (bench.BenchCommand, bench.run),
    "doctor": (doctor.DoctorCommand, doctor.diagnose),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for an error (on stderr), 2 for wrong usage, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(help.overview({verb: cls for verb, (cls, _) in VERBS.items()}))
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"rlhf-fast {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        return _fail(f"unknown verb {verb!r}; the nearest one is {nearest(verb, VERBS)!r}, see rlhf-fast --help", 2)
    cls, action = VERBS[verb]
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress says more
    if "-h" in rest or "--help" in rest:
        print(help.of_verb(verb, cls))
        return 0
    try:
        action(_command(verb, cls, rest))
    except ConfigError as error:
        return _fail(f"{error}; see rlhf-fast {verb} --help", 2)
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("RLHF_FAST_DEBUG") == "1":
            raise
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        hint = {
            "demo": "the same command goes on after the last finished phase",
            **dict.fromkeys(("sft", "reward", "dpo", "ppo"), "the same command goes on from what was last kept"),
        }
        return _fail(f"stopped; {hint.get(verb, 'nothing is half-written')}", 130)
    return 0


def _command(verb: str, cls: type, words: list[str]) -> Any:
    if verb == "bench" and words and not words[0].startswith("-"):
        words = ["--suite", *words]  # the one word that reads better without its key
    file, rest = (None, words) if verb == "doctor" else _take_config(words)  # its --config is another run's
    command: Any = build(cls, file, rest)
    if verb == "demo" and command.tiny:  # it changes many defaults, over which the settings are laid again
        return build(cls, file, rest, tiny_demo())
    return command


def _take_config(words: list[str]) -> tuple[Path | None, list[str]]:
    """Split `--config FILE` off."""
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise ConfigError("--config needs a file")
            return Path(words[i + 1]), words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return Path(word.partition("=")[2]), words[:i] + words[i + 1 :]
    return None, words


def _fail(message: str, code: int) -> int:
    line = " ".join(part.strip() for part in message.splitlines())
    print(f"rlhf-fast: {line}", file=sys.stderr)
    return code
