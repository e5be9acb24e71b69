from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels.arguments import PPOTensors
from rlhf_fast.ops.options import PPOOptions
from rlhf_fast.ops.ppo_loss import PPOCall
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch, gradient_of
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend

PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")
ALL_TERMS: dict[str, Any] = {"entropy_coef": 0.01, "kl_coef": 0.05, "value_coef": 0.5, "dual_clip": 3.0}
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum_mean")
ADD_UP_WITH_TOKENS = (
    "ratio_mean", "clip_fraction", "dual_clip_fraction", "value_clip_fraction", "approx_kl", "approx_kl_k3",
    "rollout_weight", "rollout_clip_fraction",
)  # fmt: skip
ADD_UP = ("policy_loss", "value_loss", "entropy", "kl")


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Every per-token input; ratios from about 0.3 to 3, so that all the clips bite."""
    return {name: cases.random(*shape, seed=i, scale=0.4, dtype=dtype) for i, name in enumerate(PER_TOKEN)}


def definition(x: dict[str, float], o: dict[str, Any], log_ratio: float) -> dict[str, float]:
    """The terms of one token, from the papers, in Python. ``log_ratio``: its own, or that of its sequence."""
    own = min(max(x["logprobs"] - x["old_logprobs"], -20), 20)
    r, A = math.exp(min(max(log_ratio, -20), 20)), x["advantages"]
    near = min(max(r, 1 - o.get("clip_low", 0.2)), 1 + o.get("clip_high", 0.2))
    clipped, policy, held = -A * near > -A * r, max(-A * r, -A * near), False
    if o.get("objective") == "cispo":
        clipped, policy = near != r, -A * near * x["logprobs"]
    if o.get("objective") == "sapo":
        tau = o.get("tau_pos", 1.0) if A > 0 else o.get("tau_neg", 1.05)
        clipped, policy = False, -A * 4 / tau / (1 + math.exp(-tau * (r - 1)))
    if o.get("dual_clip") and A < 0:
        held = policy > -A * o["dual_clip"]
        policy = min(policy, -A * o["dual_clip"])
    weight, cap = 0.0, o.get("rollout_cap", 2.0)
    if "rollout_logprobs" in x:
        weight = min(math.exp(x["old_logprobs"] - x["rollout_logprobs"]), cap)
        policy *= weight
    c, v_old = o.get("value_clip", 0.2), x["old_values"]
    near = x["values"] if c is None else v_old + min(max(x["values"] - v_old, -c), c)
    plain_error, near_error = (x["values"] - x["returns"]) ** 2, (near - x["returns"]) ** 2
    k = x["logprobs"] - x["ref_logprobs"]
    return {
        "policy_loss": policy,
        "value_loss": 0.5 * max(plain_error, near_error),
        "entropy": x["entropy"],
        "kl": {"k1": k, "k2": k * k / 2, "k3": math.exp(-k) - 1 + k}[o.get("kl", "k3")],
        "ratio_mean": r,
        "clip_fraction": float(clipped),
        "dual_clip_fraction": float(held),
        "value_clip_fraction": float(near_error > plain_error),
        "approx_kl": x["old_logprobs"] - x["logprobs"],
        "approx_kl_k3": math.exp(own) - 1 - own,
        "rollout_weight": weight,
        "rollout_clip_fraction": float(weight == cap),
    }


def aggregated(inputs: dict[str, Tensor], mask: Tensor, aggregation: str, o: dict[str, Any]) -> dict[str, float]:
    """The definition's stats and loss of a padded batch, with plain sums over lists of lists."""
    rows = []
    for b in range(mask.shape[0]):
        row = [{k: float(v[b, t]) for k, v in inputs.items()} for t in range(mask.shape[1]) if mask[b, t]]
        ratios = [x["logprobs"] - x["old_logprobs"] for x in row]
        if row and o.get("ratio") == "sequence":
            ratios = [sum(ratios) / len(ratios)] * len(ratios)
        rows.append([definition(x, o, d) for x, d in zip(row, ratios, strict=True)])
    rows = [row for row in rows if row]
    tokens = [token for row in rows for token in row]

    def token_mean(name: str) -> float:
        return sum(token[name] for token in tokens) / max(len(tokens), 1)

    def mean(name: str) -> float:
        if aggregation == "token_mean":
            return token_mean(name)
        share = [1 / len(row) if aggregation == "sequence_mean" else 1.0 for row in rows]
        return sum(s * sum(t[name] for t in row) for s, row in zip(share, rows, strict=True)) / max(len(rows), 1)

    stats = {name: mean(name) for name in ADD_UP} | {name: token_mean(name) for name in ADD_UP_WITH_TOKENS}
    stats["ratio_max"] = max((token["ratio_mean"] for token in tokens), default=0.0)
    stats["ratio_min"] = min((token["ratio_mean"] for token in tokens), default=0.0)
    coefs = (1.0, o.get("value_coef", 0.1), -o.get("entropy_coef", 0.0), o.get("kl_coef", 0.0))
    return stats | {"loss": sum(c * stats[name] for c, name in zip(coefs, ADD_UP, strict=True))}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        ALL_TERMS | {"clip_high": 0.28},
        {"value_clip": None, "kl_coef": 0.1, "kl": "k2"},
        {"clip_low": 0.0, "kl": "k1"},
        {"objective": "cispo", "clip_low": 0.5, "entropy_coef": 0.01},
        {"ratio": "sequence", "clip_low": 0.01, "clip_high": 0.02, "dual_clip": 1.1},
        {"rollout_cap": 1.1, "dual_clip": 1.5},
        {"objective": "cispo", "ratio": "sequence", "rollout_cap": 1.5},
        {"objective": "sapo", "tau_pos": 2.0, "tau_neg": 3.0, "rollout_cap": 1.5},
    ],
)
def test_loss_and_stats_are_the_definition(aggregation: str, options: dict[str, Any]) -> None:
    inputs, mask = batch(4, 9), cases.holes()
    if "rollout_cap" in options:
        inputs["rollout_logprobs"] = cases.random(4, 9, seed=20, scale=0.4, dtype=torch.float64)
    loss, stats = ops.ppo_loss(**inputs, mask=mask, aggregation=aggregation, **options)
    want = aggregated(inputs, mask, aggregation, options)
    assert_close(loss, torch.tensor(want.pop("loss"), dtype=torch.float64), 1e-12, "loss")
    for name, value in want.items():
        assert_close(stats[name], torch.tensor(value, dtype=torch.float64), 1e-12, name)
        assert not stats[name].requires_grad


