"""What bench.predict writes down: by hand for known cases, for every op and kernel that a GPU has, and as committed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import harness, static
from bench.gpu import report
from bench.gpu.steps import ORDER
from bench.harness import FORWARD, Case
from bench.predict import __main__ as predict
from bench.predict import cards, parts
from rlhf_fast import ops

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
H100 = cards.CARDS["H100"]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(predict.OUT.read_text())
    return found


def one(whole: dict[str, Any], op: str, begins: str, backend: str = "triton", card: str = "H100") -> dict[str, Any]:
    wanted = card, op, backend
    every = [x for x in whole["predictions"] if (x["card"], x["op"], x["backend"]) == wanted]
    return next(x for x in every if x["case"].startswith(begins))


@needs_transformers
def test_what_is_written_down_is_what_the_command_gives(whole: dict[str, Any], tmp_path: Path) -> None:
    from bench.predict import rollouts

    predict.write(tmp_path / "predicted.json", list(predict.predictions()), list(rollouts.predictions()))
    assert (tmp_path / "predicted.json").read_text() == predict.OUT.read_text(), "run: python -m bench.predict"


def test_the_page_has_the_table_of_what_is_written_down(tmp_path: Path) -> None:
    page = Path(shutil.copy(report.PAGE, tmp_path))
    report.put_predictions(page)
    text = page.read_text()
    assert text == report.PAGE.read_text(), "run: python -m bench.predict"
    assert "| `gae` 8192 x 2048 float32 forward (batch), cuda | 0.089 | 0.089 | bytes | at least 70% of" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="around where the tables go"):
        report.put_predictions(page)


def test_a_stream_takes_its_bytes(whole: dict[str, Any]) -> None:
    found = one(whole, "gae", "8192 x 2048 ")
    # 16 bytes a token: rewards and values read, advantages and returns written; 0.9 of 3.35 TB/s.
    by_hand = 1e3 * 8192 * 2048 * 16 / (0.9 * 3.35e12)
    assert found["milliseconds"] == found["device_ms"] == pytest.approx(by_hand, abs=1e-5)
    assert found["binds"] == "bytes" and found["goal"]["reached"]
    assert found["goal"]["predicted"] == pytest.approx(0.9, abs=1e-3)
    forward = one(whole, "token_logprobs", "8192 x 128256 bfloat16 forward (")
    update, finish = forward["parts"]
    assert update["milliseconds"] == pytest.approx(1e3 * 8192 * 128256 * 2 / (0.9 * 3.35e12), abs=1e-5)
    assert forward["device_ms"] == pytest.approx(update["milliseconds"] + finish["milliseconds"], abs=2e-5)
    # An exponential an element, 16 a cycle on 132 multiprocessors at 1.7 GHz.
    exponentials = 1e3 * 8192 * 128256 / (132 * 16 * 1.7e9)
    assert update["bounds_ms"]["special functions"] == pytest.approx(exponentials, abs=1e-5)


def test_a_kernel_with_too_many_instructions_takes_those(whole: dict[str, Any]) -> None:
    found = one(whole, "token_logprobs", "8192 x 128256 bfloat16 forward (", card="B200")
    update = found["parts"][0]
    (entry,) = [
        x for x in static.read()[2]
        if x.key == ("token_logprobs", "update", "triton", "bfloat16, identity", 100)
    ]  # fmt: skip
    by_hand = 1e3 * 8192 * 128256 * (entry.instructions / 32) / (148 * 128 * 1.85e9)
    assert update["binds"] == "instructions" and update["milliseconds"] == pytest.approx(by_hand, abs=1e-5)
    assert not found["goal"]["reached"]


def test_products_and_sweeps_add_up(whole: dict[str, Any]) -> None:
    found = one(whole, "linear_ppo_loss", "8192 x 4096 x 128256 bfloat16 forward+backward (Llama 3)")
    assert found["binds"] == "products"
    one_product = 1e3 * 2 * 8192 * 4096 * 128256 / (0.7 * 989e12)
    of_products = [p for p in found["parts"] if p["binds"] == "products"]
    assert sum(p["milliseconds"] for p in of_products) == pytest.approx(3 * one_product, rel=1e-3)
    # Logits in float32: read; read and written; narrowed, 6 bytes. The weights' gradient: scaled, and narrowed.
    logits, weights = 8192 * 128256, 4096 * 128256
    sweeps = 1e3 * (logits * (4 + 8 + 6) + weights * (8 + 6)) / (0.9 * 3.35e12)
    assert found["device_ms"] == pytest.approx(3 * one_product + sweeps, rel=0.01)  # and hundreds of small launches
    assert found["goal"]["predicted"] == pytest.approx(found["device_ms"] / (3 * one_product), abs=1e-3)
    frozen = one(whole, "linear_ppo_loss", "8192 x 4096 x 128256 bfloat16 forward+backward (Llama 3, frozen")
    assert sum(p["milliseconds"] for p in frozen["parts"] if p["binds"] == "products") == pytest.approx(
        2 * one_product, rel=1e-3
    )


def test_a_small_kernel_takes_its_latency_and_a_small_call_python(whole: dict[str, Any]) -> None:
    found = one(whole, "dpo_loss", "64 ", "cuda")
    kernel = found["parts"][0]
    assert kernel["binds"] == "latency" and kernel["milliseconds"] == 0.006  # 2 us to start, 4 trips of 1 us
    assert found["device_ms"] == pytest.approx(0.006 + 6 * 0.003)  # and six of PyTorch's
    assert found["binds"] == "call" and found["milliseconds"] == pytest.approx(0.140 + 7 * 0.005)
    finish = one(whole, "ppo_loss", "1048576 ")["parts"][1]  # one program over 1,024 ranges, 256 at a time
    assert finish["part"] == "ppo_loss.finish" and finish["milliseconds"] == pytest.approx(0.002 + (4 + 2) * 0.001)


def test_programs_run_in_waves_as_registers_threads_and_memory_allow() -> None:
    kernel = cards.Kernel("gae", "forward", (), 0.0, programs=8192, threads=128)
    # 104 registers of 128 threads: 4 programs to a multiprocessor; 40 KiB of 228: 5; 24 registers: 16, by threads.
    for entry, held in (((100, 0), 4), ((24, 40 << 10), 5), ((24, 0), 16)):
        found = cards.waves(kernel, {"registers": entry[0], "shared": entry[1]}, H100)
        assert found == -(-8192 // (132 * held))


def test_decoding_reads_each_key_once_and_shared_ones_once_for_all(whole: dict[str, Any]) -> None:
    found = one(whole, "paged_attention", "256 x 1024 ")
    attend = max(found["parts"], key=lambda part: part["milliseconds"])
    keys = 1e3 * 256 * 1024 * 8 * 128 * 2 * 2 / (0.9 * 3.35e12)
    assert attend["binds"] == "bytes" and keys < attend["milliseconds"] < 1.03 * keys  # and the parts' results
    shared = [p for p in one(whole, "paged_attention", "256 x 448 ")["parts"] if p["part"] == "paged_attention.forward"]
    own = 1e3 * 256 * (448 - 256) * 8 * 128 * 2 * 2 / (0.9 * 3.35e12)  # one part of 256 is computed for all
    assert len(shared) == 2 and own < shared[0]["bounds_ms"]["bytes"] < 1.2 * own


def test_every_op_on_a_gpu_has_predictions_for_all_that_is_timed(whole: dict[str, Any]) -> None:
    on_cpus_or_by_pytorch = {"linear", "rms_norm", "whiten"}
    assert set(ops.__all__) - {"use_backend"} - on_cpus_or_by_pytorch == set(parts.OPS)
    found = Counter((x["op"], x["case"], x["backend"], x["card"]) for x in whole["predictions"])
    timed = {b.op: [str(case) for case in b.gpu_cases] for b in harness.benches("ops") if b.op in ORDER}
    assert set(timed) == set(ORDER)
    more = {op: [str(case) for case in its] for op, its in predict.MORE.items()}
    expected = {
        (op, case, backend, card)
        for op, its in {**timed, **more}.items() for case in its
        for backend in ("cuda", "triton") for card in ("A100", "H100", "H200", "B200")
    }  # fmt: skip
    assert set(found) == expected and set(found.values()) == {1}


def test_every_kernel_of_the_static_table_is_in_a_prediction(whole: dict[str, Any]) -> None:
    for backend in ("cuda", "triton"):
        compiled = {f"{x.op}.{x.kernel}" for x in static.read()[2] if x.backend == backend}
        launched = {
            part["part"] for x in whole["predictions"] if x["backend"] == backend for part in x["parts"] if part["ours"]
        }
        assert launched == compiled


def test_what_binds_is_one_of_the_names(whole: dict[str, Any]) -> None:
    binds = {x["binds"] for x in (*whole["predictions"], *whole["rollouts"])}
    of_parts = {part["binds"] for x in whole["predictions"] for part in x["parts"]}
    assert binds <= set(cards.BINDS) and of_parts <= set(cards.BINDS) - {"call"}
    assert {"bytes", "instructions", "products", "latency", "call"} <= binds | of_parts


def test_every_goal_is_held_against_a_prediction(whole: dict[str, Any]) -> None:
    for goal in predict.GOALS:
        met = [x for x in whole["predictions"] if x["op"] == goal.op and x["goal"] and x["goal"]["unit"] == goal.unit]
        assert {x["card"] for x in met} == set(goal.cards)
    texts = [report.goal_text(one(whole, "ppo_loss", "32768 ")["goal"]), report.goal_text(None)]
    assert texts[0] == "at most 0.015 ms: reached, 0.012" and texts[1] == ""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_launches_are_as_wide_as_the_kernels_have_it() -> None:
    """A thread takes as many elements as the static table counts: else the sizes here are no longer the kernels'."""
    from rlhf_fast.kernels.launch_sizes import OWN

    cases = {op: case for op, case, _ in predict.cases()}
    for op, name in (("gae", "gae"), ("ppo_loss", "ppo_loss"), ("dpo_loss", "pair_loss"), ("sample", "sample"),
                     ("token_logprobs", "token_logprobs"), ("full_kl", "full_kl"), ("sequence_sum", "sequence_sum"),
                     ("group_advantages", "group_advantages")):  # fmt: skip
        module: Any = importlib.import_module(f"rlhf_fast.kernels.{name}")
        warps = OWN[name]["WARPS"] if name in OWN else module.WARPS
        kernel = next(p for p in parts.OPS[op](cases[op], "triton") if isinstance(p, cards.Kernel))
        assert kernel.threads == 32 * warps, op


