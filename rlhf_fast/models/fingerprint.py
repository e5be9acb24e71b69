"""Fingerprint a model's weights: numbers that change with any of them, by whatever hand."""

from __future__ import annotations

import torch
from torch import nn

ROW = 256  # words of eight bytes that are added up before their place counts
STRIDE = 997  # each so many words one whose very place counts


@torch.no_grad()
def fingerprint(model: nn.Module) -> tuple[int, ...]:
    """A number for each parameter and buffer, from all its bits. Tells weights apart, not forgers.

    It reads all weights once, which takes about as long as a step of generation does. PyTorch's own count of changes
    (`_version`) costs nothing and misses many: fused optimisers, writes through `.data` and through NumPy's views; and
    tensors that were made in inference mode have none.
    """
    sums = [_sum(x) for x in (*model.parameters(), *model.buffers()) if not x.is_meta]
    if len({x.device for x in sums}) == 1:
        return tuple(torch.stack(sums).tolist())  # one wait for the device
    return tuple(int(x) for x in sums)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Sum the bits, as words of eight bytes that wrap around: int64, of shape ()."""
    raw = x.detach().reshape(-1).view(torch.uint8)
    if raw.data_ptr() % 8:
        raw = raw.clone()
    words, rest = raw[: raw.numel() // 8 * 8].view(torch.int64), raw[raw.numel() // 8 * 8 :]
    whole = words.numel() // ROW * ROW
    tail = rest.to(torch.int64).sum() + _by_place(rest.to(torch.int64)) + _by_place(words[whole:])
    return tail + _by_place(words[:whole].view(-1, ROW).sum(1)) + _by_place(words[::STRIDE])


def _by_place(numbers: torch.Tensor) -> torch.Tensor:
    odd = torch.arange(1, 2 * numbers.numel() + 1, 2, device=numbers.device)
    return (numbers * odd).sum()
