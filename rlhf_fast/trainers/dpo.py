"""Direct preference optimisation: the policy itself is fitted to comparisons, without a reward model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from rlhf_fast import models, ops
from rlhf_fast.config import DPOConfig, settings
from rlhf_fast.data.batches import Batch, Example, pad
from rlhf_fast.data.pairs import (
    PairGroup,
    Pairs,
    epoch_batches_by_pairs,
    group_pairs,
    join,
    microbatches_of_groups,
    split_pairs,
)
from rlhf_fast.data.records import Comparison, Source, read_comparisons
from rlhf_fast.data.splits import labelled, require_heldout
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.scoring import per_example
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.pages.run_report import write_run_report
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.chat_settings import use_settings
from rlhf_fast.trainers.loop.checkpoints import Goal
from rlhf_fast.trainers.loop.lengths import fitting_for
from rlhf_fast.trainers.loop.monitor import Monitor
from rlhf_fast.trainers.loop.preflight import begin, made_ready
from rlhf_fast.trainers.loop.steps import Stats, add_stats, fit


def build(config: DPOConfig, shape: PreTrainedConfig) -> Model:
    """The model that a run of these settings trains, of random weights: on the meta device of none."""
    model = models.from_shape(shape, getattr(torch, config.dtype))
    return made_ready(models.trainable(model, config.lora, config.seed), config)


def batch_logprobs(config: DPOConfig, model: Model, batch: Batch) -> torch.Tensor:
    """Log-probability of each whole response, for IPO of its mean token (arXiv 2310.12036, section 5): (B,)."""
    logprobs, _ = models.response_logprobs(model, batch)
    sums = ops.sequence_sum(logprobs, cu_seqlens=batch.cu_seqlens)
    return sums / batch.cu_seqlens.diff() if config.loss == "ipo" else sums


def batch_loss(
    config: DPOConfig, model: Model, batch: Batch, pairs: Pairs, reference: torch.Tensor, total: int, labelled: bool
) -> tuple[torch.Tensor, Stats]:
    """Loss and statistics of one micro-batch's pairs, for a batch of `total` pairs.

    A margin m is how far the rewards should be apart beyond what the loss asks for, which is so if the reference
    holds the chosen response for exp(m / beta) times as likely (DPO with an offset, arXiv 2402.10571). A comparison
    of confidence c counts c times as it stands and 1 - c times the other way round, as in a reward model. The
    statistics are of the pairs as they stand.

    Args:
        reference: (B,), the reference's log-probabilities.
        labelled: some comparison of the run has a margin or a confidence.
    """
    options: dict[str, Any] = {
        "beta": config.beta, "label_smoothing": config.label_smoothing, "loss": config.loss, "denominator": total,
    }  # fmt: skip
    logprobs = batch_logprobs(config, model, batch)  # (B,)
    sides = logprobs[pairs.chosen], logprobs[pairs.rejected]  # (P,) each
    of_reference = reference[pairs.chosen], reference[pairs.rejected]
    if not labelled:
        return ops.dpo_loss(*sides, *of_reference, **options)
    with torch.no_grad():
        _, stats = ops.dpo_loss(*sides, *of_reference, **options)
    apart = (of_reference[0] + pairs.margins / config.beta, of_reference[1])
    chosen, rejected, ref_chosen, ref_rejected = (
        torch.cat([one, other]) for one, other in (sides, sides[::-1], apart, apart[::-1])
    )  # (2 P,) each
    weights = torch.cat([pairs.confidences, 1 - pairs.confidences])
    loss, _ = ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options, weights=weights)
    return loss, stats


class DPOTrainer:
    """Raise the chosen responses over the rejected ones, relative to the frozen start (arXiv 2305.18290, equation 7).

    Args:
        model: the policy to start from, which is also the reference.
        data: comparisons (see data/records.py).
        out: the run's folder.
        heldout_data: measured on and never trained on, in place of a share of the data or its own splits.
        monitors: are asked after every step (trainers/loop/monitor.py).
    """

    def __init__(
        self,
        model: str | Path,
        data: Source | Sequence[Comparison],
        out: str | Path = "runs/dpo",
        config: DPOConfig | dict[str, Any] | None = None,
        heldout_data: Source | Sequence[Comparison] | None = None,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        config, inputs = begin(
            "dpo", DPOConfig, config, monitors, model=model, data=data, out=out, heldout_data=heldout_data
        )
        self.monitors = monitors
        comparisons = read_comparisons(data)
        if heldout_data is not None:
            comparisons = labelled(comparisons, read_comparisons(heldout_data), apart=True)
        loaded, self.tokenizer = models.load(model, getattr(torch, config.dtype))
        self.config = config = use_settings(config, "dpo", out, self.tokenizer)
        self.model = made_ready(models.trainable(loaded, config.lora, config.seed), config)
        self.device = models.output_head(self.model).weight.device
        self.shared = models.longest_shared(self.model)
        self.fitting = fitting_for(self.model, self.tokenizer, config, "dpo")
        groups = group_pairs(comparisons, self.fitting)
        self.fitting.done()
        self.labelled = any(c.margin != 0 or c.confidence < 1 for group in groups for c in group.comparisons)
        split = split_pairs(groups, config.heldout, config.seed, least=1)
        self.training, self.heldout = split.training, split.heldout
        require_heldout(self.heldout, config.patience)
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("dpo", config, **inputs)
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        self.reference: dict[Example, float] = {}

    def train(self) -> dict[str, Any]:
        """Train, save the checkpoint, write `report.html`, and return the run's result."""
        config = self.config
        batches = epoch_batches_by_pairs(self.training, config.batch_size, config.epochs, config.seed)
        with RunFolder(self.out, "dpo", self.config_yaml, config.run.trackers) as run:
            self._remember_reference()
            outcome = fit(
                run, self.model, batches, self._losses, self.budget, config, Goal("heldout_loss", higher=False),
                data=self.training + self.heldout,
                evaluate=lambda _: self.evaluate(), save=self._save, load=models.load, monitors=self.monitors,
            )  # fmt: skip
            counts = {"comparisons": sum(group.pairs for group in self.training), **self.fitting.summary()}
            result = run.finish({**counts, **outcome.row}, outcome.step)
        write_run_report(self.out)
        return result

    def _save(self, folder: Path) -> None:
        models.save(folder, self.model, self.tokenizer)

    def _remember_reference(self) -> None:
        """The reference is the policy before its first step, so its log-probabilities are computed once, here."""
        examples = [example for group in self.training + self.heldout for example in group.examples]
        (parts,) = per_example(
            examples,
            lambda batch: [batch_logprobs(self.config, self.model, batch)],
            self.budget.tokens,
            self.device,
            self.shared,
        )
        self.reference = {example: float(part) for example, part in zip(examples, parts, strict=True)}

    def _losses(self, groups: list[PairGroup]) -> Iterator[tuple[torch.Tensor, Stats]]:
        total = sum(group.pairs for group in groups)
        for part in microbatches_of_groups(groups, self.budget.tokens, self.shared):
            pairs = join(part, self.device)
            batch = pad(pairs.examples, self.device, self.shared)
            reference = torch.tensor([self.reference[example] for example in pairs.examples], device=self.device)
            yield batch_loss(self.config, self.model, batch, pairs, reference, total, labelled=self.labelled)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss, and how often the implicit reward prefers the chosen response, on held-out prompts."""

        if not self.heldout:
            return {}

        def totals() -> dict[str, float]:
            found: dict[str, float] = {}
            for loss, stats in self._losses(self.heldout):
                add_stats(found, {"loss": loss, "accuracy": stats["accuracy"], "margin": stats["margin"]})
            return found

        return {f"heldout_{name}": value for name, value in self.budget.spend("dpo, evaluation", totals).items()}
