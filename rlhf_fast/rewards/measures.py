"""Measure a reward model: from its scores of held-out responses and what people said of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_fast.config import PPOConfig
from rlhf_fast.data.records import Comparison
from rlhf_fast.statistics import calibration
from rlhf_fast.statistics.agreement import ceiling
from rlhf_fast.statistics.calibration import sigmoid
from rlhf_fast.statistics.intervals import Interval, clustered_share

AIM = 0.7  # held-out agreement worth having; people agree with each other on 63 to 77 % of such comparisons
GATE = PPOConfig.min_reward_agreement  # below it PPO refuses to start
TOO_FEW = "too few to tell"  # the verdict where the aim may have been reached by chance
UNKNOWN = "not measured"  # the verdict where nothing was held out
FEW = 16  # prompts; from fewer no verdict is good news


@dataclass(frozen=True)
class Heldout:
    """The scores of N held-out responses, and the P comparisons among them."""

    comparisons: Sequence[Comparison]  # (P,)
    prompts: np.ndarray  # (P,) int: a number for each prompt
    chosen: np.ndarray  # (P,) int, into scores
    rejected: np.ndarray  # (P,) int
    scores: np.ndarray  # (N,) float64: what PPO would be paid, before it is scaled
    by_head: np.ndarray  # (N, K) float64
    tokens: np.ndarray  # (N,) int: length of the response, its end included

    @property
    def difference(self) -> np.ndarray:
        """Difference of each pair's scores, chosen less rejected: (P,)."""
        return self.scores[self.chosen] - self.scores[self.rejected]

    @property
    def longer(self) -> np.ndarray:
        """Difference of each pair's lengths in tokens, chosen less rejected: (P,) int."""
        return self.tokens[self.chosen] - self.tokens[self.rejected]


def agrees(difference: Any) -> Any:
    """Return 1 where a difference (array or tensor) is above 0, 0 where below, and 0.5 at a tie."""
    return (difference > 0) + 0.5 * (difference == 0)


def measure(heldout: Heldout, everything: Sequence[Comparison]) -> dict[str, Any]:
    """Compute all figures of the report that need no model; `everything` is the data, training included."""
    right = agrees(heldout.difference)
    accuracy = clustered_share(right, heldout.prompts)
    length = length_figures(heldout)
    people = people_figures(everything) | {"model_on_votes": on_votes(heldout)}
    verdict, notes = judge(accuracy, length, len(np.unique(heldout.prompts)))
    notes += beyond_people(people)
    return {
        "verdict": verdict,
        "notes": notes,
        "aim": AIM,
        "gate": GATE,
        "comparisons": len(right),
        "prompts": len(np.unique(heldout.prompts)),
        "accuracy": accuracy.as_dict(),
        "people": people,
        "by": tables(heldout),
        "calibration": calibration_figures(heldout.difference),
        "length": length,
        "heads": head_figures(heldout),
    }


def not_measured(everything: Sequence[Comparison]) -> dict[str, Any]:
    """Make the report of a run that held nothing out."""
    return {
        "verdict": UNKNOWN,
        "notes": ["nothing was held out (reward.heldout is 0), so that nothing is known of its agreement"],
        "aim": AIM,
        "gate": GATE,
        "people": people_figures(everything),
    }


def judge(accuracy: Interval, length: dict[str, Any], prompts: int) -> tuple[str, list[str]]:
    """The verdict on the agreement, and what its interval and the always-longer baseline have to say against it."""
    if accuracy.mean < GATE:
        verdict = "do not train on it"
    elif accuracy.mean < AIM:
        verdict = "below the aim"
    else:
        verdict = "aim reached" if prompts >= FEW and accuracy.low >= GATE else TOO_FEW
    notes = []
    if accuracy.low <= 0.5:
        notes.append("the interval holds 50 %: by these comparisons it may be no better than a coin")
    elif accuracy.mean >= GATE > accuracy.low:
        notes.append(f"the interval reaches below the gate of {GATE:.0%}")
    elif accuracy.mean >= AIM > accuracy.low:
        notes.append(f"the interval reaches below the aim of {AIM:.0%}")
    if length["beyond_longer"]["low"] <= 0:
        notes.append("the interval does not tell it from always choosing the longer response")
    if prompts < FEW:
        notes.append(f"{prompts} held-out prompts are too few to go by; hold out at least {FEW}")
    return verdict, notes


