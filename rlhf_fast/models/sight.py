"""Find which tokens each layer of a model sees, by asking its masks; and up to which length its rows are their own.

Windows and chunks of attention show only in sequences longer than they are, too long to be tried. But a model that
attends through transformers' interface also takes its masks from there, as a function of two positions: asked here
about positions as far apart as one likes, without a sequence of that length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rlhf_fast.models.inner import FAILURES, evaluating, is_near, measured_once, trunk
from rlhf_fast.models.packed_attention import attending_by

NAME, UNMASKED = "rlhf_fast_asked", "rlhf_fast_unmasked"
FAR = 1 << 21  # positions that are asked about
UNLIMITED = sys.maxsize
TOKENS = 16  # of the sequence that the model is run on


class Sight(NamedTuple):
    """Tokens that a layer's attention sees: all before a token, or the last `window`, its own included."""

    window: int = 0  # 0: all
    longest: int = UNLIMITED  # sequences for which that is so


Sees = Callable[..., Any]  # (row, head, query's position, key's position) -> bool


class _Asking:
    """Masks of one forward pass, by the layer that was given them."""

    def __init__(self) -> None:
        self.made: list[tuple[torch.Tensor, Sees]] = []  # masks, and what they were made from
        self.given: dict[int, torch.Tensor | None] = {}  # the mask that each layer was given

    def sees(self, mask: torch.Tensor) -> Sees | None:
        """Find what a mask was made from, as it stands or as a view of all of it."""
        for made, sees in self.made:
            if mask.data_ptr() == made.data_ptr() and mask.shape == made.shape:
                return sees
        return None


_asking: ContextVar[_Asking | None] = ContextVar("rlhf_fast_asking", default=None)


def _mask(mask_function: Callable[..., Any], **options: Any) -> torch.Tensor:
    """A mask as sdpa's; what it was made from is noted."""
    options = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Any = sdpa_mask(mask_function=mask_function, **options)
    if (asking := _asking.get()) is not None:
        asking.made.append((made, mask_function))
    return made


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """The mask is noted; the result is of no consequence."""
    if (asking := _asking.get()) is not None:
        asking.given.setdefault(int(module.layer_idx), attention_mask)  # type: ignore[arg-type]
    rows, heads, tokens, _dim = query.shape
    return query.new_zeros(rows, tokens, heads, value.shape[-1]), None


