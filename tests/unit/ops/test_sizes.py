"""Launch sizes of the Triton kernels by device name: which file they come from, and that any of them is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import harness
from bench.gpu import report, tuning
from bench.gpu.plan import Results
from bench.gpu.steps import Context
from rlhf_fast import ops
from rlhf_fast.kernels import launch_sizes
from tests.unit.ops import cases
from tests.unit.ops.conftest import Backend, only
from tests.unit.ops.test_paged_attention import problem

CPU = torch.device("cpu")
triton = only("triton")
# Far from their own, so that small inputs take several blocks, segments, ranges and parts.
SMALL = {"SEGMENT": 256, "PART": 16, "RANGE": 16, "BLOCK": 16}
TENSORS = [CPU, *([torch.empty(0, device="cuda").device] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Files are read anew, and neither the package's nor the user's says anything."""
    monkeypatch.delenv("RLHF_FAST_TUNED", raising=False)
    monkeypatch.setattr(launch_sizes, "TUNED", write(tmp_path / "package.json", {}))
    launch_sizes._known.clear()
    yield
    launch_sizes._known.clear()


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def use(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setenv("RLHF_FAST_TUNED", str(path))
    launch_sizes._known.clear()


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_package_brings_a_file_whose_figures_have_a_source() -> None:
    content = launch_sizes.read(Path(launch_sizes.__file__).with_name("tuned.json"))
    assert "cpu" not in content, "the interpreter's times are nobody's"
    for name, entry in [(f"{device}, {op}", entry) for device, of in content.items() for op, entry in of.items()]:
        assert set(tuning.KEPT) <= set(entry), name
        assert entry["gain"] >= tuning.LEAST_GAIN, name
    assert '"rlhf_fast.kernels" = ["tuned.json"]' in (Path(__file__).parents[3] / "pyproject.toml").read_text()


def test_without_an_entry_a_kernel_has_its_own_sizes(tmp_path: Path) -> None:
    write(tmp_path / "package.json", {"another card": {"gae": {"sizes": {"BLOCK": 64}}}})
    for op, own in launch_sizes.OWN.items():
        assert launch_sizes.sizes(op, CPU) == own
        limits = {name: launch_sizes.LIMITS[name] for name in own}
        assert all(least <= own[name] <= most for name, (least, most) in limits.items())


def test_a_file_of_the_users_goes_before_the_packages_op_by_op(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = {"gae": {"sizes": {"BLOCK": 64}}, "sample": {"sizes": {"BLOCK": 64, "WARPS": 1}}}
    write(tmp_path / "package.json", {"cpu": both})
    use(monkeypatch, write(tmp_path / "own.json", {"cpu": {"gae": {"sizes": {"WARPS": 2}, "note": "by hand"}}}))
    assert launch_sizes.sizes("gae", CPU) == {"BLOCK": 1024, "WARPS": 2}
    assert launch_sizes.sizes("sample", CPU) == {"BLOCK": 64, "WARPS": 1}
    assert launch_sizes.sizes("kl_estimate", CPU) == launch_sizes.OWN["kl_estimate"]


def test_a_file_is_read_once_for_each_op_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = launch_sizes.sizes("gae", CPU)
    monkeypatch.setattr(launch_sizes, "read", lambda path: pytest.fail("read again"))
    assert launch_sizes.sizes("gae", torch.empty(3).device) is before


def test_sizes_are_tried_for_as_long_as_it_takes_and_no_longer() -> None:
    for device in TENSORS:
        with launch_sizes.trying("gae", device, {"WARPS": 8}):
            assert launch_sizes.sizes("gae", device) == {"BLOCK": 1024, "WARPS": 8}
            assert launch_sizes.sizes("sample", device) == launch_sizes.OWN["sample"]
        assert launch_sizes.sizes("gae", device) == launch_sizes.OWN["gae"]
        with pytest.raises(KeyError, match="on the way"), launch_sizes.trying("gae", device, {"WARPS": 1}):
            raise KeyError("on the way")
        assert launch_sizes.sizes("gae", device) == launch_sizes.OWN["gae"]


def entry(**sizes: Any) -> Any:
    return {"card": {"gae": {"sizes": sizes}}}


MALFORMED = [
    ([], "expected an object {device name: ...}, got []"),
    ({"card": 3}, "'card': expected an object {op: ...}, got 3"),
    ({"card": {"gea": {}}}, "'card': 'gea': no op of that name has sizes; those that have are token_logprobs"),
    ({"card": {"gae": None}}, "'card': 'gae': expected an object {'sizes': ...}, got None"),
    ({"card": {"gae": {"BLOCK": 64}}}, "'card': 'gae': 'sizes': expected an object {name: ...}, got None"),
    (entry(BLOK=64), "'card': 'gae': no size 'BLOK'; it has BLOCK, WARPS"),
    (entry(STAGES=2), "'card': 'gae': no size 'STAGES'; it has BLOCK, WARPS"),
    (entry(BLOCK=0), "BLOCK is 0, expected a power of two from 16 to 65536"),
    (entry(BLOCK=-64), "BLOCK is -64"),
    (entry(BLOCK=96), "BLOCK is 96"),
    (entry(BLOCK=1 << 17), "BLOCK is 131072"),
    (entry(BLOCK="64"), "BLOCK is '64'"),
    (entry(BLOCK=64.0), "BLOCK is 64.0"),
    (entry(WARPS=True), "WARPS is True, expected a power of two from 1 to 32"),
    ({"card": {"paged_attention": {"sizes": {"STAGES": 9}}}}, "STAGES is 9, expected an integer from 1 to 8"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED, ids=[message[-40:] for _, message in MALFORMED])
def test_what_is_wrong_in_a_file_is_named_whichever_card_it_is_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: Any, message: str
) -> None:
    path = write(tmp_path / "own.json", content)
    use(monkeypatch, path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        launch_sizes.sizes("sample", CPU)
    assert str(error.value).startswith(f"{path}: ")
    assert not launch_sizes._known


@pytest.mark.parametrize(
    "text", [None, "", "{", "[" * 100_000, "\xff"], ids=["absent", "empty", "cut", "deep", "latin"]
)
def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "own.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    use(monkeypatch, path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected a file of launch sizes (RLHF_FAST_TUNED)")):
        launch_sizes.sizes("gae", CPU)


names = st.sampled_from(["cpu", "sizes", *launch_sizes.OWN, *launch_sizes.LIMITS])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([1, 2, 3, 16, 256]) | st.floats() | st.text(),
    lambda inner: st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=6,
)


