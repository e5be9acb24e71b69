"""How often the 95 % intervals of human comparisons hold the truth: `python -m bench.feedback_coverage`

Simulated people whose truth is known: agreement of people with known error rates on balanced pairs; the vote model's
accuracies of people who err equally often on every pair, and its skills and leans where they are drawn from its priors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_fast.statistics.agreement import cohen_kappa, fleiss_kappa, gwet_ac1, krippendorff_alpha, raw_agreement
from rlhf_fast.statistics.calibration import sigmoid
from rlhf_fast.statistics.intervals import Interval, clustered_share
from rlhf_fast.statistics.vote_model import BIAS, SKILL, TYPICAL, PairVotes, fit_votes
from rlhf_fast.statistics.votes import Votes

ERRORS, PEOPLE = (0.1, 0.2, 0.3), (0.05, 0.15, 0.25, 0.35, 0.45)
COEFFICIENTS: dict[str, Callable[..., Any]] = {
    "raw agreement": lambda votes, **_: raw_agreement(votes),
    "Cohen's kappa": cohen_kappa,
    "Fleiss's kappa": fleiss_kappa,
    "Gwet's AC1": gwet_ac1,
    "Krippendorff's alpha": krippendorff_alpha,
}


def drawn(seed: int, pairs: int, people: int, each: int) -> tuple[PairVotes, dict[str, np.ndarray]]:
    """Votes from the model itself, skills and biases from its priors, `each` votes a pair."""
    rng = np.random.default_rng(seed)
    skill = np.sinh(rng.normal(*TYPICAL) + rng.normal(0, SKILL, people))
    bias, preference = rng.normal(0, BIAS, people), rng.normal(size=pairs)
    row = np.repeat(np.arange(pairs), each)
    person = np.concatenate([rng.permutation(people)[:each] for _ in range(pairs)])
    left = rng.random(len(row)) < 0.5
    odds = skill[person] * preference[row] + bias[person] * np.where(left, 1, -1)
    first = (rng.random(len(row)) < sigmoid(odds)).astype(float)
    return PairVotes(row, person, first, left), {"skill": skill, "bias": bias, "preference": preference}


def of_known_errors(seed: int, pairs: int, errors: Sequence[float], each: int) -> tuple[PairVotes, np.ndarray]:
    """Votes of people who err equally often on every pair, and the truth: whether the first response is better."""
    rng = np.random.default_rng(seed)
    truth = rng.random(pairs) < 0.5
    row = np.repeat(np.arange(pairs), each)
    person = np.concatenate([rng.permutation(len(errors))[:each] for _ in range(pairs)])
    wrong = rng.random(len(row)) < np.array(errors)[person]
    return PairVotes(row, person, (truth[row] != wrong).astype(float), rng.random(len(row)) < 0.5), truth


def agreement(runs: int, items: int = 200, resamples: int = 500) -> dict[str, list[bool]]:
    """Of each coefficient and run, whether its interval held the truth."""
    right = 1 - np.array(ERRORS)
    same = [right[i] * right[j] + (1 - right[i]) * (1 - right[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    raw = float(np.mean(same))
    held: dict[str, list[bool]] = {name: [] for name in COEFFICIENTS}
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        truth = rng.integers(0, 2, items)
        wrong = rng.random((len(ERRORS), items)) < np.array(ERRORS)[:, None]
        people, pairs = np.indices(wrong.shape)
        votes = Votes(pairs.ravel(), people.ravel(), np.where(wrong, 1 - truth, truth).ravel())
        for name, coefficient in COEFFICIENTS.items():
            found = coefficient(votes, resamples=resamples, seed=seed).interval
            held[name].append(_holds(found, raw if name == "raw agreement" else 2 * raw - 1))
    return held


def people(runs: int, pairs: int = 200) -> dict[str, list[bool]]:
    """Of each person of each run, whether the interval held the truth; five people, three votes a pair."""
    held: dict[str, list[bool]] = {"accuracy": [], "lean to the left": [], "skill": []}
    for seed in range(runs):
        known, _ = of_known_errors(seed, pairs, PEOPLE, 3)
        held["accuracy"] += [
            _holds(*one) for one in zip(fit_votes(known, "alike").accuracy, 1 - np.array(PEOPLE), strict=True)
        ]
        votes, truth = drawn(seed, pairs, len(PEOPLE), 3)
        found = fit_votes(votes)
        held["lean to the left"] += [_holds(*one) for one in zip(found.bias, truth["bias"], strict=True)]
        held["skill"] += [_holds(*one) for one in zip(found.skill, truth["skill"], strict=True)]
    return held


def _holds(interval: Interval, truth: float) -> bool:
    return bool(interval.low <= truth <= interval.high)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args(words)
    print(f"{given.runs} runs\n\n| 95 % intervals of | held the truth | of |\n|---|---|---|", flush=True)
    for measure in (agreement, people):
        for name, held in measure(given.runs).items():
            share = clustered_share(np.array(held, float), np.repeat(np.arange(given.runs), len(held) // given.runs))
            print(f"| {name} | {share.mean:.1%} [{share.low:.1%}, {share.high:.1%}] | {len(held)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