def test_explained_variance_is_one_minus_the_share_left_over() -> None:
    inputs, mask = batch(4, 9), cases.holes()
    _, stats = ops.ppo_loss(**inputs, mask=mask)
    left = (inputs["returns"] - inputs["values"])[mask].var()
    assert_close(stats["explained_variance"], 1 - left / inputs["returns"][mask].var(), 1e-12)
    _, stats = ops.ppo_loss(**{**inputs, "returns": torch.ones(4, 9).double()}, mask=mask)
    assert stats["explained_variance"].item() == 0


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_float32_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    inputs, mask = batch(4, 9, dtype=dtype), cases.holes()
    names = ("logprobs", "values", "entropy")
    fixed = {k: v for k, v in inputs.items() if k not in names}

    def torch_of_today(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        x = {k: v.to(torch.promote_types(logprobs.dtype, torch.float32)) for k, v in fixed.items()}
        logprobs, values, entropy = (t.to(x["returns"].dtype) for t in (logprobs, values, entropy))
        ratio, A = (logprobs - x["old_logprobs"]).exp(), x["advantages"]
        policy = torch.max(-A * ratio, -A * ratio.clamp(0.8, 1.2))[mask].mean()
        near = x["old_values"] + (values - x["old_values"]).clamp(-0.2, 0.2)
        value = 0.5 * torch.max((values - x["returns"]) ** 2, (near - x["returns"]) ** 2)[mask].mean()
        return policy + 0.1 * value - 0.01 * entropy[mask].mean()

    def mine(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        return ops.ppo_loss(**fixed, logprobs=logprobs, values=values, entropy=entropy, mask=mask, entropy_coef=0.01)[0]

    given_ones = [inputs[name] for name in names]
    got, gradients = run(mine, given_ones, [torch.ones(())])
    stock, stock_gradients = run(torch_of_today, given_ones, [torch.ones(())])
    truth, true_gradients = run(torch_of_today, [x.double() for x in given_ones], [torch.ones(())])
    assert got[0].dtype == torch.float32
    assert [g.dtype for g in gradients] == [dtype] * 3
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_checks_in_float64(aggregation: str) -> None:
    inputs, names = batch(4, 9), ("logprobs", "values", "entropy")
    fixed = {k: v for k, v in inputs.items() if k not in names}

    def op(*own: Tensor) -> Tensor:
        logprobs, values, entropy = own
        terms = {**fixed, **ALL_TERMS, "aggregation": aggregation}
        return ops.ppo_loss(logprobs=logprobs, values=values, entropy=entropy, mask=cases.holes(), **terms)[0]

    assert torch.autograd.gradcheck(op, [inputs[name].requires_grad_() for name in names])


@cases.property_test
@given(cases.ragged_masks(), st.sampled_from(AGGREGATIONS))
def test_packed_equals_padded(ragged: tuple[list[int], Tensor], aggregation: str) -> None:
    lengths, mask = ragged
    inputs = batch(*mask.shape)
    padded, padded_stats = ops.ppo_loss(**inputs, mask=mask, aggregation=aggregation, **ALL_TERMS)
    flat: dict[str, Any] = {k: cases.pack(v, lengths) for k, v in inputs.items()}
    flat |= {"mask": cases.pack(mask, lengths), "cu_seqlens": cases.cu_seqlens_of(lengths)}
    packed, packed_stats = ops.ppo_loss(**flat, aggregation=aggregation, **ALL_TERMS)
    assert_close(packed, padded, 1e-12)
    assert padded.isfinite()
    for name in padded_stats:
        assert_close(packed_stats[name], padded_stats[name], 1e-12, name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_with_a_common_denominator_add_up(aggregation: str) -> None:
    inputs, mask = batch(4, 9), cases.holes()
    options = {**ALL_TERMS, "aggregation": aggregation}
    count = mask.sum() if aggregation == "token_mean" else mask.any(1).sum()
    logprobs = inputs["logprobs"].requires_grad_()
    whole, stats = ops.ppo_loss(**inputs, mask=mask, **options)
    (gradient,) = torch.autograd.grad(whole, logprobs)
    for denominator in (count, int(count), float(count)):
        parts = [
            ops.ppo_loss(**{k: v[rows] for k, v in inputs.items()}, mask=mask[rows], denominator=denominator, **options)
            for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
        ]
        total = torch.stack([loss for loss, _ in parts]).sum()
        assert_close(total, whole, 1e-12)
        assert_close(torch.autograd.grad(total, logprobs)[0], gradient, 1e-12)
        for name in ADD_UP + (ADD_UP_WITH_TOKENS if aggregation == "token_mean" else ()):
            assert_close(torch.stack([s[name] for _, s in parts]).sum(), stats[name], 1e-12, name)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "sequence_sum_mean"])
def test_a_number_of_sequences_never_divides_the_token_statistics(aggregation: str) -> None:
    inputs = batch(4, 9)
    options: dict[str, Any] = {"mask": cases.holes(), "aggregation": aggregation}
    _, stats = ops.ppo_loss(**inputs, **options)
    _, shared = ops.ppo_loss(**inputs, **options, denominator=100)
    for name in ADD_UP_WITH_TOKENS:
        assert_close(shared[name], stats[name], 1e-15, name)


def test_an_infinite_kl_without_weight_is_no_nan() -> None:
    inputs = batch(2, 3)
    inputs["ref_logprobs"][0, 0] = -math.inf
    loss, stats = ops.ppo_loss(**inputs, kl="k1")
    assert loss.isfinite() and stats["kl"].item() == math.inf


def test_at_ratio_1_the_gradient_is_reinforce() -> None:
    logprobs = cases.random(4, 9, dtype=torch.float64).requires_grad_()
    advantages, mask = cases.random(4, 9, seed=1, dtype=torch.float64), cases.holes()
    loss, stats = ops.ppo_loss(logprobs, logprobs.detach(), advantages, mask=mask)
    reinforce = -(advantages * logprobs)[mask].mean()
    assert_close(torch.autograd.grad(loss, logprobs)[0], torch.autograd.grad(reinforce, logprobs)[0], 1e-15)
    for name, value in {"ratio_mean": 1, "ratio_max": 1, "clip_fraction": 0, "approx_kl": 0, "approx_kl_k3": 0}.items():
        assert_close(stats[name], torch.tensor(value), 1e-15, name)


def test_clipped_tokens_get_no_gradient_and_pulled_back_ones_do() -> None:
    d = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, stats = ops.ppo_loss(d, torch.zeros(4), advantages)
    loss.backward()
    assert (gradient_of(d) != 0).tolist() == [False, True, True, False]
    assert stats["clip_fraction"].item() == 0.5


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    d = torch.tensor([3.0, 3.0], requires_grad=True)
    loss, _ = ops.ppo_loss(d, torch.zeros(2), torch.tensor([-1.0, 0.5]), dual_clip=3.0, denominator=1)
    assert_close(loss, torch.tensor(3.0 - 0.5 * 1.2), 1e-6)
    loss.backward()
    assert gradient_of(d).tolist() == [0.0, 0.0]


def test_cispo_gives_clipped_tokens_their_gradient() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.0, -3.0, -1.0]), torch.tensor([2.0, 3.0, 4.0])
    loss, stats = ops.ppo_loss(logprobs, old, advantages, objective="cispo", denominator=1)
    loss.backward()
    assert gradient_of(logprobs).tolist() == pytest.approx([-2.0, -3.0 * 1.2, -4.0 * 0.8])
    assert stats["clip_fraction"].item() == 2