@given(values | st.fixed_dictionaries({"cpu": st.dictionaries(names, st.fixed_dictionaries({"sizes": values}))}))
def test_any_json_is_sizes_within_their_limits_or_an_error(content: Any) -> None:
    try:
        found = launch_sizes.check(content, "file")
    except ValueError as error:
        assert str(error).startswith("file: ")
        return
    for one in (one for of_device in found.values() for one in of_device.values()):
        for name, value in one["sizes"].items():
            assert launch_sizes.LIMITS[name][0] <= value <= launch_sizes.LIMITS[name][1]


# --- kernels ----------------------------------------------------------------------------------------------------------


def solve(call: Any, op: Any, *inputs: Tensor, **options: Any) -> list[Tensor]:
    """The results, and the gradients of 0.7 times their sum."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    found = flat(call(op, *leaves, **options))
    torch.autograd.backward([0.7 * x.sum() for x in found if x.requires_grad])
    return [*(x.detach() for x in found), *(x.grad for x in leaves if x.grad is not None)]


def every_op() -> dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]:
    """op -> what is computed of all rows, and of the second alone, or of all again where rows are added up (or
    multiplied by torch). Each is given what calls an op: a backend."""
    logits, others = cases.random(3, 700, seed=1, scale=3.0), cases.random(3, 700, seed=2)
    tokens = cases.random_tokens(3, vocabulary=700)
    hidden, weight = cases.random(3, 8, seed=3), cases.random(700, 8, seed=4)
    sequences = [cases.random(3, 50, seed=seed) for seed in range(5, 11)]
    chosen = [cases.random(37, seed=seed, scale=4.0) for seed in range(4)]
    one, all_rows = slice(1, 2), slice(None)

    def draw(rows: slice) -> Any:
        column = torch.ones(3)[rows]
        cut = (torch.tensor([0, 50, 0], dtype=torch.int32)[rows], torch.tensor([0.9, 0.8, 1.0])[rows], 0 * column)
        return lambda call: call(ops.sample, logits[rows], torch.tensor([0.3, 0.6, 0.9])[rows].double(), column, *cut)

    def both(op: Any, *inputs: Tensor, **options: Any) -> Any:
        return tuple(
            (lambda call, r=rows: solve(call, op, *(x[r] for x in inputs), **options)) for rows in (all_rows, one)
        )

    def attend(order: list[int]) -> Any:
        def compute(call: Any) -> Any:
            p = problem([40, 70, 33], [1, 3, 2]).order(order)
            return call(ops.paged_attention, p.query, p.cache, p.batch)

        return compute

    def twice(compute: Any) -> Any:
        return compute, compute

    return {
        "token_logprobs": both(ops.token_logprobs, logits, tokens),
        "token_logprobs of a head": twice(lambda call: solve(call, ops.linear_token_logprobs, hidden, weight, tokens)),
        "full_kl": both(ops.full_kl, logits, others),
        "full_kl js": both(ops.full_kl, logits, others, kind="js"),
        "sample": (draw(all_rows), draw(one)),
        "gae": tuple(
            (lambda call, r=rows: call(ops.gae, *(x[r] for x in sequences[:2]), gamma=0.9, lam=0.8, critic_lam=0.9))
            for rows in (all_rows, one)
        ),
        "sequence_sum": both(ops.sequence_sum, sequences[0]),
        "kl_estimate": both(ops.kl_estimate, *sequences[:2]),
        "paged_attention": (attend([0, 1, 2]), attend([1])),
        "ppo_loss": twice(lambda call: solve(call, ops.ppo_loss, *sequences, ref_logprobs=sequences[1], kl_coef=0.1)),
        "pair_loss": twice(lambda call: solve(call, ops.dpo_loss, *chosen)),
    }


def test_every_op_with_sizes_is_here() -> None:
    assert {name.split(" ")[0] for name in every_op()} == set(launch_sizes.OWN)


@pytest.mark.parametrize("name", every_op())
@pytest.mark.parametrize("times", [1, 2])
def test_with_other_sizes_results_are_right_and_a_row_has_the_bits_that_it_has_alone(
    triton: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, times: int
) -> None:
    """Read from a file, by the device's name."""
    op = name.split(" ")[0]
    sizes = {key: times * value for key, value in SMALL.items() if key in launch_sizes.OWN[op]}
    if op == "sample":
        sizes["BLOCK"] *= 8  # which goes over each row some seventy times
    sizes |= {key: value for key, value in {"WARPS": 2, "STAGES": 3}.items() if key in launch_sizes.OWN[op]}
    device = launch_sizes.device_name(triton.device)
    use(monkeypatch, write(tmp_path / "own.json", {device: {op: {"sizes": sizes}}}))
    compute, compute_alone = every_op()[name]
    found, again, alone = flat(compute(triton)), flat(compute(triton)), flat(compute_alone(triton))
    with ops.use_backend("reference"):
        truth = flat(compute(lambda op, *inputs, **options: op(*inputs, **options)))
    assert tuning.difference([x.float() for x in found], [x.float() for x in truth]) == ""
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    rows = {"paged_attention": slice(1, 4)}.get(op, slice(1, 2))
    whole = name in ("ppo_loss", "pair_loss", "token_logprobs of a head")
    assert all(torch.equal(x if whole else x[rows], y) for x, y in zip(found, alone, strict=True))
    tensor = torch.empty(0, device=triton.device).device
    assert launch_sizes._known[op, tensor] == {**launch_sizes.OWN[op], **sizes}, "or the kernel has not asked for them"


def flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for part in (x.values() if isinstance(x, dict) else x) for y in flat(part)]


# --- tuning -----------------------------------------------------------------------------------------------------------

(KL,) = harness.benches("ops", "kl_estimate")
HALF, DOUBLE, MANY = {"BLOCK": 512}, {"BLOCK": 2048}, {"BLOCK": 4096, "WARPS": 8}


def context(backend: Backend) -> Context:
    return Context(rehearse=backend.device.type == "cpu", short=False)


def take(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Mapping[str, int]], float]) -> None:
    """As if a call took so long, by the sizes that its kernel asked for."""
    from rlhf_fast.kernels import kl_estimate

    asked: list[Mapping[str, int]] = []

    def sizes(op: str, device: torch.device) -> Mapping[str, int]:
        asked.append(launch_sizes.sizes(op, device))
        return asked[-1]

    def seconds_of(call: Callable[[], Any], device: torch.device, short: bool = False) -> float:
        call()
        return seconds(asked[-1])

    monkeypatch.setattr(kl_estimate, "sizes", sizes)
    monkeypatch.setattr(harness, "seconds_of", seconds_of)


def labelled(*candidates: dict[str, int]) -> dict[str, dict[str, int]]:
    return {tuning._label(one): one for one in candidates}


def test_the_fastest_sizes_that_are_right_are_kept(triton: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong ones, and those that do not run, are the fastest of all."""
    from rlhf_fast.kernels import kl_estimate

    forward = kl_estimate.forward

    def sometimes_wrong(*inputs: Any) -> None:
        block = launch_sizes.sizes("kl_estimate", inputs[0].device)["BLOCK"]
        if block == 64:
            raise RuntimeError("out of resource: shared memory")
        forward(*inputs)
        inputs[-1][0] += 1e-3 if block == 512 else 0.0

    monkeypatch.setattr(kl_estimate, "forward", sometimes_wrong)
    take(monkeypatch, lambda size: {64: 0.1, 512: 0.2, 1024: 1.0, 2048: 0.8, 4096: 0.7}[size["BLOCK"]])
    found = tuning.tune_op("kl_estimate", KL, labelled(HALF, DOUBLE, MANY, {"BLOCK": 64}), context(triton))
    assert found["sizes"] == {"BLOCK": 4096, "WARPS": 8}
    assert found["gain"] == pytest.approx(1 / 0.7) and found["noise"] == 1.0
    assert set(found["gains"]) and all(gain == pytest.approx(1 / 0.7) for gain in found["gains"].values())
    assert found["milliseconds_of"] == {"own": 1e3, "BLOCK 2048": 800.0, "BLOCK 4096, WARPS 8": 700.0}
    assert set(found["refused"]) == {"BLOCK 512", "BLOCK 64"}
    assert "result 0 has 1 values that are not those" in found["refused"]["BLOCK 512"]
    assert "RuntimeError: out of resource" in found["refused"]["BLOCK 64"]


def test_what_gains_no_more_than_noise_is_not_kept(triton: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, lambda size: 0.98 if size["BLOCK"] == 512 else 1.0)
    found = tuning.tune_op("kl_estimate", KL, labelled(HALF), context(triton))
    assert found["sizes"] is None and found["gain"] == 1.0


def test_sizes_pay_if_they_gain_over_all_and_lose_nowhere() -> None:
    assert tuning.pays([1.04, 1.05], [1.0, 1.0])
    assert tuning.pays([1.2, 0.99], [1.0, 1.0])
    assert not tuning.pays([1.02, 1.02], [1.0, 1.0]), "less than 3 %"
    assert not tuning.pays([1.10, 1.10], [1.08, 1.06]), "less than twice the noise"
    assert not tuning.pays([1.5, 0.95], [1.0, 1.0]), "a case that loses"
    assert tuning.pays([1.5, 0.95], [1.0, 1.04]), "which may be noise"


def test_results_differ_where_more_than_the_order_of_adding_does() -> None:
    x = torch.tensor([1.0, -3.0, 1e-6, torch.nan, torch.inf])
    assert tuning.difference([x, x.long()[:3]], [x * (1 + 1e-6), x.long()[:3]]) == ""
    assert tuning.difference([x.bfloat16()], [(x * 1.004).bfloat16()]) == ""
    for wrong in (x * (1 + 1e-4), x.nan_to_num(0.0), x.nan_to_num(posinf=1.0, nan=torch.nan)):
        assert "values that are not those of its own sizes" in tuning.difference([wrong], [x])
    assert "result 1 has 1 values" in tuning.difference([x, torch.tensor([3])], [x, torch.tensor([4])])
    assert "result 0 is (4,) of torch.float32, expected (5,)" in tuning.difference([x[:4]], [x])
    assert "of torch.float64, expected" in tuning.difference([x.double()], [x])
    assert tuning.difference([x[:0]], [x[:0]]) == ""


def test_candidates_are_sizes_that_differ_from_a_kernels_own() -> None:
    assert set(tuning.CANDIDATES) == set(launch_sizes.OWN)
    for op, candidates in tuning.CANDIDATES.items():
        every: list[dict[str, int]] = [{**launch_sizes.OWN[op], **candidate} for candidate in (*candidates, {})]
        for sizes in every:
            assert launch_sizes.check({"any": {op: {"sizes": sizes}}}, op) and every.count(sizes) == 1


def test_what_the_step_finds_is_what_the_kernels_then_read(
    triton: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, package, own = tmp_path / "records.jsonl", tmp_path / "package.json", tmp_path / "own.json"
    monkeypatch.setenv("BENCH_RECORDS", str(records))
    monkeypatch.setattr(tuning, "CANDIDATES", {"kl_estimate": (DOUBLE,)})
    results = Results(tmp_path / "run.json")

    def step(double: float) -> None:
        records.unlink(missing_ok=True)
        take(monkeypatch, lambda size: double if size["BLOCK"] == 2048 else 1.0)
        tuning.tune(context(triton))
        results.records = [json.loads(line) for line in records.read_text().splitlines()]
        results.write()

    step(0.5)
    assert json.loads(package.read_text()) == {}
    assert tuning.main(["--apply", str(results.path), "--to", str(own)]) == 0
    assert "kl_estimate      2.00 times as fast as with its own sizes" in capsys.readouterr().out
    use(monkeypatch, own)
    tensor = torch.empty(0, device=triton.device)
    assert launch_sizes.sizes("kl_estimate", tensor.device) == {"BLOCK": 2048, "WARPS": 4}
    p, q = cases.random(5000, seed=0), cases.random(5000, seed=1)
    with ops.use_backend("reference"):
        expected = ops.kl_estimate(p, q, "k3")
    assert torch.allclose(triton(ops.kl_estimate, p, q, "k3"), expected, rtol=1e-5, atol=1e-6)
    text = report.write({}, results.records, results.path)[0].read_text()
    assert "| BLOCK 2048, WARPS 4 | 2.00 |  |" in text
    (kept,) = json.loads(own.read_text())[launch_sizes.device_name(tensor.device)].values()
    assert set(kept) == set(tuning.KEPT)

    step(1.0)  # a later run finds its own sizes to be best
    assert tuning.apply(results.path, own) == {}
    assert json.loads(own.read_text()) == {}


def of_run(tmp_path: Path, **changes: Any) -> Path:
    record = {**dict.fromkeys(tuning.KEPT, "any"), "op": "tune: gae", "device": "A Card", "rehearsal": False}
    record |= {"sizes": {"BLOCK": 512, "WARPS": 4}, "gain": 1.25, **changes}
    results = Results(tmp_path / "run.json", {}, [record, {"op": "machine"}])
    results.write()
    return results.path


def test_sizes_go_into_the_package_beside_those_of_other_cards_and_ops(tmp_path: Path) -> None:
    others = {"gae": {"sizes": {"BLOCK": 64}}, "sample": {"sizes": {"WARPS": 4}}}
    write(launch_sizes.TUNED, {"A Card": others, "Another": others})
    assert tuning.main(["--apply", str(of_run(tmp_path))]) == 0
    content = launch_sizes.read(launch_sizes.TUNED)
    assert content["Another"] == others and content["A Card"]["sample"] == others["sample"]
    assert content["A Card"]["gae"]["sizes"] == {"BLOCK": 512, "WARPS": 4}
    assert content["A Card"]["gae"]["gain"] == 1.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rehearsal": True}, "a rehearsal has measured no GPU; only --to FILE takes what it found"),
        ({"op": "gae"}, "no sizes were measured in this run; python -m bench.gpu --only tune does"),
        ({"sizes": {"BLOCK": 500}}, "BLOCK is 500, expected a power of two"),
        ({"op": "tune: gea"}, "'A Card': 'gea': no op of that name has sizes"),
    ],
)
def test_what_must_not_go_into_the_package_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    before = launch_sizes.TUNED.read_text()
    with pytest.raises(SystemExit):
        tuning.main(["--apply", str(of_run(tmp_path, **changes))])
    assert message in capsys.readouterr().err
    assert launch_sizes.TUNED.read_text() == before