@needs_transformers
def test_a_step_of_a_rollout_takes_what_the_device_or_what_python_does() -> None:
    from bench.predict import rollouts

    large = rollouts.Model(36, 4096, "qwen3", trunk=7_000_000_000, head=600_000_000, key=147_456)
    step = rollouts.Step(tokens=8, sampled=8, read=2_000_000)
    # All weights and 2 million positions at 3.015 TB/s, and 685 launches of 3 us.
    launches = 36 + 36 * 15 + 1 + 36 * 3
    assert sum(large.launches) == launches == 685
    by_hand = (2 * 7.6e9 + 147_456 * 2e6) / (0.9 * 3.35e12) + launches * 3e-6
    assert rollouts.step_seconds(step, large, H100) == ("bytes", pytest.approx(by_hand))
    small = rollouts.Model(28, 1024, "qwen3", trunk=440_000_000, head=160_000_000, key=114_688)
    call = 2e-3 + (36 + 28 * 15) * 5e-6 + (1 + 28 * 3) * 20e-6
    assert rollouts.step_seconds(rollouts.Step(8, 8, 1000), small, H100) == ("call", pytest.approx(call))
    call = 2e-3 + 24 * 5e-6 + 20e-6 + 15e-6
    assert rollouts.step_seconds(rollouts.Step(8, 8, 1000), small, H100, in_graph=True) == ("call", pytest.approx(call))
    outside, inside = 36 - 12 + 1, 12 + 36 * 18
    by_hand = (2 * 7.6e9 + 147_456 * 2e6) / (0.9 * 3.35e12) + outside * 3e-6 + inside * 2.3e-6
    assert rollouts.step_seconds(step, large, H100, in_graph=True) == ("bytes", pytest.approx(by_hand))


