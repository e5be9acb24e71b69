"""The command line: one verb a phase, `--config FILE.yaml` and `--key value` over the dataclasses of config.py."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rlhf_fast import __version__, cli_data
from rlhf_fast.config import DemoConfig, DPOConfig, EvaluationConfig, PPOConfig, RewardConfig, SFTConfig, tiny_demo
from rlhf_fast.settings import ConfigError, build, describe, nearest


@dataclass(frozen=True)
class SFTCommand:
    """Teach a model to answer as demonstrations do."""

    data: str  # demonstrations: {"prompt", "completion"} or {"messages": [...]} a line
    out: str  # folder of the run
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m
    sft: SFTConfig = field(default_factory=SFTConfig)


@dataclass(frozen=True)
class RewardCommand:
    """Train a reward model on comparisons, and measure how far it agrees with held-out ones."""

    data: str  # comparisons: {"prompt", "chosen", "rejected"} a line, .gz too
    out: str  # folder of the run
    model: str = "smollm2-135m"  # the policy to start from
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True)
class DPOCommand:
    """Fit a policy to comparisons directly, without a reward model."""

    data: str  # comparisons: {"prompt", "chosen", "rejected"} a line, .gz too
    out: str  # folder of the run
    model: str = "smollm2-135m"  # the policy to start from, and the reference
    dpo: DPOConfig = field(default_factory=DPOConfig)


@dataclass(frozen=True)
class PPOCommand:
    """Improve a policy by rewards, kept near its start by a KL penalty."""

    policy: str  # the policy to start from, and the reference
    reward: str  # a reward model's run or checkpoint, a URL, rule:NAME, or a list "1*runs/reward, 0.5*rule:math"
    prompts: str  # {"prompt"} a line, with further columns for rules and URLs
    out: str  # folder of the run
    ppo: PPOConfig = field(default_factory=PPOConfig)


@dataclass(frozen=True)
class GenerateCommand:
    """Sample answers to the prompts of a file, to one prompt, or to what is typed."""

    prompts: str = ""  # {"prompt"} a line
    prompt: str = ""  # one prompt, in place of a file; with neither, prompts are read from the terminal
    out: str = ""  # JSON Lines; empty: standard output
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m
    n: int = 1  # answers to each prompt
    temperature: float = 1.0  # 0.0 takes the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability; 1.0: all
    min_p: float = 0.0  # only tokens at least this many times as likely as the likeliest; 0.0: all
    repetition_penalty: float = 1.0  # logits of tokens that were there are divided by it; 1.0: none
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer so far
    frequency_penalty: float = 0.0  # the same, for each time that they are there
    max_new_tokens: int = 128  # tokens; an answer that has not ended by then is cut off
    min_new_tokens: int = 0  # tokens; no end before
    stop: str = ""  # a text that ends an answer
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    seed: int = 0


@dataclass(frozen=True)
class EvaluateCommand:
    """Win rate of policy a against policy b on held-out prompts, by the simulated annotator."""

    a: str  # folder, run, hub name or smollm2-135m
    b: str  # the same; also the reference that the KL is measured to
    prompts: str  # {"prompt", "category"} a line
    out: str  # folder of the run
    split: str = ""  # only the prompts with this "split"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class BenchCommand:
    """Time `ops` or `rollout` beside their peers and beside what this machine allows; needs a checkout.

    `report` times nothing: it puts the results of `make gpu` into docs/performance.md.
    """

    suite: str = "ops"  # what to time: ops, or rollout; or report
    op: str = ""  # only this op, or this case of rollouts; empty: all
    seconds: float = 10.0  # of timing each case, in rounds of all peers; 5 to 100 rounds
    out: str = ""  # JSON Lines, one a result; empty: bench/results/SUITE-DEVICE.jsonl


@dataclass(frozen=True)
class DoctorCommand:
    """Say what this machine has and what is missing; with --config, whether a run fits into its memory.

    The file is that of a run, as `rlhf-fast sft|reward|dpo|ppo --config` takes it. Nothing is loaded: what each part
    takes is counted from shapes, phase by phase, with micro-batches as full as the settings let them be. If it is more
    than there is, the exit code is 1, and what to change is listed, from what does least harm on (docs/cost.md).

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


# Heavy imports happen inside the verbs, so that --help and errors in settings come at once.


