"""Checks at the public boundary: the argument's name, what came, what was expected.

Types, shapes and devices are always checked. Values are checked where looking at them is free, which is on a CPU;
on other devices it would wait for the device, so there they are checked only under ``RLHF_FAST_DEBUG=1``.
"""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.ops import compiled
from rlhf_fast.ops._rows import is_plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
LEAST_TEMPERATURE = 2.0**-149  # the smallest float32
LOW_TEMPERATURE = 1e-20  # below it a logit of a model, divided, may leave the range of float32


def values_are_checked(x: Tensor) -> bool:
    """Return whether the values of x may be looked at; never while something traces."""
    if torch.compiler.is_compiling() or not is_plain([x]):
        return False
    return x.device.type == "cpu" or os.environ.get("RLHF_FAST_DEBUG") == "1"


def _dtype(name: str, x: object, allowed: Sequence[torch.dtype]) -> None:
    if isinstance(x, Tensor) and x.dtype in allowed:
        return
    expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__}, expected a tensor of {expected}")
    raise TypeError(f"{name}: {str(x.dtype).removeprefix('torch.')}, expected {expected}")


def floats(**tensors: Tensor | None) -> None:
    """Require floating-point tensors (or None)."""
    for name, x in tensors.items():
        if x is not None and not (type(x) is Tensor and x.dtype in FLOATS):
            _dtype(name, x, FLOATS)


def are_alike(tensors: Sequence[Tensor | None], shape: Sequence[int]) -> bool:
    """Return whether all are floating-point tensors of one shape and device. The checks by name say which is not."""
    given = [x for x in tensors if x is not None]
    device = given[0].device if isinstance(given[0], Tensor) else None
    return all([type(x) is Tensor and x.shape == shape and x.dtype in FLOATS and x.device == device for x in given])


def integers(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            _dtype(name, x, INTEGERS)


def devices(**tensors: object) -> None:
    """Require all tensors on the device of the first."""
    first = None
    for name, x in tensors.items():
        if isinstance(x, Tensor):
            if first is None:
                first, like = x.device, name
            elif x.device != first:
                raise ValueError(f"{name}: on {x.device}, expected {first} like {like}")


def shapes(expected: Sequence[int], like: str, **tensors: Tensor | None) -> None:
    """Require exactly the expected shape of each tensor; ``like`` says whose shape that is."""
    for name, x in tensors.items():
        if x is not None and x.shape != expected and tuple(x.shape) != tuple(expected):
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {tuple(expected)} like {like}")


def masks(expected: Sequence[int], like: str, mask: Tensor | None) -> None:
    if mask is not None:
        _dtype("mask", mask, (torch.bool,))
        shapes(expected, like, mask=mask)


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """value is a number with above < value, least <= value <= most; NaN never is."""
    if type(value) is float:  # at once, for most are
        x = value
    elif isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name}: {type(value).__name__}, expected a number")
    else:
        x = float(value)
    inside = x == x and (above is None or x > above) and (least is None or x >= least) and (most is None or x <= most)
    if not inside:
        bounds = [f"> {above}"] if above is not None else []
        bounds += [f">= {least}"] if least is not None else []
        bounds += [f"<= {most}"] if most is not None else []
        raise ValueError(f"{name}: {value}, expected a number {' and '.join(bounds)}".rstrip())


def option(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name}: {value!r}, did you mean {nearest!r}? Known: {', '.join(known)}")


def denominators(denominator: float | Tensor | None) -> None:
    """None, a number > 0, or a tensor of one element >= 0."""
    if denominator is None:
        return
    if not isinstance(denominator, Tensor):
        return number("denominator", denominator, above=0)
    if denominator.dim() != 0:
        raise ValueError(f"denominator: shape {tuple(denominator.shape)}, expected a number or a tensor of shape ()")
    if values_are_checked(denominator) and not bool(denominator >= 0):
        raise ValueError(f"denominator: {float(denominator)}, expected a number >= 0")


def _first(bad: Tensor) -> tuple[tuple[int, ...], str]:
    """The index of the first True and how a message spells it: 17, or (2, 5) when rows have two indices."""
    index = tuple(bad.nonzero()[0].tolist())
    return index, str(index[0]) if len(index) == 1 else str(index)


def vocabulary(tokens: Tensor, size: int, mask: Tensor | None = None) -> None:
    """Require every unmasked token in [0, size)."""
    if not values_are_checked(tokens):
        return
    first = compiled.first_outside(tokens, size, mask)
    if first == -1:
        return
    bad = (tokens < 0) | (tokens >= size)
    bad = bad if mask is None else bad & mask
    if first is not None or bool(bad.any()):
        index, row = _first(bad)
        raise ValueError(f"tokens: {int(tokens[index])} is outside the vocabulary of {size} (row {row})")


def temperatures(temperature: float | Tensor, rows: Sequence[int], mask: Tensor | None) -> None:
    """A number > 0, at least the smallest float32, or a tensor of such that broadcasts to one per row."""
    if not isinstance(temperature, Tensor):
        number("temperature", temperature, above=0)
        if temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature: {temperature}, expected at least 1.4e-45, the smallest float32")
        return
    _dtype("temperature", temperature, FLOATS)
    fits = temperature.dim() <= len(rows)
    fits = fits and all(a in (1, b) for a, b in zip(reversed(temperature.shape), reversed(rows), strict=False))
    if not fits:
        raise ValueError(f"temperature: shape {tuple(temperature.shape)}, expected it to broadcast to {tuple(rows)}")
    if values_are_checked(temperature):
        bad = ~(temperature >= LEAST_TEMPERATURE).expand(tuple(rows))
        bad = bad if mask is None else bad & mask
        if bool(bad.any()):
            index, row = _first(bad)
            value = float(temperature.expand(tuple(rows))[index])
            least = " and at least 1.4e-45, the smallest float32" if value > 0 else ""
            raise ValueError(f"temperature: {value:g} (row {row}), expected > 0{least}")


