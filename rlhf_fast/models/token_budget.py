"""Budget how many padded tokens are on the device at once: half as many where memory runs out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")

LEAST = 32  # tokens: below that, memory is not what the budget is spent on


@dataclass
class TokenBudget:
    """`optim.max_tokens_per_microbatch` of a run. No result depends on it but by rounding."""

    tokens: int

    def spend(self, part: str, work: Callable[[], Result]) -> Result:
        """Return what `work` gives, which goes by `tokens`; called again with half as many where memory is short.

        Raises:
            torch.OutOfMemoryError: not even a few tokens fit; names the part and what to do.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Out here, where no traceback holds on to the tensors of what failed any more.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.tokens // 2 < LEAST:
                raise torch.OutOfMemoryError(
                    f"{part}: out of memory with {self.tokens} tokens on the device at once ({reason}); shorten the "
                    "data or max_new_tokens, set optim.checkpointing or dtype bfloat16, or take a smaller model "
                    "(rlhf-fast doctor --config says what takes how much)"
                )
            self.tokens //= 2
            print(
                f"{part}: out of memory; going on with optim.max_tokens_per_microbatch = {self.tokens}, which changes "
                "no result",
                file=sys.stderr,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: on a GPU, or on a CPU, where torch says it in words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
