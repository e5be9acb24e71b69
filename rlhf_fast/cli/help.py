"""The texts of --help, from the comments of the settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from rlhf_fast.config import DemoConfig
from rlhf_fast.config.settings import describe


def overview(verbs: Mapping[str, type]) -> str:
    lines = [
        "rlhf-fast: from a pretrained model to one that people prefer.",
        "",
        "usage: rlhf-fast VERB [--config FILE.yaml] [--key value ...]",
        "",
    ]
    lines += [f"  {verb:<9} {_first_line(cls)}" for verb, cls in verbs.items()]
    lines += [
        "",
        "A first look, in under a minute and without a model:  rlhf-fast demo --tiny --out runs/tiny",
        "The whole loop on a real model, about 10 minutes:     rlhf-fast demo --out runs/demo",
        "The same with you as the annotator, on a page:        rlhf-fast demo --human --out runs/mine",
        "What a data file holds, before training on it:        rlhf-fast data FILE",
        "A chat with a model:                                  rlhf-fast generate --model smollm2-135m",
        "What the kernels reach on this machine:               rlhf-fast bench ops",
        "Whether a run fits into memory:                       rlhf-fast doctor --config run.yaml",
        "All settings of a verb:                               rlhf-fast ppo --help",
        "Where an error comes from, for a report of it:        the same command with --traceback",
    ]
    return "\n".join(lines)


def verb_help(verb: str, cls: type) -> str:
    first, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    lines = [f"rlhf-fast {verb}: {first}", "", f"usage: rlhf-fast {verb} [--config FILE.yaml] [--key value ...]", ""]
    lines += [rest, ""] if rest else []
    lines += [
        "A YAML file holds the same keys, nested at the dots; the command line goes before it. With --traceback an"
    ]
    lines += ["error shows Python's traceback, too; --device cpu, cuda or cuda:N says where models go.", ""]
    base = cls() if cls is DemoConfig else None
    for key, kind, default, comment in describe(cls, base):
        lines.append(f"  --{key:<40} {kind:<28} {default:<14} {comment}".rstrip())
    return "\n".join(lines)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
