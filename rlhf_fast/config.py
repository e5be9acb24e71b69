"""Every setting, as frozen dataclasses, and how YAML and `--key value` become them.

A setting has one name everywhere: `ppo.kl_coef` is `--ppo.kl_coef 0.1` on the command line, `ppo: {kl_coef: 0.1}` in
YAML and `PPOConfig(kl_coef=0.1)` in Python. This module knows nothing of models or training.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685) on every linear layer but the head; `r=0` trains all weights."""

    r: int = 16
    alpha: float = 32.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with gradient clipping, linear warm-up and a schedule. The micro-batch never changes the gradient."""

    lr: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.0
    adam_eps: float = 1e-5  # PPO diverges less than with 1e-8 (arXiv 2403.17031)
    max_grad_norm: float = 1.0
    max_tokens_per_microbatch: int = 1024  # padded tokens that are on the device at once


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations: cross-entropy on the response only, its end included."""

    epochs: int = 2
    batch_size: int = 8  # sequences an optimiser step
    heldout: float = 0.1  # share of the demonstrations kept for measuring
    max_length: int = 1024  # tokens; longer demonstrations are an error
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class RewardConfig:
    """A Bradley-Terry reward model: a scalar head at the last token of prompt and response."""

    epochs: int = 1
    batch_size: int = 16  # comparisons an optimiser step
    heldout: float = 0.125  # share of the prompts kept for measuring agreement
    center_coef: float = 0.01  # weight of (chosen + rejected)^2, which keeps scores near zero
    max_length: int = 1024
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation (arXiv 2305.18290), from the same comparisons as the reward model."""

    epochs: int = 1
    batch_size: int = 16
    heldout: float = 0.125
    beta: float = 0.1
    label_smoothing: float = 0.0
    max_length: int = 1024
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))


@dataclass(frozen=True)
class PPOConfig:
    """PPO with a per-token KL penalty to the frozen start (arXiv 1707.06347, 2203.02155)."""

    steps: int = 50
    prompts_per_step: int = 16
    samples_per_prompt: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    epochs: int = 2
    minibatches: int = 4
    kl_coef: float = 0.05
    kl_target: float | None = None  # nats a sequence; when set, kl_coef adapts towards it (arXiv 1909.08593)
    kl_horizon: float = 10_000.0  # sequences
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    whiten_rewards: bool = False
    missing_eos_penalty: float = 1.0  # taken from the score of a response cut off by max_new_tokens
    min_reward_agreement: float = 0.6  # held-out agreement below which PPO refuses to start
    max_length: int = 1024
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, schedule="constant", warmup=0.0))


@dataclass(frozen=True)
class AnnotatorConfig:
    """The simulated annotator: a written rule in place of people, so that the loop runs unattended."""

    error_rate: float = 0.1  # share of comparisons answered the wrong way round
    seed: int = 0


@dataclass(frozen=True)
class EvaluationConfig:
    """Win rate of one checkpoint against another on held-out prompts."""

    samples_per_prompt: int = 2
    max_new_tokens: int = 128
    temperature: float = 1.0
    seed: int = 1


@dataclass(frozen=True)
class ComparisonsConfig:
    """How many responses are sampled for comparison, and by which annotator they are compared."""

    prompts: int = 0  # 0: every training prompt
    samples_per_prompt: int = 4  # every pair among them is compared
    max_new_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)


@dataclass(frozen=True)
class DemoConfig:
    """The demo: an assistant for an agency's client messages, from SmolLM2-135M to a policy trained by PPO."""

    out: str = "runs/demo"
    tiny: bool = False  # a random model over bytes, in under a minute
    model: str = "smollm2-135m"
    sft: SFTConfig = field(default_factory=SFTConfig)
    comparisons: ComparisonsConfig = field(default_factory=lambda: ComparisonsConfig(prompts=120, max_new_tokens=80))
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(steps=8, max_new_tokens=80, epochs=1))
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(max_new_tokens=80))


def tiny_demo() -> DemoConfig:
    """The same phases on a random model of 0.1 million weights: it learns little, but it runs everything."""
    optim = OptimConfig(lr=3e-3, max_tokens_per_microbatch=8192)
    lora = LoRAConfig(r=4, alpha=8.0)
    return DemoConfig(
        tiny=True,
        model="random",
        sft=SFTConfig(epochs=3, lora=LoRAConfig(r=0), optim=optim),
        comparisons=ComparisonsConfig(prompts=24, max_new_tokens=48),
        reward=RewardConfig(lora=lora, optim=optim),
        ppo=PPOConfig(
            steps=3,
            prompts_per_step=8,
            minibatches=2,
            max_new_tokens=48,
            min_reward_agreement=0.0,  # a random model learns no preferences worth the name
            lora=lora,
            optim=replace(optim, lr=1e-3, schedule="constant", warmup=0.0),
        ),
        evaluation=EvaluationConfig(samples_per_prompt=1, max_new_tokens=48),
    )


