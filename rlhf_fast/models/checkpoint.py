"""Checkpoint folders: finding the one that a name means, and saving one in the layout of transformers and peft."""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast import __version__
from rlhf_fast.models import smollm2
from rlhf_fast.runs.files import named_errors, write_folder_atomic
from rlhf_fast.runs.model_names import find, is_checkpoint

LONGEST_REASON = 300  # characters of what another library says


def resolve(name: str | Path) -> str:
    """The folder or hub name that `name` means (`model_names.find`); that of the demo's model is made if need be.

    Raises:
        FileNotFoundError: when it means nothing; the message says what was looked for.
    """
    resolved = find(name)
    return str(smollm2.folder()) if resolved == smollm2.NAME else resolved


def save(
    path: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    card: str = "",
) -> None:
    """Write a checkpoint folder at once: safetensors that transformers or peft load unchanged, and the tokenizer.

    `extra` goes beside it as `rlhf_fast.json` (reward normalisation, controller state), `tensors` (a critic) as
    `value_head.safetensors`, `card` as `README.md`. Nothing is left behind when writing fails.

    Raises:
        ValueError: an adapter on a model that is not itself saved anywhere, so that it could never be loaded.
        OSError: it cannot be written, or `path` is a folder of something else; the message says why.
    """
    if path.is_dir() and any(path.iterdir()) and not is_checkpoint(path):
        raise FileExistsError(f"{path} is a folder that holds no model; it is not replaced: choose another one")
    if isinstance(model, PeftModel) and not getattr(model.get_base_model(), "name_or_path", None):
        raise ValueError(
            "model: the adapter's base model was made from a config and is nowhere saved; "
            "save it and load it from there before adding the adapter"
        )

    def fill(folder: Path) -> None:
        try:
            write(folder)
        except SafetensorError as error:  # a full disk too: the error number is in the text
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error

    def write(folder: Path) -> None:
        # Embeddings are never trained beside an adapter; left to itself, peft asks a model hub whether they were.
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's, in which everything is yet to be filled in
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if tensors:
            save_file({key: x.contiguous() for key, x in tensors.items()}, folder / "value_head.safetensors")
        if extra is not None:
            (folder / "rlhf_fast.json").write_text(json.dumps(extra, indent=2) + "\n", encoding="utf-8")

    with named_errors(path):
        write_folder_atomic(path, fill)


def card(name: str | Path, is_reward: bool) -> str:
    """A README.md of a model in Markdown: what it is, how it is loaded, and with what settings its run made it."""
    config = Path(name) / "config.yaml"
    made = (
        "\n".join(f"    {line}" for line in config.read_text("utf-8", "replace").splitlines())
        if config.is_file()
        else ""
    )
    auto = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    return (
        "---\nlibrary_name: transformers\ntags: [rlhf-fast]\n---\n\n"
        f"# {'A reward model' if is_reward else 'A language model'} made with rlhf-fast {__version__}\n\n"
        f"    from transformers import {auto}, AutoTokenizer\n"
        f'    model, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        + (f"\nThe settings of its last run:\n\n{made}\n" if made else "")
    )


def read_extra(folder: str | Path) -> dict[str, Any]:
    """Read what `save` stored as `extra`; empty when there is none."""
    file = Path(folder) / "rlhf_fast.json"
    if not file.exists():
        return {}
    with reading_errors(str(folder)):
        extra: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return extra


@contextlib.contextmanager
def reading_errors(folder: str) -> Iterator[None]:
    """The many errors of transformers, safetensors and torch on what they cannot read, as one that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        if "ignore_mismatched_sizes" in reason:  # advice to somebody who calls transformers
            reason = "its weights have other shapes than its config.json says"
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to open it all the same
            reason = "its weights are a pickle of more than tensors, which is not opened"
        if Path(folder).is_dir():
            raise ValueError(
                f"model: {folder} cannot be read ({reason}); if it is damaged, save or download it again"
            ) from error
        if isinstance(error, OSError):
            raise FileNotFoundError(f"model: {folder!r} was not found, or cannot be reached: {reason}") from error
        raise ValueError(f"model: {folder!r} cannot be used ({reason})") from error
