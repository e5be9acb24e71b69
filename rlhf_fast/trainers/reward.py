"""The reward model: Bradley-Terry on comparisons, a scalar head at the last real token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import models, ops, settings
from rlhf_fast.config import RewardConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.data.pairs import PairGroup, Pairs, epoch_batches_by_pairs, group_pairs, join, microbatches_of_groups
from rlhf_fast.data.records import Comparison, Source, read_comparisons
from rlhf_fast.intervals import Interval, clustered_bootstrap
from rlhf_fast.run_folder import RunFolder
from rlhf_fast.trainers.budget import TokenBudget
from rlhf_fast.trainers.checkpoints import Checkpoints, Goal
from rlhf_fast.trainers.loop import Stats, fit, per_example, split_heldout
from rlhf_fast.trainers.optimizer import Optimizer
from rlhf_fast.trainers.state import digest, fingerprint

AIM = 0.7  # held-out agreement worth having; people agree with each other on 63 to 77 % of such comparisons


class RewardTrainer:
    """Fit a scalar score to comparisons, and measure its agreement with comparisons of prompts never trained on.

    Args:
        model: the policy to start from (its weights and adapter; the head is new).
        data: comparisons (see data/records.py).
        out: the run's folder.
    """

    def __init__(
        self,
        model: str | Path,
        data: Source | Sequence[Comparison],
        out: str | Path = "runs/reward",
        config: RewardConfig | None = None,
    ) -> None:
        self.config = config = config or RewardConfig()
        comparisons = read_comparisons(data)
        self.model, self.tokenizer = models.reward_from(model, config.lora, config.seed, getattr(torch, config.dtype))
        if config.optim.checkpointing:
            models.recompute_activations(self.model)
        # Groups hold all comparisons of a prompt, so no prompt is in both parts; an interval needs two of them.
        groups = group_pairs(comparisons, self.tokenizer, config.max_length)
        self.training, self.heldout = split_heldout(groups, config.heldout, config.seed, least=2)
        self.device = next(self.model.parameters()).device
        self.shared = models.longest_shared(self.model)
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("reward", config, model=model, data=data, out=out)
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        self.evaluated: dict[str, float] = {}  # the last evaluation, which a checkpoint keeps

    def train(self) -> dict[str, Any]:
        """Train, measure, save the checkpoint with its normalisation, and return the run's result."""
        config = self.config
        batches = epoch_batches_by_pairs(self.training, config.batch_size, config.epochs, config.seed)
        optimizer = Optimizer([self.model], config.optim, len(batches))
        run = RunFolder(self.out, "reward", self.config_yaml, config.run.trackers)
        checkpoints = Checkpoints(
            run, config.run, Goal("heldout_accuracy", higher=True), self._save, patience=config.patience
        )
        identity = {"data": digest(self.training + self.heldout), "model": fingerprint(self.model)}
        per_epoch = math.ceil(len(batches) / config.epochs)
        outcome = fit(
            run, batches, self._losses, optimizer, self.budget, checkpoints, identity, self.evaluate, per_epoch
        )
        return run.finish(
            {
                "comparisons": sum(group.pairs for group in self.training),
                "heldout": sum(group.pairs for group in self.heldout),
                "heldout_prompts": len(self.heldout),
                "heldout_accuracy": _agreement(outcome.row).as_dict(),
                "score_mean": outcome.row["score_mean"],
                "score_std": outcome.row["score_std"],
            },
            outcome.step,
        )

    @property
    def agreement(self) -> Interval:
        """With the held-out comparisons, when it was last evaluated."""
        return _agreement(self.evaluated)

    def _save(self, folder: Path) -> None:
        row = self.evaluated
        extra = {
            "score_mean": row["score_mean"],
            "score_std": row["score_std"],
            "heldout_agreement": self.agreement.as_dict(),
        }
        models.save(folder, self.model, self.tokenizer, extra)

    def _losses(self, groups: list[PairGroup]) -> Iterator[tuple[torch.Tensor, Stats]]:
        total = sum(group.pairs for group in groups)
        for part in microbatches_of_groups(groups, self.budget.tokens, self.shared):
            pairs = join(part, self.device)
            scores = models.score_last(self.model, pad(pairs.examples, self.device, self.shared))  # (B,)
            loss, stats = ops.reward_loss(
                scores[pairs.chosen],
                scores[pairs.rejected],
                margin=pairs.margins,
                center_coef=self.config.center_coef,
                denominator=total,
            )
            yield loss, {"accuracy": stats["accuracy"]}

    def evaluate(self) -> dict[str, float]:
        """Agreement with the held-out comparisons (ties count half), with an interval over their prompts, and mean and
        deviation of the scores of their responses."""
        pairs = join(self.heldout, self.device)
        scores = self._scores(pairs)
        difference = scores[pairs.chosen] - scores[pairs.rejected]
        agrees = (difference > 0).double() + 0.5 * (difference == 0).double()
        clusters = [i for i, group in enumerate(self.heldout) for _ in range(group.pairs)]
        found = clustered_bootstrap(agrees.tolist(), clusters)
        self.evaluated = {
            "heldout_accuracy": found.mean,
            "heldout_accuracy_low": found.low,
            "heldout_accuracy_high": found.high,
            "score_mean": float(scores.mean()),
            "score_std": max(float(scores.std(correction=0)), 1e-6),
        }
        return self.evaluated

    def _scores(self, pairs: Pairs) -> torch.Tensor:
        (parts,) = per_example(
            pairs.examples,
            lambda batch: [models.score_last(self.model, batch)],
            self.budget.tokens,
            self.device,
            self.shared,
        )
        return torch.cat(parts)  # (B,)


def _agreement(row: dict[str, float]) -> Interval:
    return Interval(*(row[f"heldout_accuracy{end}"] for end in ("", "_low", "_high")))