def _sft(command: SFTCommand) -> None:
    from rlhf_fast.trainers.sft import SFTTrainer

    _tell(SFTTrainer(command.model, command.data, command.out, command.sft).train(), command.out)


def _reward(command: RewardCommand) -> None:
    from rlhf_fast.evaluation.reward_report import write_reward_report
    from rlhf_fast.trainers.reward import RewardTrainer

    _tell(RewardTrainer(command.model, command.data, command.out, command.reward).train(), command.out)
    print(f"Report: {write_reward_report(command.out)}")


def _dpo(command: DPOCommand) -> None:
    from rlhf_fast.trainers.dpo import DPOTrainer

    _tell(DPOTrainer(command.model, command.data, command.out, command.dpo).train(), command.out)


def _ppo(command: PPOCommand) -> None:
    from rlhf_fast.trainers.ppo import PPOTrainer

    trainer = PPOTrainer(command.policy, command.reward, command.prompts, command.out, command.ppo)
    _tell(trainer.train(), command.out)


def _generate(command: GenerateCommand) -> None:
    from rlhf_fast import models
    from rlhf_fast.data.records import read_prompts
    from rlhf_fast.data.templates import use_template
    from rlhf_fast.files import write_jsonl
    from rlhf_fast.rollout.generator import Generator
    from rlhf_fast.rollout.sampling import SamplingParams
    from rlhf_fast.terminal import bar_updater, progress_bar

    if command.prompts and command.prompt:
        raise ConfigError("give either --prompts FILE or --prompt TEXT")
    options = {item.name: getattr(command, item.name) for item in fields(command)}
    options["stop"] = (command.stop,) if command.stop else ()
    params = SamplingParams(**{key: options[key] for key in SamplingParams.__dataclass_fields__ if key in options})
    asks = not (command.prompts or command.prompt)
    records = [] if asks else read_prompts(command.prompts or [{"prompt": command.prompt}])
    model, tokenizer = models.load(command.model, merged=True)
    use_template(tokenizer, command.chat_template, command.template_kwargs, command.parse_special_tokens)
    generator = Generator(model, tokenizer)
    if asks:
        return _talk(generator, params)
    with progress_bar(len(records) * params.n, "generate", "reply") as bar:
        rollouts = generator.generate(records, params, bar_updater(bar))
    rows = [
        {"prompt": records[i].prompt, "completion": text, "finish_reason": reason}
        for i, text, reason in zip(rollouts.prompt_index.tolist(), rollouts.texts, rollouts.finish_reasons, strict=True)
    ]
    if command.out:
        write_jsonl(Path(command.out), rows)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))


def _talk(generator: Any, params: Any) -> None:
    """Answer what is typed, each line a prompt of its own, until the end of the input."""
    if sys.stdin.isatty():
        print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt.strip():
            continue
        shown = ""
        for piece in generator.stream([prompt], params):
            if params.n == 1:
                print(_printable(piece.text.removeprefix(shown)), end="", flush=True)
                shown = piece.text
            elif params.n > 1 and piece.finish_reason:
                print(f"[{piece.sample + 1}] {_printable(piece.text)}")
        print()


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _evaluate(command: EvaluateCommand) -> None:
    from rlhf_fast import models
    from rlhf_fast.data.records import read_prompts
    from rlhf_fast.evaluation.win_rate import evaluate, write_evaluation
    from rlhf_fast.run_folder import RunFolder
    from rlhf_fast.settings import to_yaml

    prompts = read_prompts(command.prompts, command.split or None)
    for name in (command.a, command.b):
        models.resolve(name)  # an unknown one is an error before the folder is made
    run = RunFolder(command.out, "evaluation", to_yaml(command))
    figures, rows = evaluate(command.a, command.b, prompts, command.evaluation)
    _tell(write_evaluation(run, figures, rows), command.out)


def _bench(command: BenchCommand) -> None:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "bench" / "harness.py").is_file():
        raise RuntimeError(
            "the benchmarks are no part of an installed package; run this from a checkout: pip install -e ."
        )
    sys.path.insert(0, str(checkout))
    from bench import harness

    out = Path(command.out) if command.out else harness.default_out(command.suite)
    if command.suite == "rollout":
        from bench.rollout import run

        return run.main(command.op, out)
    if command.suite == "report":
        from bench.gpu import report

        page = checkout / "docs" / "performance.md"
        found = report.merge(checkout / "bench" / "results", page)
        report.put_predictions(page)
        print(f"{len(found)} runs on GPUs put into {page}")
        return None
    harness.run_suite(command.suite, command.op, command.seconds, out)


