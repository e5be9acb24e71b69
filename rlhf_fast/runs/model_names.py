"""Tell what the name of a model means, and whether all of it is there: seen from the files alone.

Reads no weights and imports no torch, so that a wrong name is an error at once. `models.load` asks here too.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

DEMO = "smollm2-135m"  # models/smollm2.py makes its folder
EXPECTED = f"expected the folder of a model or of a run, a hub name (owner/name) or {DEMO}"
HUB_SECONDS = 2.0  # that the hub has to take a connection
_STEP = re.compile(r"step-(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_TOKENIZERS = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken")
Kind = Literal["policy", "reward"]


def check(name: str | Path, setting: str = "model", kind: Kind = "policy") -> None:
    """Refuse a name that no model can be loaded from, in words that name the setting; for before anything is loaded.

    Raises:
        FileNotFoundError: there is no such folder, it holds no model, or the hub does not have it now.
        ValueError: the model is not all there, or of another kind.
    """
    resolved = find(name, setting)
    if resolved == DEMO:
        if kind == "reward":
            raise ValueError(f"{setting}: {DEMO} is a language model, not a reward model; {_reward_advice(name)}")
        return
    if not Path(resolved).is_dir():
        require_reachable(resolved, setting)
        return
    require_whole(Path(resolved), setting)
    said = _kind(Path(resolved))
    if kind == "reward" and said == "policy":
        raise ValueError(f"{setting}: {name} is a language model, not a reward model; {_reward_advice(name)}")
    if kind == "policy" and said == "reward":
        raise ValueError(f"{setting}: {name} is a reward model, not a language model; give a policy, such as runs/sft")


def find(name: str | Path, setting: str = "model") -> str:
    """The folder that a name means (absolute; of a run the checkpoint that it chose, of one that is not finished its
    newest), a hub name, or DEMO.

    Raises:
        FileNotFoundError: it is none of these; the message says what was looked for, and what is nearest.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_checkpoint(path.absolute(), setting))  # an adapter records it, and may be loaded from elsewhere
    if str(name) == DEMO or (path.is_absolute() and path.name == DEMO):
        return DEMO  # also when an adapter was made where the cache lay elsewhere
    if path.is_file():
        parent = f"; {path.parent} may be what is meant" if is_checkpoint(path.parent) else ""
        raise FileNotFoundError(f"{setting}: {name} is a file; {EXPECTED}{parent}")
    if _is_path(name):
        raise FileNotFoundError(f"{setting}: there is no folder {name}{_nearest(path)}; {EXPECTED}")
    if _HUB_NAME.fullmatch(str(name)):
        return str(name)
    near = difflib.get_close_matches(str(name), [DEMO, *_models_in(Path("."))], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"{setting}: {str(name)!r} is neither a folder nor a hub name (owner/name) nor {DEMO!r}{hint}"
    )


def is_checkpoint(path: Path) -> bool:
    return any((path / name).exists() for name in _CONFIGS)


