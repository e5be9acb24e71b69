"""Whether the training prompts cover what people really ask: distances, near-duplicates, clusters, and what to collect.

`coverage` works on embeddings of any kind; `embeddings` makes them with the language model at hand. A request is
covered if a training prompt is as near to it as its next request is, at the radius that most requests have.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.batches import Batch, Example
from rlhf_fast.data.records import PromptRecord, user_text
from rlhf_fast.models.forward import hidden_states
from rlhf_fast.models.scoring import per_example

CATEGORIES = ("simple", "complex", "adversarial", "off_topic")
QUANTILE = 0.9  # of the requests' distances to their next request: the radius within which a request is covered
THIN = 0.5  # a category or cluster is thin where the prompts' share is below so much of the requests'
ROWS = 1024  # of a matrix of distances held at a time
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Share:
    """A category or a cluster: its share of the training prompts and of the requests."""

    name: str
    prompts: float
    requests: float

    @property
    def missing(self) -> bool:
        return self.requests > 0 and self.prompts == 0

    @property
    def thin(self) -> bool:
        return self.prompts < THIN * self.requests


@dataclass(frozen=True)
class Collect:
    """What to collect next: prompts like one request, which stands for others of its kind that nothing covers."""

    request: int  # the request in the midst of them
    uncovered: int  # how many of its cluster are not covered
    like: list[int]  # some of them, the farthest first


@dataclass(frozen=True)
class Coverage:
    """How P training prompts stand to R requests; indices are into these."""

    radius: float
    uncovered: list[int]  # requests, the farthest first
    share_uncovered: float
    share_expected: float  # of requests from which the next request is as far: what chance leaves uncovered
    nearest: np.ndarray  # (R,) int: the training prompt nearest to each request
    distance: np.ndarray  # (R,): how far that is, 1 - cosine
    clusters: list[Share]
    categories: list[Share]
    collect: list[Collect]


def coverage(
    prompts: np.ndarray,
    requests: np.ndarray,
    prompt_categories: Sequence[str] = (),
    request_categories: Sequence[str] = (),
    clusters: int = 0,
    seed: int = 0,
) -> Coverage:
    """Compare training prompts with real requests.

    Args:
        prompts: (P, H), rows of length 1 (see `prepared`).
        requests: (R, H), the same, at least 3 of them.
        prompt_categories, request_categories: one for each, or none at all. The shares of CATEGORIES are always listed.
        clusters: of the requests; 0: as many as the square root of half their number, at most 50.
        seed: of the clusters.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, categories of another count.
    """
    _check(prompts, requests)
    for name, given, rows in (("prompt", prompt_categories, prompts), ("request", request_categories, requests)):
        if len(given) not in (0, len(rows)):
            raise ValueError(f"{name}_categories: {len(given)} came; expected one for each of {len(rows)}, or none")
    nearest, distance = nearest_rows(requests, prompts)
    _, own = nearest_rows(requests, requests, but_itself=True)
    radius = float(np.quantile(own, QUANTILE))
    order = np.argsort(-distance, kind="stable")
    uncovered = [int(i) for i in order if distance[i] > radius + 1e-9]
    count = clusters or min(50, max(2, round((len(requests) / 2) ** 0.5)))
    centres, of_request = k_means(requests, min(count, len(requests)), seed)
    of_prompt, _ = nearest_rows(prompts, centres)
    return Coverage(
        radius=radius,
        uncovered=uncovered,
        share_uncovered=len(uncovered) / len(requests),
        share_expected=float((own > radius + 1e-9).mean()),
        nearest=nearest,
        distance=distance,
        clusters=_shares(of_prompt.tolist(), of_request.tolist(), list(range(len(centres)))),
        categories=_shares(list(prompt_categories), list(request_categories), list(CATEGORIES))
        if len(prompt_categories) and len(request_categories)
        else [],
        collect=_collect(requests, uncovered, of_request),
    )


def _collect(requests: np.ndarray, uncovered: list[int], cluster: np.ndarray) -> list[Collect]:
    """One request for each cluster that has uncovered ones, the clusters with most of them first."""
    found = []
    for name in np.unique(cluster[uncovered]) if uncovered else []:
        rows = [i for i in uncovered if cluster[i] == name]
        middle = rows[int((requests[rows] @ requests[rows].mean(axis=0)).argmax())]
        found.append(Collect(middle, len(rows), rows[:5]))
    return sorted(found, key=lambda each: (-each.uncovered, each.request))


def _shares(prompts: list[Any], requests: list[Any], names: list[Any]) -> list[Share]:
    ours, theirs = Counter(prompts), Counter(requests)
    names = [*names, *sorted((ours.keys() | theirs.keys()) - set(names))]
    return [Share(str(name), ours[name] / len(prompts), theirs[name] / len(requests)) for name in names]


def nearest_rows(rows: np.ndarray, others: np.ndarray, but_itself: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int, (N,): the nearest of `others` to each row, and 1 - cosine to it. `but_itself`: others are the rows."""
    index, best = np.empty(len(rows), np.int64), np.empty(len(rows))
    for start in range(0, len(rows), ROWS):
        near = rows[start : start + ROWS] @ others.T
        if but_itself:
            near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf
        index[start : start + ROWS] = near.argmax(axis=1)
        best[start : start + ROWS] = near.max(axis=1)
    return index, 1 - best


