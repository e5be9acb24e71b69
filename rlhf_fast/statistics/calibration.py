"""Measure how far predicted probabilities come true, with numpy alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

_DRAWS = 400  # of outcomes, for what chance alone does


@dataclass(frozen=True)
class Bin:
    """Predictions near each other: their mean, how often they came true, and the least and greatest of them."""

    predicted: float
    observed: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def reliability(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 10) -> list[Bin]:
    """Predictions in bins of about equal mass, from the lowest up. Equal predictions are never parted, so that there
    may be fewer bins, down to one.

    Args:
        probabilities: (N,) from 0 to 1.
        outcomes: (N,) 0 or 1, or what lies between for an outcome that is half one and half the other.
        bins: how many there are where predictions differ.

    Raises:
        ValueError: shapes that differ, nothing at all, or values out of their range.
    """
    _check(probabilities, outcomes)
    index = _bins(probabilities, bins)
    return [
        Bin(
            predicted=float(probabilities[index == i].mean()),
            observed=float(outcomes[index == i].mean()),
            low=float(probabilities[index == i].min()),
            high=float(probabilities[index == i].max()),
            count=int((index == i).sum()),
        )
        for i in np.unique(index)
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: the mean distance of predicted from observed, bins weighed by what is in them
    (Naeini et al. 2015; in bins of equal mass, Nguyen and O'Connor 2015, arXiv:1508.05154)."""
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / sum(b.count for b in bins)


def error_of_the_calibrated(probabilities: np.ndarray, bins: int = 10, seed: int = 0) -> float:
    """The calibration error that these predictions would have on average if each were exactly right: what so few
    outcomes cannot tell from none. Outcomes are drawn independently, so for samples that hang together it is more."""
    _check(probabilities, probabilities)
    index = _bins(probabilities, bins)
    predicted = np.bincount(index, weights=probabilities, minlength=bins)  # (bins,)
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(_DRAWS):
        came_true = rng.random(len(probabilities)) < probabilities
        total += float(np.abs(np.bincount(index, weights=came_true, minlength=bins) - predicted).sum())
    return total / (_DRAWS * len(probabilities))


def brier(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Mean squared distance of prediction from outcome: 0 is perfect, 0.25 is saying one half each time."""
    _check(probabilities, outcomes)
    return float(np.mean((probabilities - outcomes) ** 2))


def fitted_temperature(differences: np.ndarray) -> float | None:
    """The T at which sigmoid(difference / T) makes the outcomes likeliest, where each difference is that of what won
    from what lost (Guo et al., arXiv:1706.04599). Above 1: the predictions are too sure of themselves.

    None where there is no such T: nothing lost that was predicted to win, or predictions no better than a coin.
    """
    x = np.asarray(differences, np.float64)
    if not len(x) or not (x < 0).any() or x.mean() <= 0:
        return None
    x = x / np.abs(x).max()  # any scale of scores is as good as another

    def slope(sharpness: float) -> float:  # of the loss, in 1 / T: it rises with it
        return float(np.mean(-x * sigmoid(-sharpness * x)))

    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(np.abs(differences).max() / high)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _bins(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """(N,) int64: the number of each prediction's bin; some may hold none."""
    edges = np.quantile(probabilities, np.linspace(0, 1, bins + 1)[1:-1])
    return np.searchsorted(edges, probabilities, side="right")


def _check(probabilities: np.ndarray, outcomes: np.ndarray) -> None:
    if probabilities.ndim != 1 or probabilities.shape != outcomes.shape or not len(probabilities):
        raise ValueError(
            f"probabilities {probabilities.shape} and outcomes {outcomes.shape}; expected (N,) both, N > 0"
        )
    for name, values in (("probabilities", probabilities), ("outcomes", outcomes)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name}: expected numbers from 0 to 1, got {values.min()} to {values.max()}")
