from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import _dispatch


def call() -> Tensor:
    return ops.sequence_sum(torch.ones(2, 3))


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use_backend("reference"):
        assert call().tolist() == [3, 3]
    monkeypatch.setenv("RLHF_FAST_BACKEND", "reference")
    assert call().tolist() == [3, 3]


def test_an_unknown_backend_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use_backend: 'tritn' is not a backend, did you mean 'triton'"):
        ops.use_backend("tritn")
    monkeypatch.setenv("RLHF_FAST_BACKEND", "referense")
    with pytest.raises(ValueError, match="RLHF_FAST_BACKEND: 'referense' is not a backend, did you mean 'reference'"):
        call()


def test_a_backend_outside_this_build_is_an_error_that_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "IN_THIS_BUILD", ("reference",))
    with pytest.raises(RuntimeError, match="use_backend: backend 'cuda' is not in this build, which has reference"):
        ops.use_backend("cuda")
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="RLHF_FAST_BACKEND: backend 'cuda' is not in this build"):
        call()


def test_an_op_that_lacks_the_chosen_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "IN_THIS_BUILD", ("reference", "cpu"))
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="gae: has no 'cpu' backend; it has reference"):
        _dispatch.choose("gae", {"reference": call})


def test_scopes_nest_win_over_the_environment_and_end_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "IN_THIS_BUILD", _dispatch.KNOWN)
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cuda")
    table = {name: (lambda name=name: name) for name in _dispatch.KNOWN}
    with ops.use_backend("cpu"):
        with pytest.raises(KeyError), ops.use_backend("triton"):
            assert _dispatch.choose("op", table)() == "triton"
            raise KeyError
        assert _dispatch.choose("op", table)() == "cpu"
    assert _dispatch.choose("op", table)() == "cuda"
    monkeypatch.delenv("RLHF_FAST_BACKEND")
    assert _dispatch.choose("op", table)() == "reference"


def test_a_scope_is_local_to_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "IN_THIS_BUILD", _dispatch.KNOWN)
    table = {name: (lambda name=name: name) for name in _dispatch.KNOWN}
    seen = []
    with ops.use_backend("cpu"):
        other = threading.Thread(target=lambda: seen.append(_dispatch.choose("op", table)()))
        other.start()
        other.join()
    assert seen == ["reference"]


def test_importing_ops_needs_torch_only() -> None:
    heavy = "transformers", "peft", "safetensors", "triton", "datasets", "torch._dynamo"
    code = (
        "import sys, torch; before = set(sys.modules); import rlhf_fast.ops; "
        f"print(sorted((set(sys.modules) - before) & set({heavy!r})))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
