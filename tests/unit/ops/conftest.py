"""The backends that a test of an op runs on.

Without a GPU: the C++ of the CPU as it is, the CUDA C++ on the CPU through tests/simt, and Triton's interpreter where
TRITON_INTERPRET=1 was set before Triton was first imported (`make test` runs tests/unit/ops a second time so). With a
GPU, Triton and CUDA on that.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import compiled, dispatch
from tests.simt import build

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _reason_to_skip(name: str) -> str | None:
    if name == "cpu":
        return None if compiled.cpu is not None else "rlhf_fast._C was not built"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None if GPU or INTERPRETED else "needs a GPU, or TRITON_INTERPRET=1"
    if name == "cuda" and not GPU:
        return build.missing()
    if name == "cuda":
        return None if compiled.cuda is not None else "rlhf_fast._C was built without CUDA"
    return None


def _param(name: str) -> Any:
    reason = _reason_to_skip(name)
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    if GPU and name in ("triton", "cuda"):
        marks.append(pytest.mark.gpu)
    return pytest.param(name, marks=marks)


KERNELS = [_param(name) for name in ("cpu", "cuda", "triton")]
ALL = [*KERNELS, _param("reference")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted kernels take their time: five seconds may be said of each, unless it says more of itself."""
    for item in items if INTERPRETED else ():
        if item.get_closest_marker("seconds") is None:
            item.add_marker(pytest.mark.seconds(5))


@pytest.fixture(scope="module", autouse=True)
def several_threads() -> Iterator[None]:
    """Kernels are to cut their work up, also where `make test` gives each process one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if INTERPRETED else max(before, 2))
    yield
    torch.set_num_threads(before)


def _round_to_bfloat16_as_hardware_does() -> None:
    """Triton's interpreter cuts float32 off where a GPU rounds it to the nearest bfloat16, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return convert(x, source, target, rounding_mode)

    interpreter._convert_float = rounded


def _add_in_a_tree_as_hardware_does() -> None:
    """Triton's interpreter adds the elements of an outer axis one after another; a GPU's threads, and numpy along an
    inner axis, add in a tree. In float32 that is a digit."""
    import numpy as np
    from triton.runtime import interpreter

    add = interpreter.ReduceOps.sum

    def added(self: Any, x: Any) -> Any:
        data = x.handle.data
        if self.axis is None or self.keep_dims or data.ndim == 1:
            return add(self, x)
        return self.to_tensor(np.ascontiguousarray(np.moveaxis(data, self.axis, -1)).sum(-1), x.dtype)

    interpreter.ReduceOps.sum = added


def _multiply_in_one_order_as_hardware_does() -> None:
    """Triton's interpreter leaves products to numpy, whose library sums a row in an order that depends on how many rows
    there are, on some processors; a GPU's units do not. Summed in float64, every order rounds to the same float32."""
    import numpy as np
    from triton.runtime import interpreter

    def multiplied(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.data.dtype != np.float32:
            return multiply(self, a, b, d, *precision)
        product = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    multiply = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = multiplied


def _prepare_the_language_once_a_launch() -> None:
    """Triton's interpreter looks through its language for what to replace at each call of a function within a kernel,
    which takes half of its time. What it finds is the same each time."""
    import inspect

    import triton.language as tl
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set[bool]()  # in this launch: of tl, or of tl.core alone

    @functools.cache
    def sees_all(function: Any) -> bool:
        return any(value is tl for value in function.__globals__.values())

    class Scope:
        """Of a launch; it is restored at the end."""

        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            replaced.clear()
            self.scope.restore()

    def once(function: Any) -> Any:
        key = sees_all(function)
        if key in replaced:
            return None
        replaced.add(key)
        return Scope(replace(function))

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def replace_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_lang, interpreter._patch_builtin = once, replace_builtins


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    _prepare_the_language_once_a_launch()
    _round_to_bfloat16_as_hardware_does()
    _add_in_a_tree_as_hardware_does()
    _multiply_in_one_order_as_hardware_does()


class Backend:
    """One backend, to call ops on: ``backend(ops.gae, rewards, values)``. Tensors go to its device and come back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cuda" if GPU and name in ("triton", "cuda") else "cpu")
        self.slow = self.device.type == "cpu" and name in ("triton", "cuda")  # interpreted

    def __call__(self, op: Any, *args: Any, **keywords: Any) -> Any:
        with ops.use_backend(self.name):
            result = op(*map(self._to, args), **{key: self._to(x) for key, x in keywords.items()})
        return _to_cpu(result)

    def _to(self, x: Any) -> Any:
        if isinstance(x, tuple):
            moved = [self._to(y) for y in x]
            return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
        if isinstance(x, list):
            return [self._to(y) for y in x]
        return x.to(self.device) if isinstance(x, Tensor) else x


def _to_cpu(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _to_cpu(y) for key, y in x.items()}
    if x is None or isinstance(x, Tensor):
        return None if x is None else x.cpu()
    return tuple(_to_cpu(y) for y in x)


@pytest.fixture
def simt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the CUDA kernels run on CPU tensors."""
    monkeypatch.setattr(compiled, "cuda", build.module().cuda)
    monkeypatch.setitem(dispatch.RUNS_ON, "cuda", ("cpu",))
    monkeypatch.delitem(dispatch.MISSING, "cuda", raising=False)


def _make(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda" and not GPU:
        request.getfixturevalue("simt")
    return Backend(request.param)


@pytest.fixture(params=ALL)
def backend(request: pytest.FixtureRequest) -> Backend:
    return _make(request)


@pytest.fixture(params=KERNELS)
def kernel_backend(request: pytest.FixtureRequest) -> Backend:
    """The backends that have kernels of their own."""
    return _make(request)


def only(*names: str) -> Any:
    """A fixture of some of the backends, for ops that do not have all."""

    @pytest.fixture(params=[_param(name) for name in names])
    def some(request: pytest.FixtureRequest) -> Backend:
        return _make(request)

    return some


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """Fills every torch.empty with nan, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
