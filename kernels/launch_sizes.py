"""The sizes that the Triton kernels are launched with: a card's tuned ones where a file has them, else those of OWN.

`tuned.json`, beside this file, is device name -> op -> {"sizes": {name: value}, and what they were measured with}; a
file of the same form named by RLHF_FAST_TUNED goes before it, op by op. `python -m bench.gpu` measures them and
`python -m bench.gpu.tuning --apply` writes them.

Sizes depend on the card alone and never on what a call is given, so a row has the same bits in any batch, whatever
they are. But most set the order in which numbers are added, so cards with other sizes have other last bits. Not so
STAGES and kl_estimate's; hardly ever sequence_sum's, pair_loss's and sample's, whose sums are float64.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

OWN: dict[str, dict[str, int]] = {
    "token_logprobs": {"SEGMENT": 8192, "WARPS": 8},  # columns; 32 a thread
    "full_kl": {"SEGMENT": 4096, "WARPS": 8},  # columns of both sides; 16 + 16 a thread
    "paged_attention": {"PART": 256, "STAGES": 2, "WARPS": 4},  # with 3 stages, float32 spills on sm_120
    "gae": {"BLOCK": 1024, "WARPS": 4},  # tokens of a sequence at a time
    "ppo_loss": {"RANGE": 1024, "WARPS": 4},  # tokens of a program
    "sample": {"BLOCK": 2048, "WARPS": 8},  # columns at a time
    "kl_estimate": {"BLOCK": 1024, "WARPS": 4},  # tokens of a program
    "sequence_sum": {"BLOCK": 1024, "WARPS": 4},  # tokens of a sequence at a time
    "pair_loss": {"BLOCK": 256, "WARPS": 4},  # pairs at a time
}
# The least and the most. Segments of fewer columns would have more states in a row than a program holds.
LIMITS = {
    "WARPS": (1, 32),
    "STAGES": (1, 8),
    "SEGMENT": (256, 65536),
    "PART": (16, 65536),
    "RANGE": (16, 65536),
    "BLOCK": (16, 65536),
}
TUNED = Path(__file__).with_name("tuned.json")

Content = dict[str, dict[str, dict[str, Any]]]  # device name -> op -> {"sizes": {name: value}, ...}
_known: dict[tuple[str, torch.device], Mapping[str, int]] = {}


def sizes(op: str, device: torch.device) -> Mapping[str, int]:
    """Look up what an op's kernels are launched with on the device of its tensors: name -> value.

    Found out once for each op and device. ValueError if a file of sizes is not one (see ``check``).
    """
    known = _known.get((op, device))
    if known is None:
        known = _known[op, device] = _find(op, device_name(device))
    return known


def _find(op: str, name: str) -> Mapping[str, int]:
    own_file = os.environ.get("RLHF_FAST_TUNED")
    for path in (Path(own_file) if own_file else None, TUNED):
        entry = read(path).get(name, {}).get(op) if path is not None else None
        if entry is not None:
            return {**OWN[op], **entry["sizes"]}
    return OWN[op]


def device_name(device: torch.device) -> str:
    """Name a device as a file of sizes does: "cpu" is Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read(path: Path) -> Content:
    """The content of a file of sizes. ValueError if it cannot be read or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a file of launch sizes (RLHF_FAST_TUNED): {error}") from None
    return check(content, str(path))


def check(content: Any, source: str) -> Content:
    """The content itself, if all of it is what a file of sizes may hold, else ValueError.

    An error and no warning, whichever card the entry is of: a file is read because somebody asked for its sizes, and
    one that is passed over would leave them timing the kernel's own.
    """
    for device, ops in _items(content, source, "device name"):
        for op, entry in _items(ops, f"{source}: {device!r}", "op"):
            where = f"{source}: {device!r}: {op!r}"
            if op not in OWN:
                raise ValueError(f"{where}: no op of that name has sizes; those that have are {', '.join(OWN)}")
            fields = dict(_items(entry, where, "'sizes'"))
            for name, value in _items(fields.get("sizes"), f"{where}: 'sizes'", "name"):
                if name not in OWN[op]:
                    raise ValueError(f"{where}: no size {name!r}; it has {', '.join(OWN[op])}")
                least, most = LIMITS[name]
                whole = type(value) is int and least <= value <= most
                if not whole or (name != "STAGES" and value & (value - 1)):
                    kind = "an integer" if name == "STAGES" else "a power of two"
                    raise ValueError(f"{where}: {name} is {value!r:.40}, expected {kind} from {least} to {most}")
    checked: Content = content
    return checked


def _items(x: Any, where: str, key: str) -> Any:
    if not isinstance(x, dict):
        raise ValueError(f"{where}: expected an object {{{key}: ...}}, got {x!r:.60}")
    return x.items()


@contextlib.contextmanager
def trying(op: str, device: torch.device, changes: dict[str, int]) -> Iterator[None]:
    """Apply these changes to the op's own sizes within a block, whatever the files say; for benchmarks and tests."""
    key = op, torch.empty(0, device=device).device  # with the index that tensors have
    before = _known.get(key)
    _known[key] = {**OWN[op], **changes}
    try:
        yield
    finally:
        _known.pop(key)
        if before is not None:
            _known[key] = before
