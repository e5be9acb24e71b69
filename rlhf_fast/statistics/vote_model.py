"""Soft labels from the votes of people who differ in skill and lean to a side: a model with priors, on autograd.

A vote of person j on pair i goes to the first response with log-odds s_j * x_i + b_j * (1 if it was shown on the left,
else -1). x_i says how much better the first one is, in deviations of such differences; s_j is the person's skill, and
b_j a lean to the left. Skills have a prior around a typical one, which is fitted too, and biases one around 0. The x_i
are summed over their own prior, not fitted beside the skills: a fitted x_i follows the few votes on it, so that
everybody who cast them would seem more skilled, however many pairs there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import torch

from rlhf_fast.statistics.intervals import Interval

NODES = 60  # of the sum over a pair's preference; an even number, so that none is at 0
REACH = 5.0  # deviations of the prior that they cover
ROUNDS = 5  # of the search for an interval's end
MOST = 0.4  # deviations that room for others may move an end by: they are no more where Laplace's method holds
STEP = 0.03  # deviations, of differences of the posterior's slope
# Means and deviations of the priors. Those of skills are of their inverse hyperbolic sine: it is like a logarithm for
# skilled people, and yet a skill may be negative, of one who mistakes the buttons.
TYPICAL, SKILL, BIAS = (math.asinh(1.5), 0.6), 0.6, 0.5


@dataclass(frozen=True)
class PairVotes:
    """N votes between the two responses of pairs."""

    pairs: np.ndarray  # (N,) int
    people: np.ndarray  # (N,) int
    first: np.ndarray  # (N,) from 0 to 1: 1 for the pair's first response, 0 for the second, 0.5 for a tie
    left: np.ndarray  # (N,) bool: whether the first response was shown on the left

    def __post_init__(self) -> None:
        shapes = {name: np.shape(getattr(self, name)) for name in ("pairs", "people", "first", "left")}
        if len(set(shapes.values())) != 1 or len(shapes["pairs"]) != 1 or not shapes["pairs"][0]:
            raise ValueError(f"votes: {shapes} came; expected (N,) of each, N > 0")
        if not ((self.first >= 0) & (self.first <= 1)).all():
            raise ValueError(f"first: {self.first.min()} to {self.first.max()} came; expected numbers from 0 to 1")

    @cached_property
    def pair_names(self) -> np.ndarray:
        """(I,): the pairs, ascending."""
        return np.unique(self.pairs)

    @cached_property
    def people_names(self) -> np.ndarray:
        """(J,): the people, ascending."""
        return np.unique(self.people)


def votes_for_first(preference: np.ndarray, strongest: int = 3, graded: bool = False) -> np.ndarray:
    """Turn preferences from -strongest (the second is much better) to strongest into votes from 0 to 1.

    A tie is half a vote for each. Strengths are left out unless `graded`: then a vote counts for its side as far as it
    is strong, 3 of 3 wholly and 1 of 3 by two thirds, the rest going to the other side.
    """
    if not (np.abs(preference) <= strongest).all():
        raise ValueError(f"preference: {np.abs(preference).max()} came; expected at most {strongest} either way")
    return (1 + (preference / strongest if graded else np.sign(preference))) / 2


def majority(votes: PairVotes) -> np.ndarray:
    """(I,): the share of votes for the first response of each pair, in the order of the pairs' numbers."""
    row = np.searchsorted(votes.pair_names, votes.pairs)
    shares: np.ndarray = np.bincount(row, votes.first) / np.bincount(row)
    return shares


@dataclass(frozen=True)
class Change:
    """A label that the vote model gives otherwise than the majority; a split pair (`share` of 0.5) has none by it."""

    pair: int
    votes: int
    share: float  # of votes for the first response
    better: float  # the model's probability that the first one is better