def test_sapo_has_the_gradient_of_its_paper() -> None:
    """Equation 8: A r 4 s (1 - s) a token, s = sigmoid(tau (r - 1)); at r = 1 that of the plain ratio."""
    log_ratios = torch.tensor([0.0, 0.7, -0.7, 4.0, -8.0, 0.7, 12.0, 30.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 2.0, 3.0, 3.0, -2.0, -1.0, 1.0], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        d = log_ratios.to(dtype, copy=True).requires_grad_()
        loss, stats = ops.ppo_loss(d, torch.zeros_like(d), advantages.to(dtype), objective="sapo", denominator=1)
        loss.backward()
        tau = 1.05 - 0.05 * (advantages > 0).double()
        s = torch.sigmoid(tau * (log_ratios.exp() - 1))
        want = -advantages * log_ratios.exp() * 4 * s * torch.sigmoid(-tau * (log_ratios.exp() - 1))
        want[-1] = 0  # beyond the clamp of log-ratios
        assert want[0] == -1 and 0 < want[5] < 4
        assert_close(gradient_of(d), want.to(dtype), tolerance)
        assert stats["clip_fraction"].item() == 0


def test_a_sequence_ratio_is_gspo() -> None:
    """Equations 5 and 7 of the paper, written per sequence, with one advantage a sequence."""
    inputs, mask = batch(4, 9), cases.holes()
    advantages = cases.random(4, 1, seed=9, dtype=torch.float64).expand(4, 9)
    logprobs = inputs["logprobs"].requires_grad_()
    sequences = []
    for b in range(4):
        real = mask[b]
        if real.any():
            s = (logprobs[b] - inputs["old_logprobs"][b])[real].mean().exp()
            sequences.append(torch.minimum(s * advantages[b, 0], s.clamp(0.95, 1.1) * advantages[b, 0]))
    want = -torch.stack(sequences).mean()
    options: dict[str, Any] = {"clip_low": 0.05, "clip_high": 0.1, "aggregation": "sequence_mean"}
    got, stats = ops.ppo_loss(logprobs, inputs["old_logprobs"], advantages, mask=mask, ratio="sequence", **options)
    assert 0 < stats["clip_fraction"].item() < 1
    assert_close(got, want, 1e-12)
    assert_close(torch.autograd.grad(got, logprobs)[0], torch.autograd.grad(want, logprobs)[0], 1e-12)


def test_sums_of_gae_whiten_the_advantages_of_all_micro_batches_together() -> None:
    inputs, mask = batch(4, 9), cases.holes()
    rewards, values = (cases.random(4, 9, seed=seed, dtype=torch.float64) for seed in (30, 31))
    advantages, _, sums = ops.gae(rewards, values, mask=mask, sums=True)
    inputs["advantages"] = ops.whiten(advantages, mask)
    want = ops.ppo_loss(**inputs, mask=mask)[0]
    inputs["advantages"] = advantages
    halves = [slice(0, 1), slice(1, 4)]
    of_each = [ops.gae(rewards[h], values[h], mask=mask[h], sums=True)[2] for h in halves]
    assert_close(of_each[0] + of_each[1], sums, 1e-12)
    parts = [
        ops.ppo_loss(**{k: v[h] for k, v in inputs.items()}, mask=mask[h], denominator=mask.sum(), advantage_sums=sums)
        for h in halves
    ]
    assert_close(parts[0][0] + parts[1][0], want, 1e-12)


def test_one_advantage_or_none_is_whitened_to_zero() -> None:
    x = [torch.full((1,), 3.0) for _ in range(3)]
    for sums in ([1.0, 3.0, 9.0], [0.0, 0.0, 0.0]):
        loss, _ = ops.ppo_loss(*x, advantage_sums=torch.tensor(sums, dtype=torch.float64))
        assert loss.item() == (0.0 if sums[0] else -30000.0)  # (3 - 0) / sqrt(1e-8)


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_ratio_quantiles_are_close_to_the_exact_ones(scale: float) -> None:
    old, d = torch.zeros(40, 50), cases.random(40, 50, scale=scale)
    mask = cases.random(40, 50, seed=2) > -0.5
    _, stats = ops.ppo_loss(d, old, old, mask=mask)
    for name, share in (("ratio_p05", 0.05), ("ratio_p95", 0.95)):
        exact = d[mask].quantile(share)
        assert abs(float(stats[name].log() - exact)) < 0.25 * abs(float(exact))
    _, stats = ops.ppo_loss(old, old, old, mask=mask)
    assert all(stats[name].item() == 1 for name in ("ratio_p05", "ratio_p95", "ratio_min", "ratio_max"))


@pytest.mark.parametrize(
    "shift", [-0.4, 0.0, 0.4]
)  # what lies at a quantile is below or above all edges, or between two
def test_ratio_quantiles_are_the_definitions_in_every_backend(kernel_backend: Backend, shift: float) -> None:
    old, d = torch.zeros(7, 50), cases.random(7, 50, scale=0.2) + shift
    _, stats = kernel_backend(ops.ppo_loss, d, old, old)
    _, defined = Backend("reference")(ops.ppo_loss, d, old, old)
    for name in ("ratio_p05", "ratio_p95"):
        assert_close(stats[name], defined[name], 1e-5, name)


def test_huge_log_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -900.0], requires_grad=True)
    loss, stats = ops.ppo_loss(logprobs, torch.tensor([-900.0, 0.0]), torch.tensor([-1.0, -1.0]))
    loss.backward()
    assert loss.isfinite() and gradient_of(logprobs).isfinite().all()
    assert_close(stats["ratio_max"], torch.tensor(math.exp(20)), 100)