def k_means(rows: np.ndarray, count: int, seed: int = 0, rounds: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """(K, H), (N,) int: centres of length 1 and the cluster of each row, from starts that are far apart (k-means++)."""
    rng = np.random.default_rng(seed)
    centres = rows[[rng.integers(len(rows))]]
    while len(centres) < count:
        away = np.maximum(nearest_rows(rows, centres)[1], 0)
        if not away.sum() > 0:  # fewer distinct rows than clusters
            break
        centres = np.concatenate([centres, rows[[rng.choice(len(rows), p=away / away.sum())]]])
    cluster = nearest_rows(rows, centres)[0]
    for _ in range(rounds):
        sums = np.zeros_like(centres)
        np.add.at(sums, cluster, rows)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(length > 0, sums / np.where(length > 0, length, 1), centres)
        again = nearest_rows(rows, centres)[0]
        if (again == cluster).all():
            break
        cluster = again
    return centres, cluster


def near_duplicates(
    texts: Sequence[str], others: Sequence[str] | None = None, least: float = 0.7, words: int = 3, hashes: int = 128
) -> list[tuple[int, int, float]]:
    """Pairs of texts that share at least `least` of their runs of words: (row, row, estimated Jaccard similarity).

    MinHash (Broder 1997): of each text the least value of every hash function over its runs of `words` words, in bands
    of four that must be the same in one place. Within `texts`, or between `texts` and `others`, such as training
    prompts and a golden set: what is in both makes its figures void.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least: {least} came; expected a share above 0, at most 1")
    signatures = [_signature(text, words, hashes) for text in [*texts, *(others or [])]]
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for i, signature in enumerate(signatures):
        for band in range(0, hashes, 4):
            buckets.setdefault((band, signature[band : band + 4].tobytes()), []).append(i)
    split = len(texts)
    found = {}
    for rows in buckets.values():
        for place, i in enumerate(rows):
            for j in rows[place + 1 :]:
                if (i, j) not in found and (others is None or i < split <= j):
                    found[i, j] = float((signatures[i] == signatures[j]).mean())
    offset = 0 if others is None else split
    return [(i, j - offset, same) for (i, j), same in sorted(found.items()) if same >= least]


def _signature(text: str, words: int, hashes: int) -> np.ndarray:
    """(hashes,): the least values over the text's runs of words; of a text that is shorter, over itself."""
    said = _WORD.findall(text.lower())
    runs = {" ".join(said[i : i + words]) for i in range(max(1, len(said) - words + 1))}
    digests = b"".join(hashlib.blake2b(run.encode("utf-8", "replace"), digest_size=8).digest() for run in runs)
    factors = np.random.default_rng(0).integers(0, 1 << 63, (2, hashes), dtype=np.uint64)
    # Multiply and shift: products wrap around at 64 bits, and the upper half is well mixed.
    values = (np.frombuffer(digests, "<u8")[:, None] * (2 * factors[0] + 1) + factors[1]) >> np.uint64(32)
    least: np.ndarray = values.min(axis=0)
    return least


def prepared(*parts: np.ndarray) -> list[np.ndarray]:
    """Raw embeddings of one model, in any number of parts, as rows of length 1: centred over all of them, and without
    their first principal component, which in language models is much the same for every text and hides the rest."""
    rows = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("embeddings: some are not finite; load the model in float32")
    rows = rows - rows.mean(axis=0)
    if min(rows.shape) > 2:
        _, vectors = np.linalg.eigh(rows.T @ rows)
        rows = rows - (rows @ vectors[:, -1:]) @ vectors[:, -1:].T
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 1e-12, length, 1)
    return np.split(rows, np.cumsum([len(part) for part in parts])[:-1])


def embeddings(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptRecord],
    max_length: int = 512,
    max_tokens: int = 8192,
) -> np.ndarray:
    """(N, H) float32: the mean of a language model's last hidden states over what the user wrote.

    Only the user's text is given, cut off at `max_length` tokens: a chat template's own words are the same for all.

    Raises:
        ValueError: names the row whose text has no token.
    """
    examples = []
    for row in prompts:
        ids = tokenizer(user_text(row.prompt), add_special_tokens=False)["input_ids"][:max_length]
        if not ids:
            raise ValueError(f"{row.name or 'a prompt'}: its user's text has no token; leave it out")
        examples.append(Example(tuple(ids[:1]), tuple(ids[1:])))
    device = next(model.parameters()).device

    def mean(batch: Batch) -> list[torch.Tensor]:
        states = hidden_states(model, batch.input_ids).float()  # (B, T, H)
        ends = batch.last % states.shape[1]
        inside = torch.arange(states.shape[1], device=device) <= ends[:, None]
        return [(states * inside[:, :, None]).sum(1) / inside.sum(1, keepdim=True)]

    (rows,) = per_example(examples, mean, max_tokens, device)
    return torch.cat(rows).cpu().numpy()


def _check(prompts: np.ndarray, requests: np.ndarray) -> None:
    if prompts.ndim != 2 or requests.ndim != 2 or prompts.shape[1] != requests.shape[1]:
        raise ValueError(f"embeddings: {prompts.shape} and {requests.shape} came; expected (P, H) and (R, H)")
    if len(prompts) < 1 or len(requests) < 3:
        raise ValueError(f"{len(prompts)} prompts and {len(requests)} requests came; expected at least 1 and 3")
    for name, rows in (("prompts", prompts), ("requests", requests)):
        if not (np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-3).all():
            raise ValueError(f"{name}: rows whose length is not 1 came; bring both through `prepared` together")