@dataclass(frozen=True)
class VoteModel:
    """What the votes say of pairs and people, each in the order of their numbers."""

    pairs: np.ndarray  # (I,) int
    people: np.ndarray  # (J,) int
    better: np.ndarray  # (I,): probability that the first response is the better, the soft label
    chosen: np.ndarray  # (I,): how often a person of typical skill and no lean would choose it
    skill: list[Interval]  # (J,): log-odds for pairs whose responses are one deviation apart
    bias: list[Interval]  # (J,): log-odds of the left side where neither response is better
    accuracy: list[Interval]  # (J,): how often a vote of the person names the better response of a pair
    typical: float  # skill
    log_evidence: float  # of the votes, at the fitted skills and biases

    def changed(self, votes: PairVotes) -> list[Change]:
        """The pairs whose likelier side is not that of the majority, the surest first. Split pairs come with them: who
        wants them kept as split leaves out those whose share is 0.5."""
        shares = majority(votes)
        counts = np.bincount(np.searchsorted(votes.pair_names, votes.pairs))
        other = np.flatnonzero(np.sign(shares - 0.5) != np.sign(self.better - 0.5))
        found = [Change(int(self.pairs[i]), int(counts[i]), float(shares[i]), float(self.better[i])) for i in other]
        return sorted(found, key=lambda change: (-abs(change.better - 0.5), change.pair))