def test_gradients_flow_only_to_logprobs_values_and_entropy() -> None:
    inputs = {k: v.requires_grad_() for k, v in batch(4, 9).items()}
    ops.ppo_loss(**inputs, mask=cases.holes(), **ALL_TERMS)[0].backward()
    assert {k for k, v in inputs.items() if v.grad is not None} == {"logprobs", "values", "entropy"}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_may_hold_anything_and_get_no_gradient(aggregation: str, garbage: float) -> None:
    inputs, mask = batch(4, 9), cases.holes()
    options = {**ALL_TERMS, "mask": mask, "aggregation": aggregation}
    poisoned: dict[str, Any] = {k: cases.poison(v, mask, garbage).requires_grad_() for k, v in inputs.items()}
    got, got_stats = ops.ppo_loss(**poisoned, **options)
    want, want_stats = ops.ppo_loss(**inputs, **options)
    got.backward()
    assert torch.equal(got, want)
    assert all(torch.equal(got_stats[name], want_stats[name]) for name in want_stats)
    for name in ("logprobs", "values", "entropy"):
        gradient = gradient_of(poisoned[name])
        assert gradient.isfinite().all()
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 5, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_gives_zero_with_a_graph(aggregation: str, denominator: Any, shape: tuple[int, ...]) -> None:
    inputs = {k: v.requires_grad_() for k, v in batch(*shape).items()}
    mask = torch.zeros(shape, dtype=torch.bool)
    options = {**ALL_TERMS, "aggregation": aggregation, "denominator": denominator}
    loss, stats = ops.ppo_loss(**inputs, mask=mask, **options)
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in stats.values())
    assert torch.equal(gradient_of(inputs["logprobs"]), torch.zeros(shape))