class ConfigError(ValueError):
    """A setting that does not exist or has the wrong type."""


def keys(cls: type) -> list[str]:
    """All dotted keys of a configuration class, in order of declaration."""
    return [key for key, _ in _leaves(cls)]


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain data, ready for YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def build(cls: type[ConfigT], file: Path | None, arguments: list[str], base: ConfigT | None = None) -> ConfigT:
    """Make a configuration from `base` (or the defaults), then a YAML file, then `--key value` arguments.

    Raises:
        ConfigError: names the unknown key and the nearest known one, or the value and the type it should have.
    """
    values = flatten(_read_yaml(file)) if file else {}
    values.update(_read_arguments(cls, arguments))
    return from_flat(cls, values, base)


def from_flat(cls: type[ConfigT], values: dict[str, Any], base: ConfigT | None = None) -> ConfigT:
    """`base` (or the defaults) with the dotted keys of `values` replaced."""
    leaves = dict(_leaves(cls))
    for key in values:
        if key not in leaves:
            raise ConfigError(_unknown_key(key, list(leaves)))
    converted = {key: _convert(key, value, leaves[key]) for key, value in values.items()}
    return typing.cast(ConfigT, _assemble(cls, converted, base))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo": {"kl_coef": 0.1}} -> {"ppo.kl_coef": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _leaves(cls: type, prefix: str = "") -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    leaves: list[tuple[str, Any]] = []
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            leaves.extend(_leaves(typing.cast(type, kind), f"{prefix}{item.name}."))
        else:
            leaves.append((prefix + item.name, kind))
    return leaves


def _assemble(cls: type, values: dict[str, Any], base: Any) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        current = getattr(base, item.name) if base is not None else _default(item)
        if dataclasses.is_dataclass(kind):
            inner = {k.removeprefix(f"{item.name}."): v for k, v in values.items() if k.startswith(f"{item.name}.")}
            current = _assemble(typing.cast(type, kind), inner, current)
        elif item.name in values:
            current = values[item.name]
        if current is dataclasses.MISSING:
            raise ConfigError(f"--{item.name} is missing; give it a value")
        arguments[item.name] = current
    return cls(**arguments)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: {file} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: {file} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {file} should hold keys and values, not a {type(tree).__name__}")
    return tree


def _read_arguments(cls: type, arguments: list[str]) -> dict[str, Any]:
    """`--a.b 1 --c=2 --flag` -> {"a.b": "1", "c": "2", "flag": True}; only true/false settings may stand alone."""
    leaves = dict(_leaves(cls))
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} stands where a --key was expected")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in leaves:
            raise ConfigError(_unknown_key(key, list(leaves)))
        if equals:
            values[key] = value
        elif leaves[key] is bool and (not rest or rest[0].startswith("--")):
            values[key] = True
        elif not rest:
            raise ConfigError(f"--{key} needs a value")
        else:
            values[key] = rest.pop(0)
    return values


def _unknown_key(key: str, known: list[str]) -> str:
    same_leaf = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"unknown setting --{key}; the nearest one is --{nearest(key, same_leaf or known)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def _convert(key: str, value: Any, kind: Any) -> Any:
    """`value` (text from the command line, or a YAML value) as `kind`, or an error that names both."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in options:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        options = tuple(option for option in options if option is not type(None))
    (option,) = options
    if typing.get_origin(option) is Literal:
        if value in typing.get_args(option):
            return value
        raise ConfigError(f"--{key}: {value!r} is not one of {', '.join(map(repr, typing.get_args(option)))}")
    try:
        return _CONVERTERS[option](value)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--{key}: {value!r} is not {_NAMES[option]}") from error


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(value)


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    return float(value)


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


_CONVERTERS: dict[Any, Any] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def describe(cls: type, base: Any = None) -> list[tuple[str, str, str, str]]:
    """(key, type, default, comment) of every setting, for --help. Comments are those of the source."""
    rows = []
    for item in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[item.name]
        current = getattr(base, item.name) if base is not None else _default(item)
        if dataclasses.is_dataclass(kind):
            rows += [(f"{item.name}.{key}", *rest) for key, *rest in describe(typing.cast(type, kind), current)]
        else:
            default = "required" if current is dataclasses.MISSING else "none" if current is None else str(current)
            rows.append((item.name, _kind_name(kind), default, _source_comments(cls).get(item.name, "")))
    return rows  # type: ignore[return-value]


def _kind_name(kind: Any) -> str:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, options))
    if options:
        return " or ".join("none" if option is type(None) else option.__name__ for option in options)
    return str(kind.__name__)


def _source_comments(cls: type) -> dict[str, str]:
    """The comment behind each field, so that --help and the source cannot disagree."""
    pairs = re.findall(r"^    (\w+): [^#\n]*(?:  # ([^\n]*))?$", inspect.getsource(cls), re.MULTILINE)
    return dict(pairs)
