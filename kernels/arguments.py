"""Arguments of the kernels, whichever language those are written in: rows of memory, tensors, options, results.

Each tuple has the fields of a struct in csrc/common, in its order; tests/unit/ops/test_contracts.py holds the two
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """The rows of a tensor (..., columns) of any strides, in elements: row r starts at
    ``(r // inner) * outer_stride + (r % inner) * inner_stride``. Two levels, so that ``logits[:, :-1]`` needs no
    copy."""

    data: Tensor
    rows: int
    columns: int
    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int


class Transform(NamedTuple):
    """z = softcap * tanh(scale * x / softcap) / temperature; a softcap of 0 means none."""

    scale: float
    softcap: float
    temperature: float
    temperatures: Tensor | None  # (rows,) float32, in place of the number


class Sequences(NamedTuple):
    """Sequences of a batch: padded, or packed between the starts in cu_seqlens."""

    cu_seqlens: Tensor | None  # contiguous; None: padded
    number: int
    length: int  # of each, if padded


class TokenRewards(NamedTuple):
    """Rewards of tokens, as csrc/common/gae.h puts them together: rewards - kl_coef (logprobs - ref_logprobs), and the
    score on the last token that counts."""

    rewards: Tensor | None
    logprobs: Tensor | None
    ref_logprobs: Tensor | None  # with logprobs
    scores: Tensor | None  # float32, one a sequence
    kl_coef: float


class Decays(NamedTuple):
    """Decays of the advantage from a token to the one before it, each in [0, 1]."""

    gamma: float
    lam: float
    critic_lam: float  # of the returns


class GAEInputs(NamedTuple):
    """The inputs of gae, in the order of csrc/common/gae.h; all tensors contiguous, those of tokens of one dtype."""

    sequences: Sequences
    paid: TokenRewards
    values: Tensor
    mask: Tensor | None
    bootstrap: Tensor | None  # float32, one a sequence
    decays: Decays


class PPOTensors(NamedTuple):
    """The tensors of ppo_loss, in the order of csrc/common/ppo_loss.h's PPOInputs. Kernels want them contiguous, and
    those of ``per_token`` in one dtype."""

    logprobs: Tensor | None  # None: linear_ppo_loss has yet to compute them
    old_logprobs: Tensor
    advantages: Tensor
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    entropy: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    mask: Tensor | None  # bool
    weights: Tensor | None  # float32, of each token's terms
    log_ratios: Tensor | None  # float32, in place of logprobs - old_logprobs
    advantage_sums: Tensor | None  # (3,) float64, to whiten the advantages by

    @property
    def per_token(self) -> tuple[Tensor | None, ...]:
        """The tensors named in PPO_PER_TOKEN, which share a dtype."""
        return self[:_MASK]

    @property
    def others(self) -> tuple[Tensor | None, ...]:
        """The mask and what follows, each in a dtype of its own."""
        return self[_MASK:]

    def of_rows(self, rows: Callable[[Tensor], Tensor | None], mask: Tensor | None) -> PPOTensors:
        """Apply ``rows``, a selection of rows, to every tensor that has a number a token, and take this mask."""
        parts = [None if x is None or x is self.mask else rows(x) for x in self[:-1]]
        parts[_MASK] = mask
        return PPOTensors._make((*parts, self.advantage_sums))


_MASK = PPOTensors._fields.index("mask")
PPO_PER_TOKEN = PPOTensors._fields[:_MASK]


class PPONumbers(NamedTuple):
    """The options of ppo_loss as kernels have them, in the order of csrc/common/ppo_loss.h's PPOOptions."""

    clip_low: float
    clip_high: float
    dual_clip: float  # 0: none
    value_clip: float  # below 0: none
    value_coef: float
    entropy_coef: float
    kl_coef: float
    rollout_cap: float
    tau_pos: float
    tau_neg: float
    objective: int  # as csrc/common/ppo_loss.h numbers them
    kl: int  # as csrc/common/kl_estimate.h numbers the estimates
    kl_slope: int  # the one whose gradient it gets

    def pack(self) -> list[float]:
        """Numbers alone, all floats: how the options cross the boundary of torch.library."""
        return [float(x) for x in self]

    @classmethod
    def unpack(cls, numbers: Sequence[float]) -> PPONumbers:
        """Undo ``pack``."""
        *others, objective, kl, kl_slope = numbers
        return cls._make((*others, int(objective), int(kl), int(kl_slope)))

    def in_triton(self) -> dict[str, Any]:
        """Arguments of Triton's kernel: numbers by their names, and in capitals what is compiled in."""
        numbers = self._asdict()
        compiled_in = {name.upper(): numbers.pop(name) for name in ("objective", "kl", "kl_slope")}
        return {**numbers, **compiled_in, "DUAL": self.dual_clip != 0, "KL_COUNTS": self.kl_coef != 0}


class PPOResults(NamedTuple):
    """Results of ppo_loss, in the order of csrc/common/ppo_loss.h's PPOResults."""

    loss: Tensor  # ()
    stats: Tensor
    inverse: Tensor  # (), of what divides the loss's terms
    grad_logprobs: Tensor | None  # float32, of the sum of terms
    grad_values: Tensor | None
    grad_entropy: Tensor | None
    partials: Tensor  # (ranges, sums) float64, scratch


class PairTensors(NamedTuple):
    """The tensors of dpo_loss and reward_loss, in the order of csrc/common/pair_loss.h's PairInputs. Kernels want them
    contiguous, ``rewards`` in one dtype and the others in float32."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    margins: Tensor | None  # by how much chosen should win
    weights: Tensor | None  # of a pair
    kl: Tensor | None  # one number, for kto

    @property
    def rewards(self) -> tuple[Tensor | None, ...]:
        """The log-probabilities (or scores) that the rewards of a pair are made of, which share a dtype."""
        return self[:_MARGINS]

    @property
    def others(self) -> tuple[Tensor | None, ...]:
        """The margins and what follows."""
        return self[_MARGINS:]


_MARGINS = PairTensors._fields.index("margins")


class PairNumbers(NamedTuple):
    """The options of the pair losses as kernels have them, in the order of csrc/common/pair_loss.h's PairOptions."""

    kind: int
    beta: float
    agree: float  # of the logistic loss of the difference
    differ: float  # of that of its negative
    center_coef: float

    def pack(self) -> list[float]:
        """Numbers alone, all floats: how the options cross the boundary of torch.library."""
        return [float(x) for x in self]

    @classmethod
    def unpack(cls, numbers: Sequence[float]) -> PairNumbers:
        """Undo ``pack``."""
        kind, *others = numbers
        return cls._make((int(kind), *others))

    def in_triton(self) -> dict[str, Any]:
        """Arguments of Triton's kernel: numbers by their names, and in capitals what is compiled in."""
        numbers = self._asdict()
        return {"KIND": numbers.pop("kind"), **numbers}


class PairResults(NamedTuple):
    """Results of a pair loss, in the order of csrc/common/pair_loss.h's PairResults."""

    stats: Tensor  # loss, accuracy, margin, chosen_reward, rejected_reward, 1 / divisor
    grad_chosen: Tensor | None  # float32, of the sum of the pairs' losses
    grad_rejected: Tensor | None


class SampleOptions(NamedTuple):
    """Options of each row of sample, (B,) each, in the order of csrc/common/sample.h's SampleInputs."""

    temperature: Tensor  # float32
    top_k: Tensor  # int32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    uniform: Tensor  # float64


class Denominator(NamedTuple):
    """Divisor of a sum: a tensor of one number, or a number, or (both missing) how many tokens or pairs count."""

    tensor: Tensor | None = None  # () float32, on the device; 0 counts as 1
    number: float = 0.0  # 0: none

    @property
    def kind(self) -> int:
        """Number by which the Triton kernels tell the three apart: 1 a tensor, 2 a number, 0 what counts."""
        return 1 if self.tensor is not None else 2 if self.number else 0
