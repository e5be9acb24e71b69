"""Split data into rows to train on and rows held out to measure on: by their own `split`, else by a share."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rlhf_fast.data.batches import shuffled

Item = TypeVar("Item")


def other_splits(splits: Sequence[str]) -> set[str]:
    """Select the splits that are held out: all but "train" and "", that of a row without a split."""
    return set(splits) - {"", "train"}


def split_as_labelled(
    items: Sequence[Item], others: Sequence[set[str]], what: str, least: int
) -> tuple[list[Item], list[Item]]:
    """Split items as (training, held-out) by the splits that their rows name.

    An item is held out if any of its rows is of another split than train; so nothing is held out if none is.

    Args:
        others: for each item, the splits besides train that its rows name.
        what: what the items are, for the error: "prompts".
        least: the fewest that may be held out, if any are.

    Raises:
        ValueError: nothing is left to train on, or fewer than `least` are held out.
    """
    training = [item for item, named in zip(items, others, strict=True) if not named]
    heldout = [item for item, named in zip(items, others, strict=True) if named]
    if heldout and (not training or len(heldout) < least):
        names = ", ".join(map(repr, sorted(set().union(*others))[:3]))
        raise ValueError(
            f"split: {len(heldout)} of {len(items)} {what} are held out, being of {names}; at least {least} and not "
            "all can be: every split but 'train' is held out (what only sorts rows is their category)"
        )
    return training, heldout


def split_heldout(items: Sequence[Item], share: float, seed: int, least: int = 1) -> tuple[list[Item], list[Item]]:
    """Split items at random as (training, held-out): at least one to train on, and at least `least` held out.

    Args:
        share: of the items that are held out; 0: none, and the items keep their order.

    Raises:
        ValueError: too few items for that, or a share that is not between 0 and 1.
    """
    if share == 0:
        return list(items), []
    if not 0.0 < share < 1.0:
        raise ValueError(f"heldout: {share}; expected a share between 0 and 1, such as 0.1, or 0 to hold nothing out")
    if len(items) < least + 1:
        raise ValueError(
            f"heldout: {len(items)} in all, of which {least} are to be held out and 1 to train on; give more data, or "
            "set heldout: 0, which measures nothing"
        )
    order = shuffled(items, seed)
    count = min(len(items) - 1, max(least, round(share * len(items))))
    return order[count:], order[:count]


def require_heldout(heldout: Sequence[Item], patience: int | None) -> None:
    """Refuse early stopping (`patience`) where nothing is held out to measure.

    Raises:
        ValueError: it is set, and nothing is held out.
    """
    if patience is not None and not heldout:
        raise ValueError(
            f"patience: {patience}, but nothing is held out to measure; set heldout above 0, or leave patience out"
        )


def label_splits(training: Sequence[Item], heldout: Sequence[Item], apart: bool = False) -> list[Item]:
    """Label records of two sources by their source: "train" and "heldout", whatever splits they name.

    A prompt that is in both is warned of; with `apart`, for comparisons, which are split by prompt, its records are not
    trained on.

    Raises:
        ValueError: nothing is left to train on.
    """
    records: list[Any] = [*training]
    others: list[Any] = [*heldout]
    if apart:
        asked = {_prompt(record) for record in others}
        records = [record for record in training if _prompt(record) not in asked]
        if not records:
            raise ValueError(
                "heldout_data: it has every prompt of the data, so that nothing is left to train on; "
                "expected other prompts"
            )
        if left := len(training) - len(records):
            warnings.warn(
                f"{left} of {len(training)} rows are not trained on, as heldout_data has their prompts", stacklevel=3
            )
    else:
        warn_of_shared(training, heldout)
    return [replace(r, split="train") for r in records] + [replace(r, split="heldout") for r in others]


def split_prompts(prompts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Split prompts as (training, held-out) by their column `split`; errors as for `split_as_labelled`."""
    others = [other_splits([str(prompt.columns.get("split") or "")]) for prompt in prompts]
    return split_as_labelled(prompts, others, "prompts", least=1)


def warn_of_shared(training: Sequence[Any], heldout: Sequence[Any]) -> None:
    """Warn of held-out records whose prompts are trained on."""
    asked = {_prompt(record) for record in training} if heldout else set()
    shared = sum(_prompt(record) in asked for record in heldout)
    if shared:
        warnings.warn(
            f"{shared} of {len(heldout)} held-out rows have a prompt that is trained on, too; what is measured on them "
            "says little of other prompts",
            stacklevel=4,
        )


def _prompt(record: Any) -> str:
    """Key a record by its prompt; a text and the user's message that says the same have one key."""
    prompt = record.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps(messages, sort_keys=True)