def require_whole(folder: Path, setting: str = "model") -> None:
    """Refuse a folder in which a part of the model is missing or cut off, as after a copy that was interrupted; the
    base model of an adapter, too.

    Raises:
        ValueError: names the part.
        FileNotFoundError: the base model of an adapter is nowhere.
    """
    adapter = (folder / "adapter_config.json").exists()
    weights = [file for pattern in _WEIGHTS for file in folder.glob(pattern)]
    weights = [file for file in weights if file.name not in ("value_head.safetensors", "training_args.bin")]
    if adapter:
        weights = [file for file in weights if file.name.startswith("adapter_model")]
    for index in folder.glob("*.index.json"):
        shards = set(_json(index, setting).get("weight_map", {}).values())
        if gone := sorted(str(name) for name in shards if not (folder / str(name)).is_file()):
            reason = f"{len(gone)} of its {len(shards)} files of weights are missing, the first is {gone[0]}"
            raise ValueError(_unreadable(folder, setting, reason))
    if not weights:
        name = "adapter_model.safetensors" if adapter else "model.safetensors"
        raise ValueError(_unreadable(folder, setting, f"it holds no weights, such as {name}"))
    for file in weights:
        if file.suffix == ".safetensors" and (fault := _fault(file)):
            raise ValueError(_unreadable(folder, setting, f"{file.name} {fault}"))
    if not any(file for pattern in _TOKENIZERS for file in folder.glob(pattern)):
        raise ValueError(
            f"{setting}: {folder} holds no tokenizer (tokenizer.json); copy that of the model it was made from into it"
        )
    if adapter:
        base = _json(folder / "adapter_config.json", setting).get("base_model_name_or_path")
        try:
            base = find(base) if base else DEMO  # one that is not named is an error of loading
        except FileNotFoundError as error:
            reason = str(error).removeprefix("model: ")
            raise FileNotFoundError(
                f"{setting}: the base model of the adapter in {folder} is missing: {reason}"
            ) from error
        if Path(base).is_dir():
            require_whole(Path(base), setting)


def require_reachable(name: str, setting: str = "model") -> None:
    """Refuse a hub name that is neither in the hub's cache nor to be had now, without trying for a minute.

    One that is in the cache while the hub is away is read from there, if huggingface_hub is not yet imported.

    Raises:
        FileNotFoundError: says why it is not to be had.
    """
    offline = _is_offline()
    reason = None if offline or _uses_proxy() else _unreachable(_endpoint())
    if not offline and reason is None:
        return
    why = "HF_HUB_OFFLINE is set" if offline else f"no connection to {_endpoint()}: {reason}"
    if not _is_cached(name):
        here = Path(name)
        near = _nearest(here) if here.parent.is_dir() else ""
        raise FileNotFoundError(
            f"{setting}: {name!r} was not found: there is no such folder{near}, it is not in the hub's cache, and the "
            f"hub cannot be reached ({why}); {EXPECTED}"
        )
    if not offline and "huggingface_hub" not in sys.modules:  # which reads the variable when it is imported
        print(f"{name}: read from the cache, as the hub cannot be reached ({why})", file=sys.stderr)
        os.environ["HF_HUB_OFFLINE"] = "1"


# Folders -------------------------------------------------------------------------------------------------------------


def _checkpoint(path: Path, setting: str) -> Path:
    """The folder of the model in `path`: itself, or a checkpoint of the run there."""
    if is_checkpoint(path):
        return path
    steps = [child for child in (path / "checkpoints").glob("step-*") if _STEP.fullmatch(child.name)]
    if outcome := _outcome(path):
        return outcome
    if steps:
        return max(steps, key=lambda child: int(child.name.removeprefix("step-")))
    raise FileNotFoundError(f"{setting}: {_no_model(path)}")


def _outcome(path: Path) -> Path | None:
    """The checkpoint that a finished run names as its outcome."""
    try:
        name = json.loads((path / "result.json").read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):  # no run, one that is not finished, or of an older version
        return None
    checkpoint = path / "checkpoints" / str(name)
    return checkpoint if _STEP.fullmatch(checkpoint.name) and is_checkpoint(checkpoint) else None


def _no_model(path: Path) -> str:
    """Say what is wrong with a folder that exists."""
    if not any(path.iterdir()):
        return f"the folder {path} is empty; {EXPECTED}"
    if (path / "config.yaml").exists() and not (path / "result.json").exists() and not _models_in(path):
        return f"the run in {path} has kept no checkpoint yet; the same command that began it goes on with it"
    inside = _models_in(path)
    more = f"; within it are {', '.join(inside)}: give one, such as {path / inside[-1]}" if inside else ""
    return f"the folder {path} holds neither config.json nor adapter_config.json nor checkpoints/step-N{more}"


