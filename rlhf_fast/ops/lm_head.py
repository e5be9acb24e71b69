"""The output layer of a language model, one block of logits at a time: (rows, columns) of hidden @ weight.T + ...,
and the gradients that a block of logit gradients adds. Whole (N, V) logits never exist.

Products are in float32. Narrower hidden states and weights are widened on the CPU, the weights a tile at a time,
however few rows there are and so however wide a block is; on a GPU they are multiplied as they are, into float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import compiled

# (most rows, elements) of a block. On a CPU as much as stays in its caches and still runs the products at full speed;
# on a GPU enough to fill it many times over: 256 MiB.
_BLOCK = {"cpu": (1024, 1024 * 1536), "cuda": (8192, 1 << 26)}

# (elements of a block of whole rows, rows from which such blocks pay). 40 MiB and 1 GiB; measured with 49152 words on a
# CPU of 250 GFLOP/s and 20 GB/s, by count for a GPU of 700 TFLOP/s and 3.3 TB/s: rows = 4 * operations / bytes.
_WHOLE_ROWS = {"cpu": (10 << 20, 64), "cuda": (1 << 28, 1024)}

_TILE = 1 << 22  # elements of a weight that are widened at once, 16 MiB

_INTO_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype_out")  # products of narrow matrices into float32, on GPUs


class Block(NamedTuple):
    """Block of logits: its rows and columns of the whole matrix, and the memory that it is computed in."""

    rows: slice
    columns: slice
    logits: Tensor  # (rows, columns) float32, to be filled


class LoRA(NamedTuple):
    """logits += scaling * (hidden @ a.T) @ b.T, as peft has it."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scaling: float


def blocks(rows: int, columns: int, granule: int, device: torch.device) -> Iterator[Block]:
    """Cut (rows, columns) logits into blocks of one workspace: for each block of columns, its blocks of rows.

    Every block of columns but the last is a multiple of ``granule`` wide.
    """
    height, width = block_shape(rows, columns, granule, device.type)
    workspace = torch.empty(height * width if rows else 0, device=device)
    for column in range(0, columns if rows else 0, width):
        to_column = min(column + width, columns)
        for row in range(0, rows, height):
            shape = min(height, rows - row), to_column - column
            logits = workspace[: shape[0] * shape[1]].view(shape)
            yield Block(slice(row, row + shape[0]), slice(column, to_column), logits)


