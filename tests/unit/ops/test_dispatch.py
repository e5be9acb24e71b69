from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import dispatch


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


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("cpu", "install g\\+\\+ or clang"), ("cuda", "install the CUDA toolkit"), ("triton", "pip install triton")],
)
@pytest.mark.seconds(3)
def test_a_missing_backend_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    """In a process where nothing optional can be imported; what is left is the reference, and it runs."""
    code = (
        "import sys, importlib.util; sys.modules['rlhf_fast._C'] = None; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch; from rlhf_fast import ops\n"
        "print(ops.token_logprobs(torch.zeros(1, 4), torch.zeros(1).long())[1].item())\n"
        f"ops.use_backend({name!r})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(ran.stdout) == pytest.approx(1.3862944)
    assert re.search(f"RuntimeError: use_backend: backend '{name}' is not here: .*{remedy}", ran.stderr), ran.stderr
    monkeypatch.setitem(dispatch.MISSING, name, remedy)
    monkeypatch.setenv("RLHF_FAST_BACKEND", name)
    with pytest.raises(RuntimeError, match=f"RLHF_FAST_BACKEND: backend {name!r} is not here"):
        ops.token_logprobs(torch.zeros(1, 4), torch.zeros(1).long())


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_an_op_that_lacks_the_chosen_backend_says_so(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(dispatch, "MISSING", {})
    with ops.use_backend(name), pytest.raises(RuntimeError, match=f"whiten: has no '{name}' backend; it has reference"):
        ops.whiten(torch.ones(2))


def test_a_tensor_that_the_chosen_backend_cannot_take_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MISSING", {})
    monkeypatch.setitem(dispatch.RUNS_ON, "cuda", ("cuda",))
    with (
        ops.use_backend("cuda"),
        pytest.raises(RuntimeError, match="token_logprobs: backend 'cuda' takes tensors on cuda"),
    ):
        ops.token_logprobs(torch.zeros(1, 4), torch.zeros(1).long())
    with (
        ops.use_backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' takes float32, bfloat16 or float16, not f"),
    ):
        ops.token_logprobs(torch.zeros(1, 4).double(), torch.zeros(1).long())


ALL = ("cpu", "cuda", "triton", "reference")


def test_scopes_nest_win_over_the_environment_and_end_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MISSING", {})
    for name in ("triton", "cuda"):
        monkeypatch.setitem(dispatch.RUNS_ON, name, ("cpu",))
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cuda")
    x = torch.zeros(1)
    with ops.use_backend("cpu"):
        with pytest.raises(KeyError), ops.use_backend("triton"):
            assert dispatch.choose("op", ALL, x) == "triton"
            raise KeyError
        assert dispatch.choose("op", ALL, x) == "cpu"
    assert dispatch.choose("op", ALL, x) == "cuda"


def test_a_scope_is_local_to_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MISSING", {})
    seen = []
    with ops.use_backend("reference"):
        other = threading.Thread(target=lambda: seen.append(dispatch.choose("op", ALL, torch.zeros(1))))
        other.start()
        other.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize(
    ("x", "missing", "best"),
    [
        (torch.zeros(1), (), "cpu"),
        (torch.zeros(1, dtype=torch.bfloat16), (), "cpu"),
        (torch.zeros(1, dtype=torch.float64), (), "reference"),
        (torch.zeros(1), ("cpu",), "reference"),
        (torch.zeros(1, device="meta"), (), "reference"),
    ],
)
def test_device_and_dtype_give_the_backend(
    monkeypatch: pytest.MonkeyPatch, x: Tensor, missing: tuple[str, ...], best: str
) -> None:
    monkeypatch.setattr(dispatch, "MISSING", dict.fromkeys(missing, "gone"))
    assert dispatch.choose("op", ALL, x) == best


def test_a_gpu_takes_cuda_then_triton_then_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        device, dtype = torch.device("cuda"), torch.bfloat16

    for missing, best in (((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference")):
        monkeypatch.setattr(dispatch, "MISSING", dict.fromkeys(missing, "gone"))
        assert dispatch.choose("op", ALL, OnGPU()) == best  # type: ignore[arg-type]


def test_the_backend_asked_for_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only chosen: its kernels are called, and no others."""
    from rlhf_fast.ops import token_logprobs as function

    module = sys.modules["rlhf_fast.ops.token_logprobs"]
    real, called = module.kernels, []
    monkeypatch.setattr(module, "kernels", lambda backend: called.append(backend) or real(backend))
    with ops.use_backend("cpu"):
        function(torch.zeros(1, 4), torch.zeros(1).long())
    with ops.use_backend("reference"):
        function(torch.zeros(1, 4), torch.zeros(1).long())
    assert called == ["cpu"]


@pytest.mark.seconds(3)
def test_importing_ops_needs_torch_only() -> None:
    heavy = "transformers", "peft", "safetensors", "triton", "datasets", "torch._dynamo"
    code = (
        "import sys, torch; before = set(sys.modules); import rlhf_fast.ops; "
        f"print(sorted((set(sys.modules) - before) & set({heavy!r})))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