def fit_votes(votes: PairVotes, pairs: str = "normal", level: float = 0.95) -> VoteModel:
    """Fit skills and biases to votes, maximum a posteriori in float64, from one start.

    With one or two votes a pair the votes hardly tell skilled people on toss-ups from unskilled ones on clear pairs;
    what is assumed of pairs decides. The intervals hold under that assumption.

    Args:
        votes: of any number of people on any number of pairs.
        pairs: `normal`, preferences from toss-ups to clear ones; or `alike`, all equally clear one way or the other,
            so that each person errs equally often on all (Dawid and Skene 1979, for two classes).
        level: coverage of the people's intervals, from the posterior around its maximum.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is outside 0..1 (0.95 is usual)")
    posterior = Posterior(votes, pairs)
    x = posterior.start().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = posterior.loss(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    curvature = torch.autograd.functional.hessian(posterior.loss, x.detach())
    assert isinstance(curvature, torch.Tensor)
    covariance = torch.linalg.inv(curvature)  # (2J + 1, 2J + 1)
    best, people = x.detach(), len(votes.people_names)
    z = NormalDist().inv_cdf((1 + level) / 2)
    tilt = tilts(posterior, best, covariance)  # (2J + 1,)
    low, high = (_ends(posterior, best, covariance, tilt, side * z) for side in (-1, 1))  # (2J + 1, 2J + 1), a row each
    skill, bias = (
        [Interval(float(best[i]), float(low[i, i]), float(high[i, i])) for i in range(start, start + people)]
        for start in (0, people)
    )
    accuracy = [Interval(*(float(posterior.accuracy(at)[i]) for at in (best, low[i], high[i]))) for i in range(people)]
    better, chosen = posterior.of_pairs(best)
    return VoteModel(
        pairs=votes.pair_names,
        people=votes.people_names,
        better=better.numpy(),
        chosen=chosen.numpy(),
        skill=[Interval(*map(math.sinh, (i.mean, i.low, i.high))) for i in skill],
        bias=bias,
        accuracy=accuracy,
        typical=math.sinh(best[-1]),
        log_evidence=float(posterior.log_likelihood(best).logsumexp(1).sum()),
    )


def tilts(posterior: Posterior, best: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """(2J + 1,): for each number, how fast the logarithm of the others' curvature grows as it does and they give way.

    For number i, moving along v = covariance_i / covariance_ii, that is the third derivative along v traced with the
    covariance of the others, which is the whole one less covariance_ii v v^T. Differences of the slope over STEP
    deviations give it, in float64 to seven digits.
    """

    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(posterior.loss(x), x)[0]

    def third(way: torch.Tensor) -> torch.Tensor:
        """The third derivative, twice along a way."""
        return (slope(best + STEP * way) - 2 * here + slope(best - STEP * way)) / STEP**2

    here = slope(best)
    deviations = covariance.diagonal().sqrt()
    whole = torch.stack([third(way) for way in torch.linalg.cholesky((covariance + covariance.T) / 2).T]).sum(0)
    ways = (covariance / deviations[:, None]).unbind()  # of one deviation each
    return torch.stack([(whole - third(way)) @ way for way in ways]) / deviations


def _ends(
    posterior: Posterior, best: torch.Tensor, covariance: torch.Tensor, tilt: torch.Tensor, z: float
) -> torch.Tensor:
    """(2J + 1, 2J + 1): for each number the point at which an interval of it ends, the others giving way (the profile).

    Were the posterior Gaussian, the loss would have risen by r^2 / 2 with r = z. Laplace's method for the others makes
    it r + log(q / r) / r = z, q being the profile's slope in deviations times the square root of how much the others'
    curvature has grown (DiCiccio and Martin 1991): a profile alone forgets how much room it leaves them. The curvature
    at the maximum says how the others give way, in ROUNDS steps.
    """
    ends, lowest = [], float(posterior.loss(best))
    for i, column in enumerate(covariance):
        along = column / column[i]
        others = covariance - along[:, None] * column  # of the others, with number i held
        at = best + z * column[i].sqrt() * along
        for _ in range(ROUNDS):
            here = at.clone().requires_grad_()
            loss = posterior.loss(here)
            (slope,) = torch.autograd.grad(loss, here)
            gain = others @ slope
            rise = float(loss.detach() - lowest - slope @ gain / 2)
            r, off = math.sqrt(max(2 * rise, 1e-12)), float(at[i] - best[i])
            q = abs(float(slope @ along)) * float(column[i].sqrt()) * math.exp(float(tilt[i]) * off / 2)
            r += min(MOST, max(-MOST, math.log(max(q, 1e-12) / r) / r))
            factor = min(2.0, max(0.5, abs(z) / max(r, 1e-6)))
            at = at - gain + (factor - 1) * (at[i] - best[i]) * along
        ends.append(at)
    return torch.stack(ends)


class Posterior:
    """The posterior of x (2J + 1,): asinh of the people's skills, their biases, and asinh of the typical skill."""

    def __init__(self, votes: PairVotes, pairs: str = "normal") -> None:
        if pairs not in ("normal", "alike"):
            raise ValueError(f"pairs: {pairs!r} came; expected normal or alike")
        self.row = torch.from_numpy(np.searchsorted(votes.pair_names, votes.pairs))  # (N,)
        self.person = torch.from_numpy(np.searchsorted(votes.people_names, votes.people))  # (N,)
        self.first = torch.from_numpy(np.asarray(votes.first, np.float64))
        self.side = torch.from_numpy(np.where(votes.left, 1.0, -1.0))
        self.pairs, self.people = len(votes.pair_names), len(votes.people_names)
        if pairs == "alike":
            self.nodes = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # (K,)
            self.weights = torch.full((2,), -math.log(2), dtype=torch.float64)  # (K,), logarithms
        else:
            self.nodes = (torch.arange(NODES, dtype=torch.float64) + 0.5) * (2 * REACH / NODES) - REACH
            self.weights = (-0.5 * self.nodes**2).log_softmax(0)

    def start(self) -> torch.Tensor:
        """The mean of the prior."""
        skill = torch.full((self.people + 1,), TYPICAL[0], dtype=torch.float64)
        return torch.cat([skill[1:], torch.zeros(self.people, dtype=torch.float64), skill[:1]])

    def log_likelihood(self, x: torch.Tensor) -> torch.Tensor:
        """(I, K): log-probability of a pair's votes and of each of its possible preferences."""
        skill, bias = x[: self.people].sinh(), x[self.people : -1]
        lean = (bias[self.person] * self.side)[:, None]
        odds = skill[self.person][:, None] * self.nodes + lean  # (N, K)
        each = -torch.nn.functional.softplus(-odds) - (1 - self.first)[:, None] * odds
        empty = torch.zeros(self.pairs, len(self.nodes), dtype=torch.float64)
        return empty.index_add(0, self.row, each) + self.weights

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Minus the log-posterior, up to a constant."""
        likelihood = self.log_likelihood(x).logsumexp(1).sum()
        skill, bias, typical = x[: self.people], x[self.people : -1], x[-1]
        prior = ((skill - typical) / SKILL).square().sum() + (bias / BIAS).square().sum()
        return (prior + ((typical - TYPICAL[0]) / TYPICAL[1]) ** 2) / 2 - likelihood

    def of_pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(I,), (I,): the probability that the first response is better, and that an average person chooses it."""
        probability = self.log_likelihood(x).softmax(1)  # (I, K)
        return probability[:, self.nodes > 0].sum(1), probability @ (x[-1].sinh() * self.nodes).sigmoid()

    def accuracy(self, x: torch.Tensor) -> torch.Tensor:
        """(J,): how often a person's vote names the better response, over pairs and both sides."""
        skill, bias = x[: self.people].sinh(), x[self.people : -1]
        clear = skill[:, None] * self.nodes.abs()  # (J, K)
        right = ((clear + bias[:, None]).sigmoid() + (clear - bias[:, None]).sigmoid()) / 2
        return right @ self.weights.exp()