def tables(heldout: Heldout) -> dict[str, list[dict[str, Any]]]:
    """Agreement by what the data says of a comparison, and by how far apart the scores are. A table whose rows would
    all be one is left out."""
    rows, right = heldout.comparisons, agrees(heldout.difference)
    labels = {key: [getattr(row, key) or "none" for row in rows] for key in ("split", "category", "annotator")}
    orders = {key: sorted(set(of)) for key, of in labels.items()}
    numbers = {key: np.array([getattr(row, key) for row in rows]) for key in ("margin", "confidence")}
    for key, values in {**numbers, "score_difference": np.abs(heldout.difference)}.items():
        labels[key] = ranges(values)
        orders[key] = list(dict.fromkeys(labels[key][i] for i in np.argsort(values, kind="stable")))
    return {
        key: [_row(name, np.array([label == name for label in labels[key]]), right, heldout.prompts) for name in order]
        for key, order in orders.items()
        if len(order) > 1
    }


def ranges(values: np.ndarray, bins: int = 4) -> list[str]:
    """A label for each value: itself where there are few distinct ones, otherwise the range of its quarter."""
    if len(np.unique(values)) <= 6:
        return [f"{value:.4g}" for value in values]
    edges = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])
    index = np.searchsorted(edges, values, side="right")
    names = {i: f"{values[index == i].min():.3g} to {values[index == i].max():.3g}" for i in np.unique(index)}
    return [names[i] for i in index]


