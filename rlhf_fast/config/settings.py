"""Turn YAML and `--key value` into the dataclasses of this room, and describe them for --help.

Works on any dataclass whose fields are bool, int, float, str, a Literal, one of those or None, a tuple[int, ...] or
tuple[str, ...], a dict[str, Any], whose keys are anybody's, or such a dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import reprlib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

ConfigT = TypeVar("ConfigT")
MOST_CHANGES = 8  # that are listed, of two configurations


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type or is out of range."""


class Settings:
    """A dataclass of settings, made in Python: an unknown name and a value of another type are errors in words.

    Lists are taken for tuples, and numpy's numbers for Python's, which YAML can hold.
    """

    def __new__(cls, *args: Any, **given: Any) -> Any:
        for name in given:
            if name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise TypeError(f"{cls.__name__}: there is no setting {name!r}; the nearest one is {_near(cls, name)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, kind in _kinds(typing.cast(Any, type(self))).items():
            given = getattr(self, name)
            value = _in_python(given, kind)
            if value is not given:
                object.__setattr__(self, name, value)
            if _fits(value, kind):
                continue
            literal = next(
                (each for each in (kind, *typing.get_args(kind)) if typing.get_origin(each) is Literal), None
            )
            if literal and isinstance(value, str):
                options = typing.get_args(literal)
                near = f", of which {nearest(value, options)!r} is the nearest" if all(map(str, options)) else ""
                raise ValueError(f"{name}: {value!r}; expected {_words(kind, value)}{near}")
            raise TypeError(f"{name}: {value!r:.80} ({type(value).__name__}); expected {_words(kind, value)}")


def given(cls: type[ConfigT], config: ConfigT | dict[str, Any] | None) -> ConfigT:
    """Return the settings of a class that a caller gave: as they are, from a dict, or the defaults for None.

    Raises:
        TypeError: those of something else.
    """
    if isinstance(config, dict):
        return cls(**config)
    if config is None or isinstance(config, cls):
        return config or cls()
    raise TypeError(f"config: got {type(config).__name__}; expected {cls.__name__}(...), or a dict of its settings")


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    """The type of each setting."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def _in_python(value: Any, kind: Any) -> Any:
    """`value` in the type that stands for it in Python and YAML, where there is another one."""
    if isinstance(value, list) and typing.get_origin(kind) is tuple:
        return tuple(value)
    if isinstance(value, numbers.Real) and type(value) not in (bool, int, float):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type; of types that no setting has, any."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin is tuple:
        return isinstance(value, tuple) and (inner[0] not in _MANY or all(_fits(each, inner[0]) for each in value))
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    kind = origin or kind
    return isinstance(value, kind) if isinstance(kind, type) else True


def _words(kind: Any, value: Any = None) -> str:
    """Say what is expected, for a person."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(each, value) for each in inner)
    if origin is Literal:
        *most, last = map(repr, inner)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        return f"a tuple of {_MANY[inner[0]]}" if inner[0] in _MANY else "a tuple"
    if origin is dict:
        return "a dict with texts as keys"
    if dataclasses.is_dataclass(kind):
        words = ", ".join(f"{key}={each!r}" for key, each in value.items()) if isinstance(value, dict) else "..."
        return f"{typing.cast(type, kind).__name__}({words})"
    return {type(None): "None", int: "a whole number", float: "a number", str: "text", bool: "True or False"}.get(
        kind, f"a {getattr(origin or kind, '__name__', kind)}".lower()
    )


_MANY = {int: "whole numbers", str: "texts"}


def _near(cls: type, name: str) -> str:
    """The setting whose name is most like that, as it is given in Python: optim=OptimConfig(lr=...)."""
    *outer, last = _nearest_key(name, keys(cls)).split(".")
    call, around = (f"{last}=..." if outer else last), []
    for part in outer:
        cls = _kinds(cls)[part]
        around.append((part, cls.__name__))
    for part, kind in reversed(around):
        call = f"{part}={kind}({call})"
    return call


def keys(cls: type) -> list[str]:
    """List all dotted keys of a configuration class, in order of declaration."""
    return [key for key, _ in _leaves(cls)]


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to nested plain data, for YAML."""
    return dataclasses.asdict(config, dict_factory=_plain)


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def changes(before: str, now: str, but: Collection[str] = (), defaults: Mapping[str, Any] | None = None) -> str:
    """Say what differs between two configurations in YAML, as "ppo.steps: 2 -> 3, ..."; empty if only `but` does.

    Args:
        defaults: what a key is that is not in `before`, as it is of an earlier version that had no such setting.
    """
    old, new = (flatten(yaml.safe_load(text) or {}) for text in (before, now))
    old = {**{key: value for key, value in (defaults or {}).items() if key in new}, **old}
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in but
    ]
    more = [f"and {len(changed) - MOST_CHANGES} more"] if len(changed) > MOST_CHANGES else []
    return ", ".join(changed[:MOST_CHANGES] + more)


class _WithoutAddresses(reprlib.Repr):
    """Short, and the same in every process, so that a run can be told from another one."""

    def repr_instance(self, x: Any, level: int) -> str:
        name = getattr(x, "__qualname__", None)
        text = f"{type(x).__name__} {name}" if name else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x))
        return text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"


def run_yaml(verb: str, config: Any, **inputs: Any) -> str:
    """The settings of one run as `rlhf-fast VERB --config` takes them.

    Inputs that were given in Python and are no path are described in brackets.
    """
    described = _WithoutAddresses()
    named = {k: str(v) if isinstance(v, str | Path) else f"({described.repr(v)})" for k, v in inputs.items()}
    return yaml.safe_dump({**named, verb: to_dict(config)}, sort_keys=False, allow_unicode=True)


def build(cls: type[ConfigT], file: Path | None, arguments: list[str], base: ConfigT | None = None) -> ConfigT:
    """Make a configuration from `base` (or the defaults), then a YAML file, then `--key value` arguments.

    Raises:
        ConfigError: names the unknown key and the nearest known one, or the value and what was expected.
    """
    values = flatten(read_yaml(file)) if file else {}
    values.update(_read_arguments(cls, arguments))
    return from_flat(cls, values, base)


def from_flat(cls: type[ConfigT], values: dict[str, Any], base: ConfigT | None = None) -> ConfigT:
    """`base` (or the defaults) with the dotted keys of `values` replaced."""
    leaves = dict(_leaves(cls))
    values = _with_mappings(values, leaves)
    for key in values:
        if key not in leaves:
            raise ConfigError(_unknown_key(key, list(leaves)))
    converted = {key: _convert(key, value, leaves[key]) for key, value in values.items()}
    return typing.cast(ConfigT, _assemble(cls, converted, base))


def _mapping_of(key: str, leaves: dict[str, Any]) -> str:
    """The setting that `key` is a key of, if that is a mapping: "sft.template_kwargs" of what is below it."""
    names = (name for name, kind in leaves.items() if typing.get_origin(kind) is dict)
    return next((name for name in names if key.startswith(f"{name}.")), "")


def _with_mappings(values: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys below a mapping as one value."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        name = _mapping_of(key, leaves)
        if not name:
            nested[key] = value
            continue
        *outer, last = key.removeprefix(f"{name}.").split(".")
        inner = nested.setdefault(name, {})
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested


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


def _assemble(cls: type, values: dict[str, Any], base: Any, prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        current = getattr(base, item.name) if base is not None else _default(item)
        if dataclasses.is_dataclass(kind):
            inner = {k.removeprefix(f"{item.name}."): v for k, v in values.items() if k.startswith(f"{item.name}.")}
            current = _assemble(typing.cast(type, kind), inner, current, f"{prefix}{item.name}.")
        elif item.name in values:
            current = values[item.name]
        if current is dataclasses.MISSING:
            raise ConfigError(f"--{prefix}{item.name} is missing; give it a value")
        arguments[item.name] = current
    try:
        return cls(**arguments)
    except ValueError as error:  # out of range
        raise ConfigError(f"--{prefix}{error}") from error


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def read_yaml(file: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {file} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {file} should hold keys and values, not a {type(tree).__name__}")
    return tree


def _read_arguments(cls: type, arguments: list[str]) -> dict[str, Any]:
    """`--a.b 1 --c=2 --flag` -> {"a.b": "1", "c": "2", "flag": True}; only true/false settings may stand alone.

    A value that itself begins with `--` needs the form `--key=--value`.
    """
    leaves = dict(_leaves(cls))
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} stands where a --key was expected; give settings as --key value")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        below = _mapping_of(key, leaves)
        if key not in leaves and not below:
            raise ConfigError(_unknown_key(key, list(leaves)))
        if equals:
            values[key] = value
        elif rest and not rest[0].startswith("--"):
            values[key] = rest.pop(0)
        elif not below and leaves[key] is bool:
            values[key] = True
        else:
            raise ConfigError(f"--{key} needs a value; give it as --{key}=VALUE")
        if below or typing.get_origin(leaves[key]) is dict:
            values[key] = _from_yaml(key, values[key])
    return values


def _from_yaml(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: {text!r} is not YAML: {error}") from error


def _unknown_key(key: str, known: list[str]) -> str:
    return f"unknown setting --{key}; the nearest one is --{_nearest_key(key, known)}"


def _nearest_key(key: str, known: list[str]) -> str:
    """Find a known key of the same last name, or else the most alike."""
    same_leaf = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return nearest(key, same_leaf or known)


def nearest(word: str, known: Iterable[str]) -> str:
    """Find the known word most like `word`."""
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
    if typing.get_origin(option) is tuple:
        return _to_tuple(key, value, typing.get_args(option)[0])
    if typing.get_origin(option) is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"--{key}: {value!r} is no mapping; give --{key}.NAME VALUE, or in YAML {{NAME: VALUE}}")
        return value
    try:
        return _CONVERTERS[option](value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"--{key}: {value!r} is not {_NAMES[option]}") from error


def _to_tuple(key: str, value: Any, kind: Any) -> tuple[Any, ...]:
    """`1,2` on the command line, a list in YAML."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",")] if value.strip() else []
    if not isinstance(value, list | tuple):
        raise ConfigError(f"--{key}: {value!r} is not a list; give it as 1,2 or in YAML as [1, 2]")
    return tuple(_convert(key, item, kind) for item in value)


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
    if isinstance(value, bool) or math.isnan(float(value)):
        raise ValueError(value)
    return float(value)


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


_CONVERTERS: dict[Any, Any] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def describe(cls: type, base: Any = None) -> list[tuple[str, str, str, str]]:
    """List (key, type, default, comment) of every setting, for --help; the comments are those of the source."""
    rows = []
    for item in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[item.name]
        current = getattr(base, item.name) if base is not None else _default(item)
        if dataclasses.is_dataclass(kind):
            rows += [(f"{item.name}.{key}", *rest) for key, *rest in describe(typing.cast(type, kind), current)]
        else:
            default = (
                "required" if current is dataclasses.MISSING else "none" if current in (None, (), {}) else str(current)
            )
            rows.append((item.name, _kind_name(kind), default, _source_comments(cls).get(item.name, "")))
    return rows  # type: ignore[return-value]


def _kind_name(kind: Any) -> str:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, options))
    if typing.get_origin(kind) is tuple:
        return f"{options[0].__name__},..."
    if typing.get_origin(kind) is dict:
        return ".NAME any"
    if options:
        return " or ".join("none" if option is type(None) else _kind_name(option) for option in options)
    return str(kind.__name__)


@functools.cache
def _source_comments(cls: type) -> dict[str, str]:
    """The comment behind each field, so that --help and the source cannot disagree; inherited ones, too."""
    comments: dict[str, str] = {}
    for each in reversed([each for each in cls.__mro__ if dataclasses.is_dataclass(each)]):
        fields = re.findall(r"^    (\w+): [^#\n]*(?:  # ([^\n]*))?$", inspect.getsource(each), re.MULTILINE)
        comments.update({name: comment for name, comment in fields if comment or name not in comments})
    return comments
