from __future__ import annotations

import torch

from rlhf_fast.data.batches import Example, pad
from rlhf_fast.rollout.rollouts import Rollouts

EXAMPLES = [Example((5, 6), (7, 0, 1)), Example((8,), (1,)), Example((9, 9, 9), (9, 9))]


def packed(examples: list[Example]) -> Rollouts:
    ids = [token for example in examples for token in example.prompt + example.response]
    mask = [m for e in examples for m in [False] * len(e.prompt) + [True] * len(e.response)]
    lengths = torch.tensor([0, *map(len, examples)])
    return Rollouts(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        response_mask=torch.tensor(mask, dtype=torch.bool),
        logprobs=-torch.arange(len(ids), dtype=torch.float32) * torch.tensor(mask, dtype=torch.float32),
        sampled_logprobs=torch.zeros(len(ids)),
        entropy=torch.zeros(len(ids)),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        prompt_index=torch.arange(len(examples)),
        texts=["text"] * len(examples),
        finish_reasons=["stop"] * len(examples),
    )


def test_examples_are_the_sequences_that_were_packed() -> None:
    assert packed(EXAMPLES).examples() == EXAMPLES
    assert len(packed(EXAMPLES)) == 3


def test_padded_tensors_hold_the_packed_values_on_the_left_and_padding_on_the_right() -> None:
    rollouts = packed(EXAMPLES)
    padded = rollouts.to_padded(padding_value=77)
    assert padded["attention_mask"].tolist() == [[True] * 5, [True] * 2 + [False] * 3, [True] * 5]
    for name, fill in (("input_ids", 77), ("response_mask", False), ("logprobs", 0.0)):
        value = getattr(rollouts, name)
        assert padded[name].dtype == value.dtype
        assert torch.equal(padded[name][padded["attention_mask"]], value)
        assert (padded[name][~padded["attention_mask"]] == fill).all()


def test_padded_rollouts_are_the_batch_that_training_makes_of_their_examples() -> None:
    rollouts = packed(EXAMPLES)
    padded, batch = rollouts.to_padded(), pad(rollouts.examples())
    assert torch.equal(padded["input_ids"], batch.input_ids)
    assert torch.equal(padded["response_mask"].flatten().nonzero()[:, 0], batch.predicted_at + 1)
    attended = padded["attention_mask"]
    assert torch.equal(attended.flatten().nonzero()[attended.sum(-1).cumsum(0) - 1, 0], batch.last)
    assert torch.equal(rollouts.input_ids[rollouts.response_mask], batch.response_tokens)


def test_no_rollouts_pad_to_nothing() -> None:
    empty = packed([])
    assert empty.examples() == []
    assert empty.to_padded()["input_ids"].shape == (0, 0)