@needs_transformers
def test_steps_compute_every_token_once_and_no_more_than_fit() -> None:
    from bench.predict import rollouts
    from bench.rollout.run import Case as Rollout

    case = Rollout("some", [[1] * 900, [1] * 1500, [1] * 10], [4, 2, 3], n=2)
    steps = list(rollouts.steps_of(case))
    assert sum(step.sampled for step in steps) == case.tokens() == 18
    assert sum(step.tokens for step in steps) == 2410 + 18 - 6  # a last token is sampled and not computed
    assert max(step.tokens for step in steps) <= 2048 and steps[0].tokens == 2048
    # The first two prompts meet in the first step; the second is done in the second, with the third.
    assert steps[1].tokens == 2 + 352 + 10 and steps[1].read == 900 + 2 * 1


@needs_transformers
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_layers_launch_as_many_kernels_as_are_reckoned_with(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on a CPU, where each operation that is no view stands for a launch; attention itself is left out."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    from bench.predict import rollouts
    from rlhf_fast import Generator
    from rlhf_fast.rollout.batch import StepBatch

    class Count(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            returns = function._schema.returns
            is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
            name = function._schema.name
            self.launches += not is_view and "view" not in name and "empty" not in name
            return function(*args, **(kwargs or {}))

    found = []
    for layers in (1, 2):
        size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
        size |= {"vocab_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen3Config(**size, head_dim=16) if kind == "qwen3" else Qwen2Config(**size)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        runner = Generator(model).runner
        runner.allocate(4, 16)
        runner.allocate_now()
        step = StepBatch(*(np.array(x) for x in ([5], [0], [0], [[0]], [0, 1], [0, 1], [0])))
        placed = step.to(torch.device("cpu"))
        with torch.no_grad(), runner.ready(), monkeypatch.context() as changed, Count() as count:
            # On a GPU it is one launch.
            changed.setattr(torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: x * weight)
            runner._forward(placed)
        found.append(count.launches)
    assert found[1] - found[0] == rollouts.LAYER[kind]
    assert found[0] - rollouts.LAYER[kind] <= rollouts.INSIDE


def test_a_kernel_that_the_static_table_lacks_is_an_error() -> None:
    case = Case("batch", (8, 16), torch.float32, FORWARD)
    (kernel,) = parts.gae(case, "triton")
    assert isinstance(kernel, cards.Kernel)
    with pytest.raises(KeyError):
        cards.bounds(kernel, "none", H100, cards.read_table())