def is_low(temperature: float | Tensor, mask: Tensor | None) -> bool:
    """Return whether a temperature divides logits of unmasked rows in float64; looked at where that is free."""
    if not isinstance(temperature, Tensor):
        return temperature < LOW_TEMPERATURE
    if not values_are_checked(temperature):
        return False
    low = temperature < LOW_TEMPERATURE
    if mask is not None and bool(low.any()):
        low = low & mask
    return bool(low.any())


def transforms(
    temperature: float | Tensor, rows: Sequence[int], mask: Tensor | None, softcap: float | None, logit_scale: float
) -> None:
    """Check what is done to a logit: a temperature a row or for all, a soft cap, a scale; all > 0."""
    temperatures(temperature, rows, mask)
    if softcap is not None:
        number("softcap", softcap, above=0)
    number("logit_scale", logit_scale, above=0)


def scoring(
    rows: Sequence[int],
    rows_of: str,
    size: int,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Check what ops that score tokens share: one token, mask and temperature per row of a vocabulary of ``size``."""
    integers(tokens=tokens)
    shapes(rows, f"the rows of {rows_of}", tokens=tokens)
    masks(rows, f"the rows of {rows_of}", mask)
    if size == 0:
        raise ValueError(f"{rows_of}: an empty vocabulary, expected at least one token")
    transforms(temperature, rows, mask, softcap, logit_scale)
    vocabulary(tokens, size, mask)


def labels(
    rows: Sequence[int], rows_of: str, size: int, tokens: Tensor, mask: Tensor | None, ignore_index: int
) -> None:
    """Require one token per row, in the vocabulary unless it is masked or ignore_index."""
    integers(tokens=tokens)
    shapes(rows, f"the rows of {rows_of}", tokens=tokens)
    masks(rows, f"the rows of {rows_of}", mask)
    if size == 0:
        raise ValueError(f"{rows_of}: an empty vocabulary, expected at least one token")
    if values_are_checked(tokens):
        counted = tokens != ignore_index
        vocabulary(tokens, size, counted if mask is None else counted & mask)


def pairs(chosen: Tensor, weights: Tensor | None = None, **tensors: Tensor | None) -> None:
    """Require float tensors of shape (P,), and no negative weight."""
    tensors = {**tensors, "weights": weights}
    if not isinstance(chosen, Tensor) or chosen.dim() != 1 or not are_alike([chosen, *tensors.values()], chosen.shape):
        floats(chosen=chosen, **tensors)
        devices(chosen=chosen, **tensors)
        if chosen.dim() != 1:
            raise ValueError(f"chosen: shape {tuple(chosen.shape)}, expected (P,)")
        shapes(chosen.shape, "chosen", **tensors)
    if weights is not None and values_are_checked(weights) and bool((negative := weights < 0).any()):
        at = int(negative.nonzero()[0, 0])
        raise ValueError(f"weights: {float(weights[at])} at {at}, expected none below 0")


def linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple[Tensor, Tensor, float] | None = None
) -> None:
    """hidden (..., H), weight (V, H), bias (V,), lora ((r, H), (V, r), number)."""
    floats(hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (V, H)")
    if hidden.dim() and hidden.shape[-1] == weight.shape[0] != weight.shape[1]:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}, which is (H, V) for hidden of {tuple(hidden.shape)}; expected (V, "
            "H): give weight.T"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}, expected (..., {weight.shape[1]}) to match weight")
    shapes((weight.shape[0],), "the rows of weight", bias=bias)
    if lora is None:
        return
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"lora: {type(lora).__name__}, expected a tuple (a (r, H), b (V, r), scaling)")
    a, b, scaling = lora
    _dtype("lora a", a, FLOATS)
    _dtype("lora b", b, FLOATS)
    if a.dim() != 2 or a.shape[1] != weight.shape[1]:
        raise ValueError(f"lora a: shape {tuple(a.shape)}, expected (r, {weight.shape[1]}) to match weight")
    if b.shape != (weight.shape[0], a.shape[0]):
        raise ValueError(
            f"lora b: shape {tuple(b.shape)}, expected {(weight.shape[0], a.shape[0])} to match weight and a"
        )
    devices(weight=weight, lora_a=a, lora_b=b)
    number("lora scaling", scaling)


def sequences(
    name: str, x: Tensor, cu_seqlens: Tensor | None, starts: str = "cu_seqlens", padded: str = "(B, T)"
) -> int:
    """x is padded (B, T), or packed (N,) with cu_seqlens (B + 1,) from 0 to N, never falling. Returns B."""
    if cu_seqlens is None:
        if x.dim() != 2:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {padded}, or (N,) with {starts}")
        return x.shape[0]
    integers(**{starts: cu_seqlens})
    if x.dim() != 1:
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected (N,) because {starts} is given")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"{starts}: shape {tuple(cu_seqlens.shape)}, expected ({padded[1]} + 1,)")
    if values_are_checked(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != x.shape[0]:
            raise ValueError(f"{starts}: runs from {first} to {last}, expected from 0 to {x.shape[0]} like {name}")
        falls = cu_seqlens.diff() < 0
        if bool(falls.any()):
            raise ValueError(f"{starts}: falls after index {_first(falls)[1]}, expected it never to")
    return cu_seqlens.numel() - 1
