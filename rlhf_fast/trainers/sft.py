"""Supervised fine-tuning: cross-entropy on the responses of demonstrations, their end token included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import models, ops, settings
from rlhf_fast.config import SFTConfig
from rlhf_fast.data.batches import Batch, Example, microbatches, pad
from rlhf_fast.data.chat import encode
from rlhf_fast.data.records import Source, read_demonstrations
from rlhf_fast.run_folder import RunFolder
from rlhf_fast.trainers.budget import TokenBudget
from rlhf_fast.trainers.checkpoints import Checkpoints, Goal
from rlhf_fast.trainers.loop import Stats, epoch_batches, fit, split_heldout
from rlhf_fast.trainers.optimizer import Optimizer
from rlhf_fast.trainers.state import digest, fingerprint


class SFTTrainer:
    """Teach a model to answer as demonstrations do.

    Args:
        model: a checkpoint, hub name or `smollm2-135m`.
        data: demonstrations (see data/records.py).
        out: the run's folder.

    Raises:
        ValueError: a row that cannot be used, before anything is written.
    """

    def __init__(
        self, model: str | Path, data: Source, out: str | Path = "runs/sft", config: SFTConfig | None = None
    ) -> None:
        self.config = config = config or SFTConfig()
        demonstrations = read_demonstrations(data)
        loaded, self.tokenizer = models.load(model, getattr(torch, config.dtype))
        self.model = models.trainable(loaded, config.lora, config.seed)
        if config.optim.checkpointing:
            models.recompute_activations(self.model)
        self.head = models.output_head(self.model)
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        examples = [encode(self.tokenizer, d.prompt, d.completion, config.max_length, d.name) for d in demonstrations]
        self.training, self.heldout = split_heldout(examples, config.heldout, config.seed)
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("sft", config, model=model, data=data, out=out)

    def train(self) -> dict[str, Any]:
        """Train, save the checkpoint, and return the run's result."""
        config = self.config
        batches = epoch_batches(self.training, config.batch_size, config.epochs, config.seed)
        optimizer = Optimizer([self.model], config.optim, len(batches))
        run = RunFolder(self.out, "sft", self.config_yaml, config.run.trackers)
        checkpoints = Checkpoints(
            run, config.run, Goal("heldout_loss", higher=False), self._save, patience=config.patience
        )
        identity = {"data": digest(self.training + self.heldout), "model": fingerprint(self.model)}
        per_epoch = math.ceil(len(batches) / config.epochs)
        outcome = fit(
            run, batches, self._losses, optimizer, self.budget, checkpoints, identity, self.evaluate, per_epoch
        )
        if outcome.step != optimizer.steps:
            models.copy_weights(models.load(run.checkpoint(outcome.step))[0], self.model)
        counts = {"demonstrations": len(self.training), "heldout": len(self.heldout)}
        return run.finish({**counts, **outcome.row}, outcome.step)

    def _save(self, folder: Path) -> None:
        models.save(folder, self.model, self.tokenizer)

    def _losses(self, examples: list[Example]) -> Iterator[tuple[torch.Tensor, Stats]]:
        tokens = sum(len(example.response) for example in examples)
        for group in microbatches([len(e) for e in examples], self.budget.tokens):
            yield self._loss(pad([examples[i] for i in group], self.head.weight.device), tokens), {}

    def _loss(self, batch: Batch, denominator: int) -> torch.Tensor:
        return ops.linear_cross_entropy(
            models.response_states(self.model, batch),
            self.head.weight,
            batch.response_tokens,
            denominator=denominator,
            **self.head.options(),
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss in nats a token, and perplexity, on the held-out demonstrations."""
        loss = self.budget.spend("sft, evaluation", lambda: sum(float(loss) for loss, _ in self._losses(self.heldout)))
        return {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 50.0))}