def _doctor(command: DoctorCommand) -> None:
    if not command.config:
        from rlhf_fast import doctor

        doctor.main()
        return
    from rlhf_fast import cost, forecast

    run = forecast.read_run(Path(command.config), command.model)
    device, memory = forecast.device_and_memory(command.device, command.memory)
    if sys.stderr.isatty():
        print(f"{command.config}: counting; billions of weights take some ten seconds", file=sys.stderr)
    found = forecast.forecast(run, device, memory)
    hours: dict[str, float] = {}
    if command.price is not None:
        data = cost.Data(command.sequences, command.prompt_tokens, command.response_tokens)
        hours = forecast.hours(run, data, cost.Machine(command.tflops, command.bandwidth, command.utilisation))
    if command.json:
        price = {"hours": hours, "dollars": sum(hours.values()) * (command.price or 0.0)} if hours else {}
        print(json.dumps({**forecast.as_dict(found), **price}, indent=2))
    else:
        print(forecast.as_text(found))
        if command.price is not None:
            print("\n" + forecast.cost_table(hours, command.price))
    if not found.fits:
        raise RuntimeError(f"{command.config}: {found.prediction.peak / 1e9:.1f} GB do not fit into {memory / 1e9:.1f}")


def _demo(command: DemoConfig) -> None:
    from rlhf_fast.pipeline import run_demo

    run_demo(command)


VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoConfig, _demo),
    "sft": (SFTCommand, _sft),
    "reward": (RewardCommand, _reward),
    "dpo": (DPOCommand, _dpo),
    "ppo": (PPOCommand, _ppo),
    "data": (cli_data.DataCommand, cli_data.run),
    "generate": (GenerateCommand, _generate),
    "evaluate": (EvaluateCommand, _evaluate),
    "bench": (BenchCommand, _bench),
    "doctor": (DoctorCommand, _doctor),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for an error (on stderr), 2 for wrong usage, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(_help())
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
        print(_verb_help(verb, cls))
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
    first = {"bench": "--suite", "data": "--data"}.get(verb)  # the one word that reads better without its key
    if first and words and not words[0].startswith("-"):
        words = [first, *words]
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


def _tell(result: dict[str, Any], out: str) -> None:
    print(json.dumps(result["summary"], indent=2))
    print(f"{result['seconds']:.0f} s, at most {result['peak_rss_gb']:.1f} GB in memory; written to {out}")


def _fail(message: str, code: int) -> int:
    line = " ".join(part.strip() for part in message.splitlines())
    print(f"rlhf-fast: {line}", file=sys.stderr)
    return code


def _help() -> str:
    lines = [
        "rlhf-fast: from a pretrained model to one that people prefer.",
        "",
        "usage: rlhf-fast VERB [--config FILE.yaml] [--key value ...]",
        "",
    ]
    lines += [f"  {verb:<9} {_first_line(cls)}" for verb, (cls, _) in VERBS.items()]
    lines += [
        "",
        "A first look, in under a minute and without a model:  rlhf-fast demo --tiny --out runs/tiny",
        "The whole loop on a real model, about 10 minutes:     rlhf-fast demo --out runs/demo",
        "A talk with a model:                                  rlhf-fast generate --model smollm2-135m",
        "What the kernels reach on this machine:               rlhf-fast bench ops",
        "Whether a run fits into memory:                       rlhf-fast doctor --config run.yaml",
        "All settings of a verb:                               rlhf-fast ppo --help",
    ]
    return "\n".join(lines)


def _verb_help(verb: str, cls: type) -> str:
    first, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    lines = [f"rlhf-fast {verb}: {first}", "", f"usage: rlhf-fast {verb} [--config FILE.yaml] [--key value ...]", ""]
    lines += [rest, ""] if rest else []
    lines += ["A YAML file holds the same keys, nested at the dots; the command line goes before it.", ""]
    base = cls() if cls is DemoConfig else None
    for key, kind, default, comment in describe(cls, base):
        lines.append(f"  --{key:<40} {kind:<28} {default:<14} {comment}".rstrip())
    return "\n".join(lines)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
