"""The loss and statistics of ppo_loss: those of the papers in plain Python, and the errors for bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, gradient_of
from tests.unit.ops.ppo_batches import ADD_UP, ADD_UP_WITH_TOKENS, AGGREGATIONS, ALL_TERMS, batch


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


def test_huge_log_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -900.0], requires_grad=True)
    loss, stats = ops.ppo_loss(logprobs, torch.tensor([-900.0, 0.0]), torch.tensor([-1.0, -1.0]))
    loss.backward()
    assert loss.isfinite() and gradient_of(logprobs).isfinite().all()
    assert_close(stats["ratio_max"], torch.tensor(math.exp(20)), 100)


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
