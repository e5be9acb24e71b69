"""The command line: one verb a phase, `--config FILE.yaml` and `--key value` over the dataclasses of config/.

Each file here holds the settings of a few verbs, as dataclasses, and what they do.
"""

from __future__ import annotations

import difflib
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast import __version__
from rlhf_fast.cli import annotate, bench, data, doctor, errors, evaluate, export, generate, help, inputs, training
from rlhf_fast.config import DemoConfig, human_demo, tiny_demo
from rlhf_fast.config.settings import ConfigError, build


def _demo(command: DemoConfig) -> None:
    if not command.tiny:
        inputs.check({"model": command.model})
    if command.human:
        annotate.require_packages("demo --human")
    elif (command.pairs, command.port) != (DemoConfig.pairs, DemoConfig.port):
        raise ConfigError("--pairs and --port are of the page on which people compare; give --human, too")
    from rlhf_fast.pipeline import run_demo

    run_demo(command)


VERBS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "demo": (DemoConfig, _demo),
    "sft": (training.SFTCommand, training.sft),
    "reward": (training.RewardCommand, training.reward),
    "dpo": (training.DPOCommand, training.dpo),
    "ppo": (training.PPOCommand, training.ppo),
    "grpo": (training.GRPOCommand, training.ppo),
    "rloo": (training.RLOOCommand, training.ppo),
    "data": (data.DataCommand, data.run),
    "generate": (generate.GenerateCommand, generate.generate),
    "annotate": (annotate.AnnotateCommand, annotate.run),
    "evaluate": (evaluate.EvaluateCommand, evaluate.run),
    "export": (export.ExportCommand, export.run),
    "bench": (bench.BenchCommand, bench.run),
    "doctor": (doctor.DoctorCommand, doctor.diagnose),
}
TRAINING = ("sft", "reward", "dpo", "ppo", "grpo", "rloo")


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0; 1 for an error, in one line on stderr (of evaluate 2, whose 1 and 3 are verdicts); 2 for wrong usage; 70 for a
    fault of this program; 130 after Ctrl-C; 141 when nobody reads what is printed. `--traceback` anywhere shows
    Python's traceback above an error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    shows_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    verb = words[0] if words else ""
    plain, device = warnings.formatwarning, os.environ.get("RLHF_FAST_DEVICE")
    warnings.formatwarning = _warning
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:  # a run that was under way says what it kept
        hint = {
            "demo": "the same command goes on after the last finished phase",
            **dict.fromkeys(TRAINING, "no step was made, and nothing has changed"),
        }
        errors.say(str(error) or f"stopped; {hint.get(verb, 'nothing is half-written')}")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and errors.reader_is_gone():
            return errors.BROKEN_PIPE
        if shows_traceback:
            errors.show_traceback(error)
        message, code = errors.explained(error, verb)
        errors.say(message)
        return errors.USAGE if verb == "evaluate" and code == errors.FAILED else code  # whose 1 is a regression
    finally:
        warnings.formatwarning = plain
        if device is None:
            os.environ.pop("RLHF_FAST_DEVICE", None)
        else:
            os.environ["RLHF_FAST_DEVICE"] = device


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Format a warning without its place in the source, which says nothing to who gave the command."""
    return f"rlhf-fast: {' '.join(str(message).split())}\n"


def _run(words: list[str]) -> int:
    """Do what the words say; returns 0, 2 when they do not say enough, or the code of a process that did it."""
    classes = {verb: cls for verb, (cls, _) in VERBS.items()}
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb in ("-V", "--version", "version"):
        print(f"rlhf-fast {__version__}")
        return 0
    if verb == "help" and rest:
        verb, rest = rest[0], ["--help"]
    if verb in ("", "-h", "--help", "help"):
        print(help.overview(classes))
        return 0 if verb else errors.USAGE
    if verb not in VERBS:
        errors.say(f"unknown verb {verb!r}; {_meant(verb)}, see rlhf-fast --help")
        return errors.USAGE
    if verb in (*TRAINING, "demo", "generate", "evaluate", "export", "annotate"):
        rest = _take_device(rest)
    cls, action = VERBS[verb]
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress says more
    if "-h" in rest or "--help" in rest or rest == ["help"]:
        print(help.verb_help(verb, cls))
        return 0
    return action(_command(verb, cls, rest)) or 0


def _meant(word: str) -> str:
    """The verb that is spelled nearly like `word`, or else all of them."""
    near = difflib.get_close_matches(word, VERBS, n=1)
    return f"the nearest one is {near[0]!r}" if near else f"the verbs are {', '.join(VERBS)}"


def _command(verb: str, cls: type, words: list[str]) -> Any:
    first = {"bench": "--suite", "data": "--data"}.get(verb)  # the one word that reads better without its key
    if verb == "annotate" and words[:1] in (["export"], ["report"], ["import"]):
        names = ("--action", "--out", "--votes")[: 3 if words[0] == "import" else 2]
        plain = list(itertools.takewhile(lambda word: not word.startswith("-"), words))[: len(names)]
        words = [part for pair in zip(names, plain, strict=False) for part in pair] + words[len(plain) :]
    if first and words and not words[0].startswith("-"):
        words = [first, *words]
    file, rest = (None, words) if verb == "doctor" else _take_config(words)  # its --config is another run's
    command: Any = build(cls, file, rest)
    if verb == "demo":  # these change many defaults, over which the settings are laid again
        base = tiny_demo() if command.tiny else DemoConfig()
        return build(cls, file, rest, human_demo(base) if command.human else base)
    return command


def _take_device(words: list[str]) -> list[str]:
    """Let `--device NAME` decide where models go, and leave it out of the words."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--device=") else [word])]
    if "--device" not in words:
        return words
    place = words.index("--device")
    if place + 1 == len(words):
        raise ConfigError("--device needs a value: cpu, cuda or cuda:N")
    os.environ["RLHF_FAST_DEVICE"] = words[place + 1]
    return words[:place] + words[place + 2 :]


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
