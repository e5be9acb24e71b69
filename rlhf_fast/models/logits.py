"""Measure what a model makes of its last product, by running it on made-up values: logits = softcap(scale * product).

Settings of the same name multiply in one family and divide in the next, and some families have layers between their
trunk and the last product. So the model itself is run, with made-up states in place of its trunk's and made-up numbers
in place of its output layer's: whatever is not a scale and a soft cap is refused by the model's name.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rlhf_fast.models.inner import FAILURES, evaluating, measured_once, trunk

IDS = (5, 6, 7, 8)  # what the model is run on; of no consequence
BETWEEN = "there are layers between its trunk and its output layer"


@dataclass(frozen=True)
class Logits:
    """Scale and soft cap that turn the product of a state with the output layer's weight into a logit."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, product: torch.Tensor) -> torch.Tensor:
        product = product * self.scale
        return self.softcap * torch.tanh(product / self.softcap) if self.softcap else product


def logits_of(inner: Any) -> Logits:
    """Find scale and soft cap of a model of transformers; measured once, and kept with it and its copies.

    Raises:
        ValueError: its logits are made in another way; says which.
    """
    weight = inner.get_input_embeddings().weight
    if weight.is_meta or isinstance(weight, FakeTensor):  # without values there is nothing to run
        return Logits()
    return measured_once(inner, "logits", measured)


@torch.no_grad()
def measured(inner: Any) -> Logits:
    """Measure scale and soft cap anew; as `logits_of`, without its cache."""
    layer = inner.get_output_embeddings()
    if not isinstance(getattr(layer, "weight", None), torch.Tensor):
        _refuse(inner, "it has no output layer that is one product")
    own = {name for name, _ in layer.named_parameters(recurse=False)} - {"weight", "bias"}
    if own:
        _refuse(inner, f"its output layer has more than a weight and a bias: {', '.join(sorted(own))}")
    try:
        with evaluating(inner), _without_trunk(inner):
            return _measured(inner, layer)
    except FAILURES as error:
        if str(error).startswith("model: "):
            raise
        raise ValueError(f"model: {type(inner).__name__} cannot be used here: {error}") from error


def _measured(inner: Any, layer: Any) -> Logits:
    generator = torch.Generator().manual_seed(0)

    def powers(columns: int) -> torch.Tensor:
        """(1, rows, columns) of both signs: a number times them is that number's digits, in any dtype."""
        shape = (1, len(IDS), columns)
        signs = 1 - 2 * torch.randint(0, 2, shape, generator=generator)
        return (signs * 2.0 ** torch.randint(-4, 5, shape, generator=generator)).to(layer.weight.device)

    states, products = powers(layer.weight.shape[1]), powers(layer.weight.shape[0])  # (1, rows, H), (1, rows, V)
    entered, small = _run(inner, layer, states, products * 2.0**-24)  # where any soft cap is a line
    before, scale = (float((x / y).median()) for x, y in ((entered, states), (small, products * 2.0**-24)))
    if not before > 0:
        _refuse(inner, BETWEEN)
    if not scale > 0:
        _refuse(inner, f"its logits are {scale:g} times the products of its output layer")
    largest = float(_run(inner, layer, states, products * 2.0**30 / scale)[1].abs().max())
    made = Logits(scale, largest if largest < 2.0**30 else None)
    near = 1e-5 if inner.dtype == torch.float32 else 1e-2
    for width in (0.1, 3.0):
        states, products = powers(states.shape[-1]) * width, powers(products.shape[-1]) * width / scale
        entered, logits = _run(inner, layer, states, products)
        if not torch.allclose(entered, states * before, rtol=near, atol=0):
            _refuse(inner, BETWEEN)
        if not torch.allclose(logits, made.of(products), rtol=near, atol=near * width):
            _refuse(inner, "its logits are not the products of its output layer times a number, soft-capped or not")
    if before != 1.0 and getattr(layer, "bias", None) is not None:
        _refuse(inner, "its states are scaled before an output layer that has a bias")
    return Logits(scale * before, made.softcap)


def _run(inner: Any, layer: Any, states: torch.Tensor, products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a model: what enters the output layer, and the logits that come of its products, in float32."""
    entered: list[torch.Tensor] = []

    def of_trunk(_: nn.Module, __: Any, output: Any) -> Any:
        if output[0].shape != states.shape:
            _refuse(inner, f"{BETWEEN}, which take {output[0].shape[-1]} numbers and give {states.shape[-1]}")
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    def of_layer(given: torch.Tensor) -> torch.Tensor:  # the layer itself, whatever its dtypes, need not run
        entered.append(given.float())
        return products.clone()

    if trunk(inner) is inner:
        _refuse(inner, "it has no trunk of its own")
    hooks = [module.register_forward_hook(of_trunk) for module in _trunks(inner)]
    layer.forward = of_layer
    try:
        logits = inner(input_ids=torch.tensor([IDS], device=layer.weight.device), use_cache=False).logits.float()
    finally:
        del layer.forward
        for hook in hooks:
            hook.remove()
    if len(entered) != 1 or entered[0].shape != states.shape:
        _refuse(inner, "its output layer does not take its trunk's states, once")
    if logits.shape != products.shape:
        shapes = f"{tuple(logits.shape)}, its output layer's products {tuple(products.shape)}"
        _refuse(inner, f"its logits have the shape {shapes}")
    return entered[0], logits


def _trunks(inner: Any) -> set[nn.Module]:
    """List what may give the states to the output layer: some models call only a part of their trunk."""
    return {trunk(inner), inner.get_decoder()} - {inner}


@contextlib.contextmanager
def _without_trunk(inner: Any) -> Iterator[None]:
    """Run the trunk once within a block; later runs take its output as it was, whose states they replace anyway."""
    outputs: dict[nn.Module, Any] = {}
    before = {part: vars(part).get("forward") for part in _trunks(inner)}

    def keep(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def once(*args: Any, **kwargs: Any) -> Any:
            if module not in outputs:
                outputs[module] = forward(*args, **kwargs)
            return copy.copy(outputs[module])

        return once

    try:
        for part in before:
            part.forward = keep(part)
        yield
    finally:
        for part, forward in before.items():
            del part.forward
            if forward is not None:
                part.forward = forward


def _refuse(inner: Any, why: str) -> NoReturn:
    raise ValueError(f"model: {type(inner).__name__} makes its logits in a way not known here: {why}")