def _models_in(path: Path) -> list[str]:
    """The names of folders in `path` that are models or runs with one."""
    try:
        children = sorted(child for child in path.iterdir() if child.is_dir())
    except OSError:
        return []
    return [child.name for child in children if is_checkpoint(child) or any((child / "checkpoints").glob("step-*"))]


def _is_path(name: str | Path) -> bool:
    """Return whether a name that is no folder was meant as one, and not as a hub name."""
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~", "runs/")) or "\\" in text or text.endswith("/"):
        return True
    return text.count("/") > 1


def _nearest(path: Path) -> str:
    """Say what exists in place of a missing folder."""
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    if parent != path.absolute().parent:
        return f" (nor {path.absolute().parent})"
    names = _models_in(parent)
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"; did you mean {path.parent / near[0]}?"
    return f" ({parent} has {_listed(names)})"


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "no model in it"


# Models --------------------------------------------------------------------------------------------------------------


def _kind(folder: Path) -> Kind | None:
    """Read what a checkpoint says that it is; None when it does not say."""
    if (folder / "adapter_config.json").exists():
        return {"SEQ_CLS": "reward", "CAUSAL_LM": "policy"}.get(  # type: ignore[return-value]
            str(_json(folder / "adapter_config.json", "model").get("task_type"))
        )
    architectures = _json(folder / "config.json", "model").get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "reward"
    return "policy" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) else None


def _reward_advice(name: str | Path) -> str:
    """Say what to give in place of a language model that was named as a reward."""
    parent = Path(name).expanduser().parent
    others = [parent / other for other in _models_in(parent)]
    if rewards := [other for other in others if is_reward(other)]:
        return f"{rewards[0]} is one"
    return (
        f"train one (rlhf-fast reward --model {name} --data COMPARISONS --out runs/reward), or give rule:NAME, "
        "FILE.py:function or a URL (docs/rewards.md)"
    )


def is_reward(name: str | Path) -> bool:
    """Return whether a name is that of a reward model, as far as its files say."""
    try:
        return _kind(Path(find(name))) == "reward"
    except (OSError, ValueError):  # damaged, and not what was asked about
        return False


def _json(file: Path, setting: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(file.parent, setting, f"{file.name}: {error}")) from error
    if not isinstance(content, dict):
        raise ValueError(_unreadable(file.parent, setting, f"{file.name} holds no object {{...}}"))
    return content


def _unreadable(folder: Path, setting: str, reason: str) -> str:
    return f"{setting}: {folder} cannot be read ({reason}); if it is damaged, save or download it again"


def _fault(file: Path) -> str:
    """Say what is wrong with a safetensors file by its length and its header, empty for nothing."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            return f"is damaged or cut off: it has {size:,} bytes, fewer than its header says that it takes"
        try:
            header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is damaged: its header is no JSON of tensors"
    return "" if size >= expected else f"is cut off: it has {size:,} of {expected:,} bytes"


# The hub -------------------------------------------------------------------------------------------------------------


def _is_offline() -> bool:
    loaded = sys.modules.get("huggingface_hub.constants")
    if loaded is not None:
        return bool(loaded.HF_HUB_OFFLINE)
    words = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    return any((word or "").upper() in ("1", "ON", "YES", "TRUE") for word in words)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _uses_proxy() -> bool:
    """Return whether a proxy is used, in which case a connection of one's own says nothing."""
    return any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))


@functools.cache
def _unreachable(endpoint: str) -> str | None:
    """Say why the hub takes no connection, None if it does. In a thread: looking up an address has no time limit."""
    parts, reasons = urlsplit(endpoint), ["no answer"]
    address = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)

    def connect() -> None:
        try:
            socket.create_connection(address, HUB_SECONDS).close()
            reasons.clear()
        except OSError as error:
            reasons[:] = [error.strerror or str(error)]

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return reasons[0] if reasons else None


def _is_cached(name: str) -> bool:
    """Return whether a snapshot of a hub's model with a config is in the cache."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(is_checkpoint(snapshot) for snapshot in snapshots.glob("*"))
