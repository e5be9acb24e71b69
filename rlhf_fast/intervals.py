"""Intervals for means over prompts, with numpy alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS_AT_ONCE = 1 << 20  # cluster numbers held at a time: 8 MB of indices, whatever the data's size


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval, all three in the unit of the values."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The interval as it stands in a result file."""
        return {"mean": self.mean, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def clustered_bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` with a percentile bootstrap interval that resamples whole clusters.

    Several samples of one prompt say more about that prompt and nothing about other prompts, so the prompt is the
    unit that is drawn (Miller 2024, arXiv:2411.00640; Field and Welsh 2007 for the scheme). The statistic of a
    resample is the sum over its clusters divided by their count, so clusters may differ in size. To compare two
    models, pass the paired differences.

    With few clusters the interval is too narrow: at 8 clusters a nominal 95 % covers about 90 % of the time for normal
    values, at 4 about 80 %. It is still computed from 2 clusters up, but below 8 read it as a rough guide.

    Args:
        values: (N,) finite numbers, one per sample.
        clusters: (N,) the cluster (prompt) of each sample: any hashable labels.
        level: coverage, between 0 and 1.
        resamples: bootstrap draws. Memory does not grow with resamples times clusters.
        seed: the same inputs and seed give the same interval to the bit.

    Raises:
        ValueError: on shapes that differ, on a value that is not finite, on fewer than two clusters.
    """
    array = np.asarray(values, dtype=np.float64)
    _check_level(level)
    if array.ndim != 1 or len(array) != len(clusters):
        raise ValueError(f"values and clusters must be two lists of one length: {array.shape} and {len(clusters)} came")
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} came, at least 1 is needed")
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"values: {array[row]} is not finite (row {row}); drop unscored samples with their cluster")

    labels: dict[Hashable, int] = {}
    index = np.array([labels.setdefault(label, len(labels)) for label in clusters], dtype=np.int64)  # (N,)
    if len(labels) < 2:
        raise ValueError(f"clusters: {len(labels)} came; an interval needs samples of at least 2 clusters (prompts)")
    counts = np.bincount(index).astype(np.float64)  # (C,)
    sums = np.bincount(index, weights=array)  # (C,)

    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // len(labels))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, len(labels), size=(rows, len(labels)))  # (rows, C)
        means[start : start + rows] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is outside 0..1 (0.95 is usual)")