def test_rows_of_padding_change_nothing() -> None:
    inputs, mask = batch(3, 5), torch.ones(3, 5, dtype=torch.bool)
    pad = torch.nn.functional.pad
    for aggregation in AGGREGATIONS:
        short, _ = ops.ppo_loss(**inputs, mask=mask, aggregation=aggregation)
        wide: dict[str, Any] = {k: pad(v, (1, 2, 0, 2)) for k, v in inputs.items()}
        long, _ = ops.ppo_loss(**wide, mask=pad(mask, (1, 2, 0, 2)), aggregation=aggregation)
        assert_close(long, short, 1e-14)


def test_what_is_not_given_is_left_out() -> None:
    x = batch(4, 9)
    policy = {k: x[k] for k in ("logprobs", "old_logprobs", "advantages")}
    loss, stats = ops.ppo_loss(**policy)
    assert torch.equal(loss, stats["policy_loss"])
    assert all(stats[name].item() == 0 for name in ("value_loss", "entropy", "kl", "explained_variance"))
    watched, stats = ops.ppo_loss(**policy, entropy=x["entropy"], ref_logprobs=x["ref_logprobs"])
    assert torch.equal(watched, loss)
    assert_close(stats["entropy"], x["entropy"].mean(), 1e-12)


def test_a_flat_batch_needs_no_sequences_for_the_token_mean() -> None:
    inputs = batch(4, 9)
    flat = {k: v.flatten() for k, v in inputs.items()}
    got, _ = ops.ppo_loss(**flat, mask=cases.holes().flatten())
    assert_close(got, ops.ppo_loss(**inputs, mask=cases.holes())[0], 1e-12)


def test_compiles_as_one_graph() -> None:
    inputs = batch(4, 9, dtype=torch.float32)
    compiled = torch.compile(ops.ppo_loss, fullgraph=True, backend="aot_eager")
    got, _ = compiled(**inputs, mask=cases.holes(), **ALL_TERMS)
    assert_close(got, ops.ppo_loss(**inputs, mask=cases.holes(), **ALL_TERMS)[0], 1e-6)


def test_leaves_its_inputs_alone() -> None:
    inputs = {k: v.requires_grad_() for k, v in batch(4, 9).items()}
    assert_leaves_inputs_alone(ops.ppo_loss, **inputs, mask=cases.holes(), **ALL_TERMS)


# --- the kernels ------------------------------------------------------------------------------------------------------

OWN = ("logprobs", "values", "entropy")
SUMS = torch.tensor([36.0, 5.0, 60.0], dtype=torch.float64)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"objective": "cispo", "rollout_logprobs": None, "rollout_cap": 1.3, "advantage_sums": SUMS},
    {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04, "dual_clip": 1.1, "rollout_logprobs": None},
    ALL_TERMS | {"clip_high": 0.28},
    {"objective": "sapo", "tau_neg": 2.5, "value_clip": None, "kl_coef": 0.1, "kl": "k2", "denominator": 7},
    {"clip_low": 0.0, "kl": "k1+", "kl_coef": 0.2, "entropy_coef": 0.1, "denominator": torch.tensor(11)},
)