def _attend_causally(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    scale = options.get("scaling")
    made = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return made.transpose(1, 2), None


AttentionInterface.register(NAME, _attend)
AttentionInterface.register(UNMASKED, _attend_causally)
AttentionMaskInterface.register(NAME, _mask)


def sights(inner: Any) -> dict[int, Sight]:
    """Find what each layer sees that attends through transformers' interface.

    Raises:
        ValueError: a layer's mask is the model's own, or neither a window nor all that stands before.
    """
    return measured_once(inner, "sights", _sights)


@torch.no_grad()
def _sights(inner: Any) -> dict[int, Sight]:
    name, asking = type(inner).__name__, _Asking()
    token = _asking.set(asking)
    try:
        with attending_by(inner, NAME), evaluating(inner):
            trunk(inner)(input_ids=_ids(inner, 1), use_cache=False)
    except FAILURES as error:
        raise ValueError(f"model: {name} cannot be asked what its layers see: {error}") from error
    finally:
        _asking.reset(token)
    by_layer = {}
    for layer, mask in sorted(asking.given.items()):
        by_layer[layer] = Sight()  # without a mask the interface takes causal attention
        if mask is not None:
            by_layer[layer] = _sight(name, layer, asking.sees(mask), mask.device)
    return by_layer


def _sight(name: str, layer: int, sees: Sees | None, device: torch.device) -> Sight:
    if sees is None:
        raise ValueError(f"model: {name} makes a mask of its own for layer {layer}, of which no window can be known")

    def asked(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        try:
            return torch.as_tensor(sees(0, 0, query.to(device), key.to(device))).expand(query.shape).cpu()
        except FAILURES as error:
            what = f"a mask for layer {layer} that depends on more than positions"
            raise ValueError(f"model: {name} has {what}") from error

    def is_right(window: int, longest: int) -> bool:
        """Return whether a layer sees that window in sequences of that length: at its edges, and at places drawn."""
        drawn = torch.randint(0, longest, (2, 512), generator=torch.Generator().manual_seed(0))
        queries = torch.cat([torch.arange(min(64, longest)), drawn[0]])
        edges = torch.arange(-3, 4)
        near = [queries.view(-1, 1) + edges, queries.view(-1, 1) - window + edges]
        keys = torch.cat([*near, drawn[1][torch.arange(len(queries)) % 512].view(-1, 1)], dim=1)  # (queries, 15)
        query, key = queries.view(-1, 1).expand_as(keys).flatten(), keys.flatten()
        inside = (key >= 0) & (key < longest)
        query, key = query[inside], key[inside]
        return torch.equal(asked(query, key).bool(), (key <= query) & (query - key < window))

    first = 1 + _last(lambda place: bool(asked(torch.tensor([place]), torch.tensor([0]))), 0, FAR)
    if first > FAR and is_right(FAR, FAR):
        return Sight()
    if is_right(first, FAR):
        return Sight(window=first)
    if is_right(first, first):
        return Sight(longest=first)  # a chunk, for instance
    raise ValueError(f"model: {name} sees in layer {layer} neither all that stands before nor a window of it")


def reach_of(inner: Any) -> int:
    """Find how long sequences may be that have the states they have alone; measured once, kept with the model.

    Rotations that are chosen by the longest sequence of a batch (LongRoPE, dynamic NTK) change all its rows, and what
    was generated before: past that length there is no one right value.
    """
    weight = inner.get_input_embeddings().weight
    if weight.is_meta or isinstance(weight, FakeTensor):  # without values there is nothing to run
        return UNLIMITED
    return measured_once(inner, "reach", _reach)


@torch.no_grad()
def _reach(inner: Any) -> int:
    """Measure by two rows of the same tokens, one of which is moved further and further, until it changes the other."""
    table = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(table, int) or table <= TOKENS:
        return UNLIMITED
    ids, at = _ids(inner, 2), torch.arange(TOKENS, device=inner.device)

    def states(end: int) -> torch.Tensor:
        positions = torch.stack([at, at + end - TOKENS])
        hidden: torch.Tensor = trunk(inner)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[0]

    far = table if _has_table(inner, table) else 2 * table  # where rotations that grow have grown
    try:
        with evaluating(inner):
            furthest = _furthest(states, TOKENS, far)
            states(TOKENS)  # rotations that grow are set back by a short sequence
    except FAILURES:  # it takes no positions
        return UNLIMITED
    return furthest


def _has_table(inner: Any, positions: int) -> bool:
    """Return whether a model looks positions up, in which case there may be no more of them."""
    words = inner.get_input_embeddings()
    tables = [m.weight for m in inner.modules() if isinstance(m, nn.Embedding) and m is not words]
    tables += [x for name, x in inner.named_parameters() if "pos" in name.rpartition(".")[2]]
    tables += [x for x in inner.buffers() if x.dim() >= 2]
    return any(positions <= size < positions + TOKENS for x in tables for size in x.shape[:-1])


def longest_row(inner: Any) -> int:
    """Find how many tokens a row may have in which a token's place in the row is not its position in its sequence.

    There are models that count the tokens of a row by themselves, and from some place on scale their queries by it
    (Llama 4). Found by having them count from further and further away, while positions are as they were.
    """
    return measured_once(inner, "longest_row", _longest_row)


@torch.no_grad()
def _longest_row(inner: Any) -> int:
    ids, at = _ids(inner, 1)[:, :5], torch.arange(5, device=inner.device).unsqueeze(0)

    def states(offset: int) -> torch.Tensor:
        with attending_by(inner, UNMASKED), _CountingFrom(offset):  # without masks, which are made by counting, too
            hidden: torch.Tensor = trunk(inner)(input_ids=ids, position_ids=at, use_cache=False).last_hidden_state
        return hidden

    try:
        with evaluating(inner):
            furthest = _furthest(states, 0, FAR)
        return furthest if furthest == UNLIMITED else furthest + 5
    except FAILURES:
        return 0


class _CountingFrom(TorchFunctionMode):
    """Whoever counts five things begins at `offset`."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        return made + self.offset if function is torch.arange and made.shape == (5,) else made


def _furthest(states: Callable[[int], torch.Tensor], near: int, far: int) -> int:
    """The last place from near to far at which the states are those at `near`, or without end, if `far` is one."""
    want = states(near)
    last = _last(lambda place: is_near(states(place), want, half=2e-2), near, far)
    return UNLIMITED if last == far else last


def _last(holds: Callable[[int], bool], near: int, far: int) -> int:
    """The last place from near to far up to which that holds, as it does at `near`."""
    if holds(far):
        return far
    while far - near > 1:
        middle = (near + far) // 2
        near, far = (middle, far) if holds(middle) else (near, middle)
    return near


def _ids(inner: Any, rows: int) -> torch.Tensor:
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([(11 * i + 5) % vocabulary for i in range(TOKENS)], device=inner.device)
    return ids.expand(rows, TOKENS)
