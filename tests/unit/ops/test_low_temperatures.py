"""Temperatures down to the smallest float32: sampling takes the likeliest token, log-probabilities are their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_fast import ops
from tests.unit.ops.cases import random, random_tokens
from tests.unit.ops.conftest import Backend

LOW = [2.0**-149, 1e-40, 1e-38, 1e-30, 1e-21]
ROWS, V, H = 5, 300, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("cut", [(0, 1.0, 0.0), (3, 0.9, 0.1)])
def test_sample_takes_the_likeliest(
    backend: Backend, dtype: torch.dtype, low: float, cut: tuple[int, float, float]
) -> None:
    logits = random(ROWS, V, dtype=dtype)
    logits[0, :20] = -torch.inf
    logits[1, 7] = logits[1].max() + 1
    single = [torch.full((ROWS,), x, dtype=torch.float32) for x in (low, cut[1], cut[2])]
    top_k, uniform = torch.full((ROWS,), cut[0], dtype=torch.int32), torch.linspace(0, 0.99, ROWS, dtype=torch.float64)
    likeliest = logits == logits.amax(-1, keepdim=True)
    tokens, logprobs, kept, entropy = backend(ops.sample, logits, uniform, single[0], top_k, single[1], single[2])
    assert bool(likeliest.gather(1, tokens[:, None]).all())
    alone = likeliest.sum(-1) == 1
    assert bool((logprobs[alone] == 0).all()) and bool((entropy[alone] == 0).all()) and bool((kept[alone] == 1).all())


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("per_row", [False, True])
def test_log_probabilities_are_their_limits(backend: Backend, low: float, per_row: bool) -> None:
    """0 for the likeliest token, which has gradient 0; gap / temperature for another, -inf if that is no float32."""
    temperature: Any = torch.full((ROWS,), low) if per_row else low
    exact = float(torch.tensor(low)) if per_row else low
    logits = random(ROWS, V).requires_grad_()
    best = logits.argmax(-1)
    logprobs, entropy = backend(ops.token_logprobs, logits, best, temperature)
    assert bool((logprobs == 0).all()) and bool((entropy == 0).all())
    logprobs.sum().backward()
    assert logits.grad is not None and bool((logits.grad == 0).all())
    other = (best + 1) % V
    gap = (logits.detach().double().gather(1, other[:, None]) - logits.detach().double().amax(-1, keepdim=True))[:, 0]
    found, _ = backend(ops.token_logprobs, logits.detach(), other, temperature)
    torch.testing.assert_close(found, (gap / exact).float(), rtol=1e-6, atol=0)

    hidden, weight = random(ROWS, H), random(V, H, seed=1)
    exact_logits = hidden.double() @ weight.double().T
    best = exact_logits.argmax(-1)
    found = backend(ops.linear_token_logprobs, hidden, weight, best, temperature=temperature)
    assert all(bool((x == 0).all()) for x in found)
    other = (best + 1) % V
    gap = exact_logits.gather(1, other[:, None])[:, 0] - exact_logits.amax(-1)
    found, entropy = backend(ops.linear_token_logprobs, hidden, weight, other, temperature=temperature)
    torch.testing.assert_close(found, (gap / exact).float(), rtol=1e-6, atol=0)
    assert bool((entropy == 0).all())
    zero = torch.zeros(ROWS)
    loss, stats = backend(
        ops.linear_ppo_loss, hidden.requires_grad_(), weight, best, zero, zero + 2.0, temperature=temperature
    )
    assert float(loss) == -2.0 and float(stats["ratio_max"]) == 1.0
    assert bool((backend(ops.full_kl, logits.detach(), logits.detach() * 2, temperature=temperature) == 0).all())


@pytest.mark.parametrize("too_low", [1e-60, torch.tensor([1.0, 1e-60], dtype=torch.float64)])
def test_what_is_no_float32_is_refused(too_low: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature: 1e-60.* at least 1\.4e-45, the smallest float32"):
        ops.token_logprobs(random(2, V), random_tokens(2, vocabulary=V), too_low)