def _row(label: str, here: np.ndarray, right: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    return {
        "name": label,
        "comparisons": int(here.sum()),
        "prompts": len(np.unique(prompts[here])),
        "accuracy": _interval(right[here], prompts[here]),
    }


def _interval(values: np.ndarray, clusters: Sequence[Any] | np.ndarray) -> dict[str, float | None] | None:
    """Mean with interval; without one for a single cluster, and None for no values at all."""
    if not len(values):
        return None
    if len(set(clusters)) < 2:
        return {"mean": float(np.mean(values)), "low": None, "high": None}
    return {**clustered_share(values, clusters).as_dict()}


def calibration_figures(difference: np.ndarray) -> dict[str, Any]:
    """Measure how often the response that scores higher was the chosen one, beside what the scores predict.

    A pair has no first side, so the probability is that of the higher-scoring response, from one half to 1.
    """
    sure, right = sigmoid(np.abs(difference)), agrees(difference)
    count = min(10, max(1, len(difference) // 10))
    bins = calibration.reliability(sure, right, count)
    return {
        "bins": [bin.as_dict() for bin in bins],
        "ece": calibration.calibration_error(bins),
        "ece_if_calibrated": calibration.error_of_the_calibrated(sure, count),
        "brier": calibration.brier(sigmoid(difference), np.ones(len(difference))),
        "temperature": calibration.fitted_temperature(difference),
    }


def length_figures(heldout: Heldout) -> dict[str, Any]:
    """Measure what the model makes of length, and what a rule that knows nothing but length would reach."""
    right, by_length = agrees(heldout.difference), agrees(heldout.longer)
    parts = {"longer": heldout.longer > 0, "shorter": heldout.longer < 0, "same": heldout.longer == 0}
    return {
        "score_correlation": correlation(heldout.scores, heldout.tokens),
        "difference_correlation": correlation(heldout.difference, heldout.longer),
        "always_longer": _interval(by_length, heldout.prompts),
        "beyond_longer": _beyond(right - by_length, heldout.prompts),
        **{f"chosen_{name}": _row(name, here, right, heldout.prompts) for name, here in parts.items()},
    }


def _beyond(differences: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """The mean of differences between two shares, with an interval, as of a share of what they might be."""
    share = clustered_share((differences + 1) / 2, prompts)
    return Interval(2 * share.mean - 1, 2 * share.low - 1, 2 * share.high - 1).as_dict()


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where one of them does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def head_figures(heldout: Heldout) -> dict[str, Any] | None:
    """Measure how far the heads of an ensemble are apart; None for one head."""
    heads = heldout.by_head.shape[1]
    if heads == 1:
        return None
    votes = agrees(heldout.by_head[heldout.chosen] - heldout.by_head[heldout.rejected])  # (P, K)
    right = agrees(heldout.difference)
    at_one = (votes == votes[:, :1]).all(axis=1)  # (P,)
    deviation = heldout.scores.std()
    return {
        "heads": heads,
        "accuracies": votes.mean(axis=0).tolist(),
        "disagreement": float(heldout.by_head.std(axis=1).mean() / deviation) if deviation else None,
        "at_one": _row("at one", at_one, right, heldout.prompts),
        "divided": _row("divided", ~at_one, right, heldout.prompts),
    }


def on_votes(heldout: Heldout) -> dict[str, Any] | None:
    """Measure with which share of the single votes the model agrees, ties left out: a label made of several has less
    noise, and people's agreement says what can be reached on votes. None where no votes are known."""
    rows = heldout.comparisons
    shares = [[float(sign > 0) for _, sign in row.votes if sign] for row in rows]
    known = [i for i, share in enumerate(shares) if share]
    chosen = np.array([np.mean(shares[i]) for i in known])
    right = agrees(heldout.difference)[known]
    return _interval(right * chosen + (1 - right) * (1 - chosen), heldout.prompts[known])


def beyond_people(people: dict[str, Any]) -> list[str]:
    """What is to be said of a model that agrees with more votes than any can, by how far people agree."""
    found, agreement = people["model_on_votes"], people["agreement"]
    if found is None or agreement is None or found["low"] is None or agreement["high"] is None:
        return []
    most = ceiling(agreement["high"]).high
    if found["low"] <= most:
        return []
    return [
        f"it agrees with more of the votes than the {most:.0%} that people's agreement lets any model reach; look for "
        "held-out prompts among those trained on"
    ]


# What people said ------------------------------------------------------------------------------------------------


def people_figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Measure how far annotators agree with each other and with themselves, what that lets a model reach, and the
    judgements that no score can satisfy. Only annotators with a name are told apart; a label made of votes counts as
    these.

    For single votes with agreement a, a model that always knew the majority would be right on between a (where pairs
    are either clear or a toss-up) and (1 + sqrt(2a - 1)) / 2 (where all pairs are alike).
    """
    votes: dict[tuple[str, frozenset[str]], list[tuple[str, str]]] = {}  # (annotator, chosen) by pair
    for row in comparisons:
        if row.chosen == row.rejected or not (row.annotator or row.votes):
            continue
        given = [(who, row.chosen if sign > 0 else row.rejected) for who, sign in row.votes if sign]
        pair = (_key(row), frozenset((row.chosen, row.rejected)))
        votes.setdefault(pair, []).extend(given if row.votes else [(row.annotator, row.chosen)])
    between: list[tuple[str, bool]] = []  # (prompt, whether they agree)
    within: list[tuple[str, bool]] = []
    for (prompt, _), given in votes.items():
        for (judge, first), (other, second) in itertools.combinations(given, 2):
            (within if judge == other else between).append((prompt, first == second))
    twice = sum(len({annotator for annotator, _ in given}) > 1 for given in votes.values())
    agreement, itself = (_interval(np.array([float(same) for _, same in answers]), [prompt for prompt, _ in answers])
                         for answers in (between, within))  # fmt: skip
    reach = None
    if agreement is not None and agreement["mean"] is not None:
        reached = ceiling(agreement["mean"])
        reach = [reached.low, reached.high]
    return {
        "pairs_judged_by_several": twice,
        "agreement": agreement,
        "with_themselves": itself,
        "reach": reach,
        "contradictory": contradictory(comparisons) / len(comparisons),
    }


def contradictory(comparisons: Sequence[Comparison]) -> int:
    """Count the comparisons on a cycle of their prompt (a over b, b over c, c over a; or a over b and b over a).

    Scores are of single texts, so they are always in an order: of a cycle's comparisons one at least must be missed.
    """
    by_prompt: dict[str, list[Comparison]] = {}
    for row in comparisons:
        by_prompt.setdefault(_key(row), []).append(row)
    return sum(_on_cycles([(row.chosen, row.rejected) for row in rows]) for rows in by_prompt.values())


def _on_cycles(edges: list[tuple[str, str]]) -> int:
    names = {text: i for i, text in enumerate(dict.fromkeys(itertools.chain.from_iterable(edges)))}
    pairs = np.array([(names[a], names[b]) for a, b in edges])
    reach = np.zeros((len(names), len(names)), bool)
    reach[pairs[:, 0], pairs[:, 1]] = True
    for middle in range(len(names)):  # Warshall: everything reachable by way of the first texts
        reach |= reach[:, middle, None] & reach[None, middle, :]
    return int((reach[pairs[:, 1], pairs[:, 0]]).sum())


def _key(row: Comparison) -> str:
    return json.dumps(row.prompt, sort_keys=True)


def histogram(scores: dict[str, np.ndarray], bins: int = 24) -> dict[str, list[float]]:
    """Counts of each set of scores in the same bins, and the bins' edges."""
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in scores.items()}
    return {"edges": edges.tolist(), **counts}
