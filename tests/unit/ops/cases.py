"""The cases that found bugs in other projects, as small functions that the tests of all ops share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

property_test = settings(max_examples=25, deadline=None, derandomize=True)
Case = Callable[[], "tuple[Tensor, Tensor]"]  # (N, V) float64 logits and (N,) tokens
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers from a seed of their own."""
    generator = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_tokens(*shape: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1013 + vocabulary)
    return torch.randint(0, vocabulary, shape, generator=generator).to(dtype)


# --- logits -----------------------------------------------------------------------------------------------------------


def plain() -> tuple[Tensor, Tensor]:
    return random(7, 123, scale=3, dtype=torch.float64), random_tokens(7, vocabulary=123)


def wide(vocabulary: int) -> Case:
    """Two rows of a vocabulary that a model has: some end in the middle of a block, some of a vector."""

    def case() -> tuple[Tensor, Tensor]:
        return random(2, vocabulary, scale=3, dtype=torch.float64), torch.tensor([vocabulary - 1, vocabulary // 3])

    case.__name__ = f"wide_{vocabulary}"
    return case


def certain() -> tuple[Tensor, Tensor]:
    """p(token) -> 1."""
    logits, tokens = random(5, 1000, dtype=torch.float64), random_tokens(5, vocabulary=1000)
    return logits.scatter(1, tokens[:, None], 40.0), tokens


def improbable() -> tuple[Tensor, Tensor]:
    """p(token) -> 1e-30."""
    logits, tokens = random(5, 1000, dtype=torch.float64), random_tokens(5, vocabulary=1000)
    return logits.scatter(1, tokens[:, None], math.log(1e-30)), tokens


def extreme() -> tuple[Tensor, Tensor]:
    """Logits of +-88, where exp ends in float32."""
    return random(6, 300, dtype=torch.float64).sign() * 88.0, random_tokens(6, vocabulary=300)


def all_equal() -> tuple[Tensor, Tensor]:
    return torch.full((3, 500), 7.25, dtype=torch.float64), random_tokens(3, vocabulary=500)


def some_minus_infinity() -> tuple[Tensor, Tensor]:
    """Every third word banned, the chosen one among them in row 0."""
    logits = random(6, 400, scale=2, dtype=torch.float64)
    logits[:, ::3] = -math.inf
    return logits, torch.tensor([0, 1, 2, 4, 200, 398])


def first_block_minus_infinity() -> tuple[Tensor, Tensor]:
    """Nothing but -inf until far into the row: an online softmax sees a whole block without a maximum."""
    logits = random(3, 1000, dtype=torch.float64)
    logits[:, :900] = -math.inf
    return logits, torch.tensor([900, 950, 999])


def one_finite() -> tuple[Tensor, Tensor]:
    logits = torch.full((2, 64), -math.inf, dtype=torch.float64)
    logits[:, 17] = 3.0
    return logits, torch.tensor([17, 17])


def deep() -> tuple[Tensor, Tensor]:
    """Logits so far apart that exp of the difference leaves float32, in one block and between blocks."""
    logits = random(3, 9000, dtype=torch.float64)
    logits[0, ::2] -= 150.0
    logits[1, :4500] -= 1000.0
    logits[2, 8000:] += 95.0
    return logits, torch.tensor([0, 1, 8999])


def one_word_vocabulary() -> tuple[Tensor, Tensor]:
    return random(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)


def no_rows() -> tuple[Tensor, Tensor]:
    return torch.empty(0, 50, dtype=torch.float64), torch.empty(0, dtype=torch.int64)


def one_row() -> tuple[Tensor, Tensor]:
    return random(1, 123, dtype=torch.float64), random_tokens(1, vocabulary=123)


LOGITS: tuple[Case, ...] = (
    plain, certain, improbable, extreme, all_equal, some_minus_infinity, first_block_minus_infinity, one_finite, deep,
    one_word_vocabulary, no_rows, one_row,
)  # fmt: skip
WIDE = tuple(wide(vocabulary) for vocabulary in (32000, 49152, 50257, 128256, 129920, 151936, 248320))


def logits_and_dtypes(*kinds: str) -> list[tuple[object, ...]]:
    """(case, dtype), or with kinds (case, dtype, kind): all of them, but each wide case once, as they take longest."""
    options = [(kind,) for kind in kinds] or [()]
    every = [(case, dtype, *option) for case in LOGITS for dtype in FLOATS for option in options]
    return [*every, *((case, FLOATS[i % 3], *options[i % len(options)]) for i, case in enumerate(WIDE))]


def case_id(x: object) -> str:
    """What a parametrised test is called."""
    return str(getattr(x, "__name__", x)).removeprefix("torch.")


# What may be done to a logit, all at once and one at a time.
TRANSFORMS: tuple[dict[str, float], ...] = (
    {"temperature": 0.7},
    {"logit_scale": 0.0625},
    {"softcap": 30.0},
    {"temperature": 1.3, "softcap": 5.0, "logit_scale": 2.0},
)


def transform(
    z: Tensor, temperature: float | Tensor = 1.0, softcap: float = math.inf, logit_scale: float = 1.0
) -> Tensor:
    """What people write for it; in float64, the truth, with a tanh whose gradient keeps its digits where tanh is 1."""
    z = z * logit_scale
    if softcap != math.inf:
        y = z / softcap
        z = softcap * (torch.tanh(y) if z.dtype != torch.float64 else 1 - 2 / (torch.exp(2 * y) + 1))
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


# --- masks and sequences ----------------------------------------------------------------------------------------


def holes() -> Tensor:
    """(4, 9): padding on either side, a hole as tool output leaves it, one token, no token."""
    rows = ("001101100", "111111111", "000010000", "000000000")
    return torch.tensor([[c == "1" for c in row] for row in rows])


def poison(x: Tensor, mask: Tensor, value: float = math.nan) -> Tensor:
    """x with ``value`` in the masked positions (mask may lack the last dimensions of x)."""
    return torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), x, value)


def cu_seqlens_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pack(padded: Tensor, lengths: list[int]) -> Tensor:
    """(B, T, ...) -> (N, ...): the first lengths[b] positions of each row, one after another."""
    return torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])


def inside(lengths: list[int], width: int) -> Tensor:
    """(B, T) bool, True in the first lengths[b] positions."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def transposed(x: Tensor) -> Tensor:
    """Equal to x, stored column by column."""
    return x.mT.contiguous().mT


def without_the_last_position(x: Tensor) -> Tensor:
    """Equal to x, inside a tensor of one more position a sequence: rows in two levels."""
    return torch.cat([x, x[..., -1:, :]], dim=-2)[..., :-1, :]


def repeated(x: Tensor) -> Tensor:
    """Equal to x if all rows of x are the same, and stored as one."""
    return x[..., :1, :].expand(x.shape)


def unaligned(x: Tensor) -> Tensor:
    """Equal to x, its first element one element past an allocation's start."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@st.composite
def ragged_masks(draw: st.DrawFn) -> tuple[list[int], Tensor]:
    """Lengths of up to 4 sequences, 0 among them, and a mask (B, T) with holes that is False past each length."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 2))
    bits = draw(st.lists(st.booleans(), min_size=len(lengths) * width, max_size=len(lengths) * width))
    return lengths, torch.tensor(bits, dtype=torch.bool).reshape(len(lengths), width) & inside(lengths, width)
