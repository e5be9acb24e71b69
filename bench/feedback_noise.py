"""What noisy votes cost a reward model, and what removing or softening them gives back: `-m bench.feedback_noise`

Simulated people of known error rates vote on pairs whose truth is known. A linear Bradley-Terry model is fitted to
labels made of these votes in several ways, and its choices on new pairs are held against the truth without noise. Each
seed draws pairs, people's assignments and votes anew; differences from the majority are paired by seed.

`--trainer` does the same with the project's own RewardTrainer from a tiny random transformer, which reads words whose
letters have hidden worths, with votes that err as those of the first crowd do.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf_fast import RewardTrainer, models
from rlhf_fast.config import LoRAConfig, OptimConfig, RewardConfig
from rlhf_fast.data.records import Comparison
from rlhf_fast.pipeline import tiny_model
from rlhf_fast.statistics.annotators import logistic
from rlhf_fast.statistics.calibration import sigmoid
from rlhf_fast.statistics.intervals import Interval, clustered_bootstrap
from rlhf_fast.statistics.vote_model import PairVotes, fit_votes, majority

FEATURES, HELDOUT = 24, 4000
LETTERS, LENGTH, MEASURED = 12, 8, 600  # of the words that RewardTrainer reads, and how many pairs it is measured on
TRAINED = ("no noise", "majority", "vote model, without pairs under 0.8", "vote model, soft labels")
CROWDS = {
    "two good, three poor": (0.05, 0.10, 0.35, 0.40, 0.45),
    "all alike": (0.25, 0.25, 0.25, 0.25, 0.25),
    "two always left": (0.15, 0.15, 0.15, None, None),
}
Labels = dict[str, tuple[np.ndarray, np.ndarray]]  # by name: targets (I,) and whether each is used (I,)


def voted(rng: np.random.Generator, truth: np.ndarray, errors: tuple[float | None, ...], each: int) -> PairVotes:
    """`each` votes a pair by people drawn at random; None for an error rate: the left response, whatever it says."""
    row = np.repeat(np.arange(len(truth)), each)
    person = np.concatenate([rng.permutation(len(errors))[:each] for _ in truth])
    left = rng.random(len(row)) < 0.5
    rate = np.array([0.0 if e is None else e for e in errors])[person]
    first = truth[row] != (rng.random(len(row)) < rate)
    lazy = np.array([e is None for e in errors])[person]
    return PairVotes(row, person, np.where(lazy, left, first).astype(float), left)


def labels(truth: np.ndarray, votes: PairVotes, each: int) -> Labels:
    """What a trainer may be given of the votes."""
    everything, share = np.ones(len(truth), bool), majority(votes)
    better = fit_votes(votes, "alike").better
    sure = np.maximum(better, 1 - better)
    hard = np.where(share == 0.5, 0.5, share > 0.5)
    return {
        "no noise": (truth.astype(float), everything),
        "one vote a pair": (votes.first[::each], everything),
        "majority": (hard.astype(float), everything),
        "majority, unanimous pairs only": (hard.astype(float), (share == 0) | (share == 1)),
        "share of votes as soft label": (share, everything),
        "vote model, hard": ((better > 0.5).astype(float), everything),
        "vote model, without pairs under 0.8": ((better > 0.5).astype(float), sure > 0.8),
        "vote model, soft labels": (better, everything),
    }


def accuracies(seed: int, errors: tuple[float | None, ...], pairs: int, each: int) -> dict[str, float]:
    """Held-out accuracy against the truth, by what the model was given."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=FEATURES)
    features, new = (rng.normal(size=(n, FEATURES)) for n in (pairs, HELDOUT))
    truth, wanted = features @ weights > 0, new @ weights > 0
    found = {}
    for name, (targets, used) in labels(truth, voted(rng, truth, errors, each), each).items():
        fitted = np.array([i.mean for i in logistic(targets[used], features[used])])
        found[name] = float(((sigmoid(new @ fitted) > 0.5) == wanted).mean())
    return found


def compared(seed: int, pairs: int) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons without error for training and for measuring: of two words, the one whose letters are worth more."""
    rng = np.random.default_rng(seed)
    letters = np.array([chr(ord("a") + i) for i in range(LETTERS)])
    worth = rng.normal(size=LETTERS)
    parts: tuple[list[Comparison], list[Comparison]] = ([], [])
    for place in range(pairs + MEASURED):
        one, other = sorted(rng.integers(0, LETTERS, (2, LENGTH)), key=lambda word: -float(worth[word].sum()))
        parts[place >= pairs].append(Comparison(f"Pair {place}", "".join(letters[one]), "".join(letters[other])))
    return parts


def trained(seed: int, pairs: int, each: int) -> dict[str, float]:
    """Held-out accuracy of reward models that RewardTrainer makes of each kind of label."""
    training, heldout = compared(seed, pairs)
    rng = np.random.default_rng(seed)
    truth = rng.random(len(training)) < 0.5  # whether the chosen one is called the first
    votes = voted(rng, truth, next(iter(CROWDS.values())), each)
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        models.save(Path(folder, "base"), *models.load(tiny_model(), seed=seed))
        for name, (targets, used) in labels(truth, votes, each).items():
            if name not in TRAINED:
                continue
            rows = []
            for row, right, target in zip(training, truth, targets, strict=True):
                as_it_is = target if right else 1 - target  # probability that the chosen one is the better
                turned = row if as_it_is >= 0.5 else replace(row, chosen=row.rejected, rejected=row.chosen)
                rows.append(replace(turned, confidence=float(max(as_it_is, 1 - as_it_is))))
            config = RewardConfig(epochs=6, batch_size=40, seed=seed, lora=LoRAConfig(r=0), optim=OptimConfig(lr=5e-3))
            trainer = RewardTrainer(
                Path(folder, "base"), list(itertools.compress(rows, used)), Path(folder, name.replace(" ", "-")),
                config, heldout_data=heldout,
            )  # fmt: skip
            measured[name] = float(trainer.train()["summary"]["heldout_accuracy"]["mean"])
    return measured


def table(runs: list[dict[str, float]]) -> str:
    """A row for each kind of label: its accuracy, and its difference from the majority, with intervals over seeds."""
    lines = ["| labels | held-out accuracy | beyond the majority |", "|---|---|---|"]
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        base = np.array([run["majority"] for run in runs])
        over = [clustered_bootstrap(v, np.arange(len(runs)), resamples=4000) for v in (values, values - base)]
        lines.append(f"| {name} | {percent(over[0])} | {percent(over[1], True) if name != 'majority' else '-'} |")
    return "\n".join(lines)


def percent(interval: Interval, signed: bool = False) -> str:
    mean, low, high = (f"{100 * x:{'+' if signed else ''}.1f}" for x in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--votes", type=int, default=3, help="a pair")
    parser.add_argument("--trainer", type=int, default=0, metavar="SEEDS", help="of RewardTrainer instead")
    given = parser.parse_args(words)
    if given.trainer:
        runs = [trained(seed, given.pairs, given.votes) for seed in range(given.trainer)]
        what = f"RewardTrainer: {given.pairs} pairs of {given.votes} votes"
        print(f"\n{what}, {given.trainer} seeds\n\n{table(runs)}")
        return 0
    for name, errors in CROWDS.items():
        runs = [accuracies(seed, errors, given.pairs, given.votes) for seed in range(given.seeds)]
        print(f"\n{name}: {given.pairs} pairs of {given.votes} votes, {given.seeds} seeds\n\n{table(runs)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