def everything(backend: Backend, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The loss, the statistics and the gradients by name."""
    leaves = {k: v.detach().clone().requires_grad_(k in OWN) for k, v in inputs.items()}
    loss, stats = backend(ops.ppo_loss, **leaves, **options)
    assert not any(x.requires_grad for x in stats.values())
    (loss * 1.5).backward()
    gradients = {f"in {k}": torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items() if k in OWN}
    return {"loss": loss.detach(), **stats, **gradients}


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "defaults")
@pytest.mark.parametrize("shape", [(4, 9), (1, 2100)], ids=str)
def test_kernels_are_no_worse_than_torch(
    kernel_backend: Backend, shape: tuple[int, int], options: dict[str, Any], aggregation: str, dtype: torch.dtype
) -> None:
    if kernel_backend.slow and shape == (1, 2100) and dtype != torch.float32:
        pytest.skip("an element takes a while there, and the narrow dtypes are loaded alike at (4, 9)")
    inputs, plain = batch(*shape, dtype=dtype), Backend("reference")
    if "rollout_logprobs" in options:
        inputs["rollout_logprobs"] = cases.random(*shape, seed=21, scale=0.4, dtype=dtype)
    for mask in (None, cases.random(*shape, seed=20) > -0.5):
        given = {**options, "mask": mask, "aggregation": aggregation}
        given.pop("rollout_logprobs", None)
        mine = everything(kernel_backend, inputs, **given)
        stock = everything(plain, inputs, **given)
        truth = everything(plain, {k: v.double() for k, v in inputs.items()}, **given)
        assert list(mine) == list(stock)
        for name in mine:
            assert mine[name].dtype == stock[name].dtype
            if name.startswith("in "):
                assert_no_worse_than_torch(mine[name], stock[name], truth[name], name)
            else:  # a sum of terms of the size of 1, which may cancel
                error = abs(float(stock[name]) - float(truth[name]))
                n, denominator = shape[0] * shape[1], float(options.get("denominator", math.inf))
                summed = math.sqrt(n) if aggregation == "sequence_sum_mean" else 0.0  # of whole sequences, not meaned
                size = max(1.0, abs(float(truth[name])), n / denominator, summed)
                rounding = 4 * torch.finfo(torch.float32).eps * size
                assert_close(mine[name], truth[name], 1.5 * error + rounding, name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_padded_on_kernels(kernel_backend: Backend, aggregation: str) -> None:
    lengths = [5, 0, 9, 1, 7]
    inputs, inside = batch(5, 9, dtype=torch.float32), cases.inside(lengths, 9)
    mask = inside & (cases.random(5, 9, seed=20) > -0.5)
    padded = everything(kernel_backend, inputs, mask=mask, aggregation=aggregation, ratio="sequence", **ALL_TERMS)
    flat: dict[str, Any] = {k: cases.pack(v, lengths) for k, v in inputs.items()}
    options: dict[str, Any] = {"cu_seqlens": cases.cu_seqlens_of(lengths), "mask": cases.pack(mask, lengths)}
    packed = everything(kernel_backend, flat, aggregation=aggregation, ratio="sequence", **options, **ALL_TERMS)
    for name in padded:
        want = cases.pack(padded[name], lengths) if name.startswith("in ") else padded[name]
        assert_close(packed[name], want, 1e-6, name)


@cases.property_test
@given(
    cases.ragged_masks(), st.sampled_from(AGGREGATIONS), st.sampled_from(("clip", "cispo", "sapo")),
    st.sampled_from(("token", "sequence")), st.sampled_from(cases.FLOATS), st.floats(0, 0.9), st.floats(0, 3),
)  # fmt: skip
def test_kernels_find_what_the_definition_says_of_any_batch(
    ragged: tuple[list[int], Tensor], aggregation: str, objective: str, ratio: str, dtype: torch.dtype, low: float,
    high: float,
) -> None:  # fmt: skip
    lengths, mask = ragged
    inputs = {**batch(*mask.shape, dtype=dtype), "rollout_logprobs": cases.random(*mask.shape, seed=21, dtype=dtype)}
    options: dict[str, Any] = {"aggregation": aggregation, "objective": objective, "ratio": ratio}
    options |= {"clip_low": low, "clip_high": high, "entropy_coef": 0.01, "kl_coef": 0.05}
    exact = {k: v.double() for k, v in inputs.items()}
    truth = everything(Backend("reference"), exact, mask=mask, **options)
    flat: dict[str, Any] = {k: cases.pack(v, lengths) for k, v in inputs.items()}
    where = {"mask": cases.pack(mask, lengths), "cu_seqlens": cases.cu_seqlens_of(lengths)}
    padded = everything(Backend("cpu"), inputs, mask=mask, **options)
    packed = everything(Backend("cpu"), flat, **where, **options)
    edge = is_near_a_bound(exact, mask, low, high, ratio)
    for name, want in truth.items():
        if edge and ("in logprobs" in name or "fraction" in name):
            continue  # a ratio so near to a bound may fall on its other side in float32
        size = max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        narrow = 1e-5 if dtype == torch.float32 or not name.startswith("in ") else 1e-2
        assert_close(padded[name], want, narrow * size, name)
        spread = cases.pack(want, lengths) if name.startswith("in ") else want
        assert_close(packed[name], spread, narrow * size, name)


def is_near_a_bound(x: dict[str, Tensor], mask: Tensor, low: float, high: float, ratio: str) -> bool:
    """Whether some ratio is within rounding of a bound."""
    d = x["logprobs"] - x["old_logprobs"]
    if ratio == "sequence":
        d = (d * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    r = d.exp()
    return bool(((r - (1 - low)).abs() < 1e-5).any() or ((r - (1 + high)).abs() < 1e-5).any())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_permuted_or_alone_a_sequence_gets_the_same_bits(kernel_backend: Backend, ratio: str) -> None:
    inputs, mask = batch(5, 70, dtype=torch.float32), cases.random(5, 70, seed=20) > -0.5
    options: dict[str, Any] = {**ALL_TERMS, "ratio": ratio, "aggregation": "sequence_mean", "denominator": 5}
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = everything(kernel_backend, inputs, mask=mask, **options)
    permuted = everything(kernel_backend, {k: v[order] for k, v in inputs.items()}, mask=mask[order], **options)
    alone = everything(kernel_backend, {k: v[2:3] for k, v in inputs.items()}, mask=mask[2:3], **options)
    for name in (name for name in whole if name.startswith("in ")):
        assert torch.equal(permuted[name], whole[name][order]), name
        assert torch.equal(alone[name], whole[name][2:3]), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_may_hold_anything_on_kernels(
    kernel_backend: Backend, aggregation: str, garbage: float
) -> None:
    inputs, mask = batch(4, 9, dtype=torch.float32), cases.holes()
    options = {**ALL_TERMS, "mask": mask, "aggregation": aggregation}
    poisoned = {k: cases.poison(v, mask, garbage) for k, v in inputs.items()}
    got, want = (everything(kernel_backend, x, **options) for x in (poisoned, inputs))
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert not name.startswith("in ") or not got[name][~mask].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_on_kernels(kernel_backend: Backend, aggregation: str) -> None:
    inputs, mask = batch(4, 9, dtype=torch.float32), cases.holes()
    options = {**ALL_TERMS, "aggregation": aggregation}
    count = mask.sum() if aggregation == "token_mean" else mask.any(1).sum()
    whole = everything(kernel_backend, inputs, mask=mask, **options)
    parts = [
        everything(
            kernel_backend, {k: v[rows] for k, v in inputs.items()}, mask=mask[rows], denominator=count, **options
        )
        for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    for name in ("loss", *ADD_UP, *(ADD_UP_WITH_TOKENS if aggregation == "token_mean" else ())):
        assert_close(torch.stack([part[name] for part in parts]).sum(), whole[name], 1e-6, name)
    for name in (name for name in whole if name.startswith("in ")):
        assert_close(torch.cat([part[name] for part in parts]), whole[name], 1e-6, name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 5, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_gives_zeros_on_kernels(
    kernel_backend: Backend, aggregation: str, denominator: Any, shape: tuple[int, ...]
) -> None:
    inputs, mask = batch(*shape, dtype=torch.float32), torch.zeros(shape, dtype=torch.bool)
    options = {**ALL_TERMS, "aggregation": aggregation, "denominator": denominator}
    for name, x in everything(kernel_backend, inputs, mask=mask, **options).items():
        assert not x.any(), name


def test_edges_on_kernels(kernel_backend: Backend) -> None:
    d = torch.tensor([0.0, -900.0], requires_grad=True)
    loss, stats = kernel_backend(ops.ppo_loss, d, torch.tensor([-900.0, 0.0]), torch.tensor([-1.0, -1.0]))
    loss.backward()
    assert loss.isfinite() and gradient_of(d).tolist() == [0.0, 0.0]
    assert_close(stats["ratio_max"], torch.tensor(math.exp(20)), 100)

    inputs = batch(2, 3, dtype=torch.float32)
    inputs["ref_logprobs"][0, 0] = -math.inf
    loss, stats = kernel_backend(ops.ppo_loss, **inputs, kl="k1")
    assert loss.isfinite() and stats["kl"].item() == math.inf

    _, stats = kernel_backend(ops.ppo_loss, **{**inputs, "returns": torch.full((2, 3), 0.1)})
    assert stats["explained_variance"].item() == 0

    loss, stats = kernel_backend(ops.ppo_loss, *(inputs[k] for k in PER_TOKEN[:3]))
    assert torch.equal(loss, stats["policy_loss"])
    assert all(stats[name].item() == 0 for name in ("value_loss", "entropy", "kl", "explained_variance"))

    nan = kernel_backend(ops.ppo_loss, *(torch.full((3,), math.nan) if i == 2 else torch.zeros(3) for i in range(3)))
    assert nan[0].isnan()


def test_same_call_same_bits(kernel_backend: Backend) -> None:
    inputs, options = batch(2, 600, dtype=torch.float32), {**ALL_TERMS, "mask": cases.random(2, 600, seed=20) > -0.5}
    first = everything(kernel_backend, inputs, **options)
    for _ in range(5 if kernel_backend.slow else 100):
        again = everything(kernel_backend, inputs, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, before, found = batch(30, 3000, dtype=torch.float32), torch.get_num_threads(), []
    mask = cases.random(30, 3000, seed=20) > -0.5
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(everything(Backend("cpu"), inputs, mask=mask, **ALL_TERMS))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_layout_changes_no_bit(kernel_backend: Backend) -> None:
    inputs = batch(6, 50, dtype=torch.float32)
    want = everything(kernel_backend, inputs)
    for layout in (cases.transposed, cases.unaligned):
        got = everything(kernel_backend, {k: layout(v) for k, v in inputs.items()})
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_gradient_of_the_gradient_is_refused(kernel_backend: Backend) -> None:
    inputs = batch(2, 3, dtype=torch.float32)
    logprobs = inputs["logprobs"].requires_grad_()
    loss, _ = kernel_backend(ops.ppo_loss, **inputs)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.autograd.grad(torch.autograd.grad(loss, logprobs, create_graph=True)[0].sum(), logprobs)


def test_backward_again_gives_the_same_gradients_and_scales_them_anew(kernel_backend: Backend) -> None:
    inputs = batch(2, 3, dtype=torch.float32)
    own = [inputs[name].requires_grad_() for name in OWN]
    loss, _ = kernel_backend(ops.ppo_loss, **inputs, **ALL_TERMS)
    first = torch.autograd.grad(loss, own, retain_graph=True)
    kept = [x.clone() for x in first]
    twice = torch.autograd.grad(loss, own, grad_outputs=torch.tensor(2.0), retain_graph=True)
    again = torch.autograd.grad(loss, own)
    for a, b, c, d in zip(first, kept, twice, again, strict=True):
        assert torch.equal(a, b) and torch.equal(c, 2 * b) and torch.equal(d, b)


def call(needs: list[bool]) -> PPOCall:
    options = PPOOptions(dual_clip=3.0, value_coef=0.5, entropy_coef=0.01, kl_coef=0.05)
    return PPOCall(True, options.numbers().pack(), needs, torch.float32, "cpu")


def test_beside_its_kernels_it_asks_for_memory_only() -> None:
    """Each operation of PyTorch's would be a launch, which takes as long as a kernel of its own on a small batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from rlhf_fast.ops.ppo_loss import ppo_loss_forward, ppo_loss_gradients

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operations: set[str] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations.add(str(function))
            return function(*args, **(kwargs or {}))

    x = batch(3, 7, dtype=torch.float32)
    own, mask = [x[name] for name in OWN], cases.random(3, 7, seed=20) > -0.5
    tensors = PPOTensors(
        **x, rollout_logprobs=None, mask=mask, weights=None, log_ratios=None, advantage_sums=SUMS
    )  # fmt: skip
    denominator, upstream = torch.tensor(9.0), torch.tensor(1.0)
    with Record() as record:
        _, _, *found = ppo_loss_forward(*tensors, denominator, 0.0, *call([True, True, True]))
        ppo_loss_gradients(upstream, *found, *own, "cpu")
    memory = {"aten.new_empty.default", "aten.empty_like.default", "aten.empty.memory_format"}
    assert record.operations <= memory, record.operations


@pytest.mark.seconds(4)
def test_compiles_with_changing_shapes_and_gradients() -> None:
    compiled = torch.compile(ops.ppo_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, aggregation in ((3, "token_mean"), (5, "token_mean"), (4, "sequence_mean")):
        inputs = batch(n, 7, dtype=torch.float32)
        logprobs = inputs["logprobs"].requires_grad_()
        got, stats = compiled(**inputs, aggregation=aggregation, **ALL_TERMS)
        want, exact = ops.ppo_loss(**inputs, aggregation=aggregation, **ALL_TERMS)
        assert torch.equal(got, want) and torch.equal(stats["kl"], exact["kl"])
        assert torch.equal(torch.autograd.grad(got, logprobs)[0], torch.autograd.grad(want, logprobs)[0])


def test_is_registered_as_torch_wants_it() -> None:
    inputs = batch(3, 7, dtype=torch.float32)
    for name in OWN:
        inputs[name].requires_grad_()
    tensors = PPOTensors(
        **inputs, rollout_logprobs=cases.random(3, 7, seed=21), mask=cases.random(3, 7, seed=20) > -0.5, weights=None,
        log_ratios=None, advantage_sums=SUMS,
    )  # fmt: skip
    op = torch.ops.rlhf_fast.ppo_loss_forward.default
    torch.library.opcheck(op, (*tensors, torch.tensor(9.0), 0.0, *call([True, True, True])))
    few = PPOTensors._make([*tensors[:3], *[None] * 10])
    torch.library.opcheck(op, (*few, None, 0.0, *call([True, False, False])))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"advantages": torch.zeros(2, 4)}, ValueError, r"advantages: shape \(2, 4\), expected \(2, 3\) like logprobs"),
        ({"advantages": torch.zeros(2, 3).int()}, TypeError, "advantages: int32, expected float32"),
        ({"values": None}, ValueError, "values: None, expected a tensor because returns or old_values is given"),
        ({"returns": None}, ValueError, "returns: None, expected a tensor because values is given"),
        ({"old_values": None}, ValueError, "old_values: None, expected a tensor because value_clip is not None"),
        ({"entropy": None, "entropy_coef": 0.1}, ValueError, "entropy: None, expected a tensor because entropy_coef"),
        ({"ref_logprobs": None, "kl_coef": 0.1}, ValueError, "ref_logprobs: None, expected a tensor because kl_coef"),
        ({"clip_low": -0.1}, ValueError, "clip_low: -0.1, expected a number >= 0"),
        ({"clip_high": math.nan}, ValueError, "clip_high: nan"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip: 1.0, expected a number > 1"),
        ({"kl": "k5"}, ValueError, "kl: 'k5', did you mean 'k"),
        ({"aggregation": "tokenmean"}, ValueError, "aggregation: 'tokenmean', did you mean 'token_mean'"),
        ({"denominator": 0}, ValueError, "denominator: 0, expected a number > 0"),
        ({"denominator": torch.tensor(-2)}, ValueError, "denominator: -2.0, expected a number >= 0"),
        ({"denominator": torch.ones(2)}, ValueError, r"denominator: shape \(2,\), expected a number or a tensor of"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: float32, expected bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask: shape \(3,\), expected \(2, 3\)"),
        ({"objective": "clipped"}, ValueError, "objective: 'clipped', did you mean 'clip'"),
        ({"objective": "cispo", "dual_clip": 3.0}, ValueError, "dual_clip: 3.0, expected None because objective is"),
        ({"ratio": "sentence"}, ValueError, "ratio: 'sentence', did you mean 'sequence'"),
        (
            {"objective": "sapo", "dual_clip": 3.0},
            ValueError,
            "dual_clip: 3.0, expected None because objective is 'sapo'",
        ),
        ({"tau_pos": 0.0}, ValueError, "tau_pos: 0.0, expected a number > 0"),
        ({"rollout_cap": 0}, ValueError, "rollout_cap: 0, expected a number > 0"),
        ({"rollout_logprobs": torch.zeros(3)}, ValueError, r"rollout_logprobs: shape \(3,\), expected \(2, 3\)"),
        ({"advantage_sums": torch.zeros(3)}, ValueError, r"advantage_sums: float32 of shape \(3,\), expected float64"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"logprobs: shape \(2, 3\), expected \(N,\) because cu_seq"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.ppo_loss(**{**batch(2, 3), **change})


def test_sequences_must_be_known_where_they_matter() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens: None, expected \(B \+ 1,\) because aggregation is 'sequence_me"):
        ops.ppo_loss(**batch(6), aggregation="sequence_mean")
    with pytest.raises(ValueError, match=r"cu_seqlens: None, expected \(B \+ 1,\) because ratio is 'sequence'"):
        ops.ppo_loss(**batch(6), ratio="sequence")
