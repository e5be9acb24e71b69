"""The benchmark of noisy votes: it runs to its end, by both models."""

from __future__ import annotations

import numpy as np
import pytest

from bench import feedback_noise as noise


def test_the_better_word_is_the_one_whose_letters_are_worth_more() -> None:
    training, heldout = noise.compared(3, 5)
    worth = np.random.default_rng(3).normal(size=noise.LETTERS)
    assert (len(training), len(heldout)) == (5, noise.MEASURED)
    for row in [*training, *heldout]:
        chosen, rejected = (
            sum(worth[ord(letter) - ord("a")] for letter in word) for word in (row.chosen, row.rejected)
        )
        assert chosen >= rejected and len(row.chosen) == noise.LENGTH
    assert not {row.prompt for row in training} & {row.prompt for row in heldout}


@pytest.mark.seconds(12)
def test_every_label_gets_an_accuracy_and_its_distance_from_the_majority(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = noise.accuracies(0, noise.CROWDS["all alike"], 60, 3)
    assert linear["no noise"] > linear["one vote a pair"]
    monkeypatch.setattr(noise, "TRAINED", ("no noise", "majority"))
    monkeypatch.setattr(noise, "MEASURED", 8)
    runs = [noise.trained(seed, 24, 3) for seed in (0, 1)]
    assert all(0 <= value <= 1 for run in runs for value in run.values())
    rows = noise.table(runs).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| no noise", "| majority"] and rows[1].endswith("| - |")
