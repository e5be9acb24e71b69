"""Direct preference optimisation (DPO): fit the policy itself to comparisons, without a reward model."""

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
from rlhf_fast.data.splits import label_splits, require_heldout
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
    """Build the model that a run of DPO trains, from its configs alone.

    Args:
        shape: transformers' config of the model.

    Returns:
        The model with random weights, or within `torch.device("meta")` with shapes and no memory.
    """
    model = models.from_shape(shape, getattr(torch, config.dtype))
    return made_ready(models.trainable(model, config.lora, config.seed), config)


def batch_logprobs(config: DPOConfig, model: Model, batch: Batch) -> torch.Tensor:
    """Sum the log-probabilities of each response: (B,) float32; for IPO their mean (arXiv 2310.12036, section 5)."""
    logprobs, _ = models.response_logprobs(model, batch)
    sums = ops.sequence_sum(logprobs, cu_seqlens=batch.cu_seqlens)
    return sums / batch.cu_seqlens.diff() if config.loss == "ipo" else sums


def batch_loss(
    config: DPOConfig, model: Model, batch: Batch, pairs: Pairs, reference: torch.Tensor, total: int, graded: bool
) -> tuple[torch.Tensor, Stats]:
    """Compute the DPO loss and its statistics on one micro-batch, both divided by the `total` pairs of the batch.

    A margin m asks for rewards that are further apart by m: the chosen response's log-probability under the reference
    is raised by m / beta (DPO with an offset, arXiv 2402.10571). A comparison of confidence c enters the loss twice,
    with weight c as labelled and 1 - c with the responses swapped, as in the reward model's loss. The statistics
    ignore margins and confidences.

    Args:
        pairs: which rows of the batch were chosen over which.
        reference: (B,) float32, log-probabilities of the batch's responses under the reference.
        graded: some comparison of the run has a margin, or a confidence below 1.

    Returns:
        The loss, float32 of shape (), and the statistics of `ops.dpo_loss`.
    """
    options: dict[str, Any] = {
        "beta": config.beta, "label_smoothing": config.label_smoothing, "loss": config.loss, "denominator": total,
    }  # fmt: skip
    logprobs = batch_logprobs(config, model, batch)  # (B,)
    chosen, rejected = logprobs[pairs.chosen], logprobs[pairs.rejected]  # (P,) each
    ref_chosen, ref_rejected = reference[pairs.chosen], reference[pairs.rejected]  # (P,) each
    if not graded:
        return ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    with torch.no_grad():
        _, stats = ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    ref_chosen = ref_chosen + pairs.margins / config.beta
    chosen, rejected = torch.cat([chosen, rejected]), torch.cat([rejected, chosen])  # (2 P,) each
    ref_chosen, ref_rejected = torch.cat([ref_chosen, ref_rejected]), torch.cat([ref_rejected, ref_chosen])
    weights = torch.cat([pairs.confidences, 1 - pairs.confidences])
    loss, _ = ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options, weights=weights)
    return loss, stats


class DPOTrainer:
    """Trainer of a policy by DPO (arXiv 2305.18290): chosen responses gain over rejected ones, beside the reference.

    Args:
        model: the checkpoint of the policy to start from, which is also the reference.
        data: comparisons (see data/records.py).
        out: the run's folder.
        config: settings, or a dict of them; None: the defaults.
        heldout_data: comparisons to measure on and never train on, in place of a share of the data or its own splits.
        monitors: callables that are asked after every step (trainers/loop/monitor.py).

    Raises:
        ValueError, TypeError, OSError: a setting, a row or a folder that cannot be used, before anything is written.
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
            comparisons = label_splits(comparisons, read_comparisons(heldout_data), apart=True)
        loaded, self.tokenizer = models.load(model, getattr(torch, config.dtype))
        self.config = config = use_settings(config, "dpo", out, self.tokenizer)
        self.model = made_ready(models.trainable(loaded, config.lora, config.seed), config)
        self.device = models.output_head(self.model).weight.device
        self.shared = models.longest_shared(self.model)
        self.fitting = fitting_for(self.model, self.tokenizer, config, "dpo")
        groups = group_pairs(comparisons, self.fitting)
        self.fitting.done()
        self.graded = any(c.margin != 0 or c.confidence < 1 for group in groups for c in group.comparisons)
        split = split_pairs(groups, config.heldout, config.seed, least=1)
        self.training, self.heldout = split.training, split.heldout
        require_heldout(self.heldout, config.patience)
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("dpo", config, **inputs)
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        self.reference_logprobs: dict[Example, float] = {}

    def train(self) -> dict[str, Any]:
        """Train, save the checkpoint, write `report.html`, and return the run's result."""
        config = self.config
        batches = epoch_batches_by_pairs(self.training, config.batch_size, config.epochs, config.seed)
        with RunFolder(self.out, "dpo", self.config_yaml, config.run.trackers) as run:
            self._score_with_reference()
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

    def _score_with_reference(self) -> None:
        """Compute all log-probabilities of the reference once: it is the policy before its first step."""
        examples = [example for group in self.training + self.heldout for example in group.examples]
        (parts,) = per_example(
            examples,
            lambda batch: [batch_logprobs(self.config, self.model, batch)],
            self.budget.tokens,
            self.device,
            self.shared,
        )
        self.reference_logprobs = {example: float(part) for example, part in zip(examples, parts, strict=True)}

    def _losses(self, groups: list[PairGroup]) -> Iterator[tuple[torch.Tensor, Stats]]:
        """Yield loss and statistics of each micro-batch of these groups, divided by the pairs of all of them."""
        total = sum(group.pairs for group in groups)
        for part in microbatches_of_groups(groups, self.budget.tokens, self.shared):
            pairs = join(part, self.device)
            batch = pad(pairs.examples, self.device, self.shared)
            known = [self.reference_logprobs[example] for example in pairs.examples]
            reference = torch.tensor(known, device=self.device)  # (B,)
            yield batch_loss(self.config, self.model, batch, pairs, reference, total, graded=self.graded)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure loss, accuracy and margin of the implicit reward on held-out comparisons; {} if there are none."""
        if not self.heldout:
            return {}

        def totals() -> dict[str, float]:
            sums: dict[str, float] = {}
            for loss, stats in self._losses(self.heldout):
                add_stats(sums, {"loss": loss, "accuracy": stats["accuracy"], "margin": stats["margin"]})
            return sums

        return {f"heldout_{name}": value for name, value in self.budget.spend("dpo, evaluation", totals).items()}
