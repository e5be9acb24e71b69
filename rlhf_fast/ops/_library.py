"""An op in both worlds: eager calls run its Python function at once, traced ones see ``torch.ops.rlhf_fast.<name>``.

The dispatcher costs more than a small kernel does, so it is passed by wherever nothing would look: no torch.compile, no
dispatch mode, no functorch transform, no tensor subclass. Both ways run the same functions and give the same bits.

Autocast has no say: no input is cast, and what an op multiplies, it multiplies in its own dtypes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Union, get_args, get_type_hints

import torch
from torch import Tensor

from rlhf_fast.ops._rows import is_plain

_library = torch.library.Library("rlhf_fast", "DEF")


class Op:
    """``forward`` as a differentiable op.

    Args:
        forward: takes tensors, numbers, strings and None by position, all annotated (they become the schema); returns a
            tensor or a tuple of fresh tensors, and changes no input.
        fake: the same signature; returns empty tensors of the right shape, dtype and device.
        setup_context: ``(ctx, inputs, output)``, saves what backward needs.
        backward: ``(ctx, *grads)``, returns the gradients by the names of forward's parameters; those that it leaves
            out are None. Without the two, a gradient asked for raises.
        inference: what runs in place of forward when no gradient can be asked for; may leave out what only that needs.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        inference: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name = forward.__name__
        if setup_context is None or backward is None:
            setup_context, backward = _nothing_saved, _no_gradient(name)
        backward = _in_order(name, backward, places(forward))
        _library.define(name + torch.library.infer_schema(forward, mutates_args=()))
        _library.impl(name, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=_library)
        torch.library.register_autograd(f"rlhf_fast::{name}", backward, setup_context=setup_context, lib=_library)
        self.registered = getattr(torch.ops.rlhf_fast, name).default
        self.eager = _eager_function(name, forward, setup_context, backward)
        self.transformed = _transformed_function(name, forward, setup_context, backward)
        self.inference = inference or forward

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.registered(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not is_plain(tensors):
            transformed = torch._C._are_functorch_transforms_active()
            return self.transformed(*args) if transformed else self.registered(*args)
        if torch.is_grad_enabled() and any([x.requires_grad for x in tensors]):
            return self.eager(*args)
        return self.inference(*args)


def places(forward: Callable[..., Any]) -> dict[str, int]:
    """Places of the parameters among the inputs that setup_context and the fake are given, by name."""
    return {name: place for place, name in enumerate(inspect.signature(forward).parameters)}


def flattened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``function`` a signature with the fields of each named tuple in place of it: torch.library knows no tuples.

    A caller packs by ``*``, in the order of the fields; arguments are unpacked here and nowhere else.
    """
    hints, parameters = get_type_hints(function), list[inspect.Parameter]()
    parts = []
    for name in inspect.signature(function).parameters:
        kind, begin = hints[name], len(parameters)
        fields = get_type_hints(kind) if hasattr(kind, "_fields") else {name: kind}
        parameters += [
            inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_optional(of))
            for field, of in fields.items()
        ]
        parts.append((kind if hasattr(kind, "_fields") else None, begin, len(parameters)))

    as_tuple = tuple.__new__  # twice as fast as the named tuple's own

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*[args[i] if kind is None else as_tuple(kind, args[i:end]) for kind, i, end in parts])

    call.__signature__ = inspect.Signature(parameters, return_annotation=hints["return"])  # type: ignore[attr-defined]
    return call


def _optional(annotation: Any) -> Any:
    """Rewrite ``X | None`` as ``Optional[X]``, the one form that torch.library knows."""
    return Union[get_args(annotation)] if type(None) in get_args(annotation) else annotation  # noqa: UP007


def _in_order(name: str, backward: Callable[..., Any], inputs: dict[str, int]) -> Callable[..., Any]:
    """Backward pass that returns a gradient for each of the inputs, None where there is none, as autograd asks."""

    def backward_in_order(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        gradients: list[Any] = [None] * len(inputs)
        for x, gradient in backward(ctx, *grads).items():
            if x not in inputs:
                raise TypeError(f"{name}: a gradient in {x}, expected one in some of {', '.join(inputs)}")
            gradients[inputs[x]] = gradient
        return tuple(gradients)

    return backward_in_order


def _eager_function(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """forward with its gradient as a torch.autograd.Function; of the two styles that torch has, the faster one."""

    def forward_with_context(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward_with_context), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def _transformed_function(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """forward with its gradient in torch's other style, for torch.func.grad; torch.func.vmap is refused."""

    def vmap(*_: Any) -> Any:
        raise RuntimeError(f"{name}: torch.func.vmap is not supported; pass the whole batch, rows are independent")

    members = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    static = {key: staticmethod(function) for key, function in members.items()}
    return type(name, (torch.autograd.Function,), static).apply  # type: ignore[attr-defined]


def _nothing_saved(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: has no gradient; with ops.use_backend('reference') it has")

    return backward
