"""linear_dpo_loss: dpo_loss from the hidden states of both responses of each pair."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks
from rlhf_fast.ops.dpo_loss import dpo_loss
from rlhf_fast.ops.linear_token_logprobs import linear_token_logprobs
from rlhf_fast.ops.sequence_sum import sequence_sum


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
    loss: str = "sigmoid",
    weights: Tensor | None = None,
    kl: float | Tensor = 0.0,
    average: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`dpo_loss` of the responses' summed :func:`linear_token_logprobs`, which never holds the logits.

    Gradients flow to hidden, weight, bias and the adapter. A pair's gradients hang on all tokens of both responses, so
    the logits are computed twice.

    The caller shifts: row t of a model's output predicts token t + 1, so of whole sequences give ``hidden[:, :-1]``
    with ``tokens[:, 1:]`` and ``mask[:, 1:]``, as :func:`token_logprobs` says.

    Args:
        hidden: (2P, T, H) padded, or (N, H) packed with ``cu_seqlens``: the P chosen responses, then the P rejected.
        weight, bias, lora, softcap, logit_scale: as in :func:`linear_token_logprobs`.
        tokens: (2P, T) or (N,), int32 or int64, in [0, V); what is no response is masked.
        ref_chosen, ref_rejected: (P,), log-probabilities under the reference, summed like those of the policy.
        mask: the shape of tokens, bool, or None for all. Masked tokens cost no products.
        cu_seqlens: (2P + 1,), int32 or int64, for packed inputs.
        average: means over unmasked tokens in place of sums, for "ipo"; the reference's should be means too.
        All others: as in :func:`dpo_loss`.

    Returns:
        loss, a scalar, and stats, as :func:`dpo_loss`.

    Raises:
        TypeError, ValueError: as the three ops, and when the number of sequences is odd or not twice that of pairs.
    """
    logprobs, _ = linear_token_logprobs(
        hidden, weight, tokens, bias=bias, lora=lora, softcap=softcap, logit_scale=logit_scale, mask=mask
    )
    sequences = _checks.sequences("tokens", tokens, cu_seqlens)
    if sequences != 2 * ref_chosen.shape[0]:
        raise ValueError(
            f"tokens: {sequences} sequences, expected {2 * ref_chosen.shape[0]}: the chosen ones of "
            f"{ref_chosen.shape[0]} pairs, then the rejected ones"
        )
    sums = sequence_sum(logprobs, mask, cu_seqlens)  # (2P,)
    if average:
        ones = logprobs.detach().new_ones(logprobs.shape)
        sums = sums / sequence_sum(ones, mask, cu_seqlens).clamp(min=1)
    chosen, rejected = sums.chunk(2) if sequences else (sums, sums)
    return dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing,
        denominator=denominator, loss=loss, weights=weights, kl=kl,
    )  # fmt: skip