def block_shape(rows: int, columns: int, granule: int, device: str) -> tuple[int, int]:
    """(height, width) of those blocks on a type of device."""
    most_rows, elements = _BLOCK[device]
    height = max(min(rows, most_rows), 1)
    return height, min(columns, max(elements // height // granule, 1) * granule)


def whole_rows_pay(rows: int, vocabulary: int, device: torch.device) -> bool:
    """Return whether gradients are faster taken from blocks of whole rows, computed once, than from small ones.

    Each block is one more sweep over the gradient of the weights; with few rows to a block that costs more than to
    compute the logits twice.
    """
    elements, least = _WHOLE_ROWS[device.type]
    return elements // vocabulary >= min(rows, least)


def whole_rows(rows: int, columns: int, device: torch.device, frozen: bool) -> Iterator[Block]:
    """Cut a (rows, columns) matrix of logits into blocks of one workspace, each as wide as the matrix and about equally
    high; twice as high where the memory for a gradient of the weights is free, for higher products run faster."""
    height = height_of_whole_rows(rows, columns, device.type, frozen)
    workspace = torch.empty(height * columns, device=device)
    for row in range(0, rows, max(height, 1)):
        n = min(height, rows - row)
        yield Block(slice(row, row + n), slice(0, columns), workspace[: n * columns].view(n, columns))


def height_of_whole_rows(rows: int, columns: int, device: str, frozen: bool) -> int:
    """Return the height of the largest of those blocks of whole rows on a type of device."""
    elements = _WHOLE_ROWS[device][0] * (2 if frozen else 1)
    count = -(-rows // max(elements // columns, 1))
    return -(-rows // max(count, 1))


class Head:
    """hidden (N, H) with weight (V, H), bias (V,) and an adapter, ready to be multiplied."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None) -> None:
        narrow = hidden.device.type == "cuda" and hidden.dtype == weight.dtype and _INTO_FLOAT32
        self.dtype = hidden.dtype if narrow else torch.float32
        self.hidden, self.weight, self.bias, self.lora = hidden.to(self.dtype), weight, bias, lora
        self.adapted: Tensor | None = None  # (N, r): hidden @ a.T, in float32 whatever hidden is
        if lora is not None:
            self.adapted = torch.mm(hidden.float(), lora.a.float().T)
        self._columns, self._weight = slice(0, 0), weight  # the tile of weights that was widened last

    def fill(self, block: Block) -> None:
        """Compute a block's logits."""
        columns = block.columns
        for at, weight in self.tiles(columns):
            _multiply(self.hidden[block.rows], weight.T, block.logits[:, at])
        if self.lora is not None and self.adapted is not None:
            b = self.lora.b[columns].float()
            block.logits.addmm_(self.adapted[block.rows], b.T, alpha=self.lora.scaling)
        if self.bias is not None:
            block.logits.add_(self.bias[columns])

    def tiles(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """The weights of a block of columns in the dtype of the products, widened a tile at a time: where in the block
        they stand, and the weights."""
        for at in _tiles(self.weight[columns], self.dtype):
            part = slice(columns.start + at.start, columns.start + at.stop)
            if self._columns != part:
                self._columns, self._weight = part, self.weight[part].to(self.dtype)
            yield at, self._weight


def _tiles(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows of x, as many at a time as may be held in another dtype; all at once if that is x's own."""
    rows, columns = x.shape
    most = rows if x.dtype == dtype else max(_TILE // max(columns, 1), 1)
    for row in range(0, rows, max(most, 1)):
        yield slice(row, min(row + most, rows))


class HeadGradients:
    """Sums, over the blocks of logits, of the gradients that are needed: in float32, in the order of the blocks.

    ``needs``: for hidden, weight, bias, and the adapter's a and b. ``dtype``: of all results but hidden's, which is
    float32; None: each tensor's own.
    """

    def __init__(self, head: Head, needs: list[bool], dtype: torch.dtype | None = None) -> None:
        self.head, self.needs = head, needs
        need_hidden, need_weight, need_bias, need_a, need_b = needs
        lora = head.lora
        new = compiled.new_like if head.hidden.shape[0] else torch.zeros_like  # no block ever fills them without rows
        self.hidden = torch.zeros_like(head.hidden, dtype=torch.float32) if need_hidden else None  # (N, H)
        self.weight = new(head.weight, dtype=dtype) if need_weight else None  # (V, H)
        self.bias = None if head.bias is None or not need_bias else new(head.bias, dtype=dtype)  # (V,)
        self.b = None if lora is None or not need_b else new(lora.b, dtype=dtype)  # (V, r)
        self.dtype = dtype
        self.adapted: Tensor | None = None  # (N, r): in hidden @ a.T
        if head.adapted is not None and (need_hidden or need_a):
            self.adapted = torch.zeros_like(head.adapted)
        self._sums: dict[str, Tensor] = {}  # over the rows, of the columns at hand

    def add(self, block: Block) -> None:
        """Take in a block that holds gradients in place of logits."""
        head, lora, rows, columns = self.head, self.head.lora, block.rows, block.columns
        gradient = block.logits.to(head.dtype)
        if self.hidden is not None:
            for at, weight in head.tiles(columns):
                _multiply_add(gradient[:, at], weight, self.hidden[rows])
        if self.weight is not None:
            self._sum("weight", gradient.T, head.hidden[rows], self.weight[columns], rows)
        if self.bias is not None:
            ones = torch.ones(1, block.logits.shape[0], device=block.logits.device)
            self._sum("bias", ones, block.logits, self.bias[columns].unsqueeze(0), rows)
        if lora is not None and head.adapted is not None:
            if self.adapted is not None:
                self.adapted[rows].addmm_(block.logits, lora.b[columns].float(), alpha=lora.scaling)
            if self.b is not None:
                self._sum("b", block.logits.T, head.adapted[rows] * lora.scaling, self.b[columns], rows)

    def _sum(self, name: str, x: Tensor, y: Tensor, out: Tensor, rows: slice) -> None:
        """out = x @ y summed over the blocks of rows: in out itself if that is float32, else beside it, and a tile at
        a time where one block has all rows."""
        direct = out.dtype == torch.float32
        if not direct and rows.start == 0 and rows.stop == self.head.hidden.shape[0]:
            for at in _tiles(out, torch.float32):
                part = torch.empty_like(out[at], dtype=torch.float32)
                _multiply(x[at], y, part)
                out[at] = part
            return
        if rows.start == 0:
            self._sums[name] = out if direct else torch.empty_like(out, dtype=torch.float32)
            _multiply(x, y, self._sums[name])
        else:
            _multiply_add(x, y, self._sums[name])
        if rows.stop == self.head.hidden.shape[0] and not direct:
            out.copy_(self._sums[name])

    def finish(self) -> tuple[Tensor | None, ...]:
        """The gradients in hidden (float32), weight, bias, a and b, after all blocks; None where not needed."""
        lora, a = self.head.lora, None
        if lora is not None and self.adapted is not None:
            if self.hidden is not None:
                self.hidden.addmm_(self.adapted, lora.a.float())
            if self.needs[3]:
                a = torch.mm(self.adapted.T, self.head.hidden.float()).to(self.dtype or lora.a.dtype)
        return self.hidden, self.weight, self.bias, a, self.b


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x @ y, in float32."""
    if x.dtype == torch.float32:
        torch.mm(x, y, out=out)
    else:
        torch.mm(x, y, out_dtype=torch.float32, out=out)


def _multiply_add(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out += x @ y, in float32."""
    if x.dtype == torch.float32:
        out.addmm_(x, y)
    else:
        torch.addmm(out, x, y, out_dtype=torch.float32, out=out)
