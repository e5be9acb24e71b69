"""Supervised fine-tuning: cross-entropy on the assistant's turns of demonstrations, their end tokens included."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from rlhf_fast import models, ops
from rlhf_fast.config import SFTConfig, settings
from rlhf_fast.data.batches import Batch
from rlhf_fast.data.conversations import Tokenized, batch_of, microbatches_of_conversations
from rlhf_fast.data.records import Demonstration, PromptRecord, Source, prompt_text, read_demonstrations
from rlhf_fast.data.splits import label_splits, other_splits, require_heldout, split_as_labelled, split_heldout
from rlhf_fast.data.tokenize import tokenize_record
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.pages.run_report import write_run_report
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.chat_settings import use_settings
from rlhf_fast.trainers.loop.checkpoints import Goal
from rlhf_fast.trainers.loop.lengths import fitting_for
from rlhf_fast.trainers.loop.monitor import Monitor
from rlhf_fast.trainers.loop.preflight import begin, made_ready
from rlhf_fast.trainers.loop.steps import Stats, epoch_batches, fit

Encoded = tuple[Tokenized, ...]  # one demonstration: a conversation, or one for each answer that needs its own


def build(config: SFTConfig, shape: PreTrainedConfig) -> Model:
    """Build the model that a run of SFT trains, from its configs alone.

    Args:
        shape: transformers' config of the model.

    Returns:
        The model with random weights, or within `torch.device("meta")` with shapes and no memory.
    """
    model = models.from_shape(shape, getattr(torch, config.dtype))
    return made_ready(models.trainable(model, config.lora, config.seed), config)


def batch_loss(model: Model, batch: Batch, denominator: int) -> torch.Tensor:
    """Compute the cross-entropy of one micro-batch's learned tokens: float32 of shape ().

    Args:
        denominator: learned tokens of the whole batch, by which the sum is divided.
    """
    states, head = models.response_states(model, batch), models.output_head(model)
    return ops.linear_cross_entropy(
        states, head.weight, batch.response_tokens, denominator=denominator, **head.options()
    )


class SFTTrainer:
    """Trainer of a model by supervised fine-tuning, to answer as demonstrations do.

    Args:
        model: a checkpoint, hub name or `smollm2-135m`.
        data: demonstrations (see data/records.py).
        out: the run's folder.
        config: settings, or a dict of them; None: the defaults.
        heldout_data: demonstrations to measure on and never train on, in place of a share of the data or its splits.
        monitors: callables that are asked after every step (trainers/loop/monitor.py).

    Raises:
        ValueError, TypeError, OSError: a setting, a row or a folder that cannot be used, before anything is written.
    """

    def __init__(
        self,
        model: str | Path,
        data: Source,
        out: str | Path = "runs/sft",
        config: SFTConfig | dict[str, Any] | None = None,
        heldout_data: Source | None = None,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        config, inputs = begin(
            "sft", SFTConfig, config, monitors, model=model, data=data, out=out, heldout_data=heldout_data
        )
        self.monitors = monitors
        demonstrations = read_demonstrations(data)
        if heldout_data is not None:
            demonstrations = label_splits(demonstrations, read_demonstrations(heldout_data))
        loaded, self.tokenizer = models.load(model, getattr(torch, config.dtype))
        self.config = config = use_settings(config, "sft", out, self.tokenizer)
        self.model = made_ready(models.trainable(loaded, config.lora, config.seed), config)
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        self.longest_packed = models.longest_packed(self.model) if config.packing else 0
        self.fitting = fitting_for(self.model, self.tokenizer, config, "sft")
        fitted = [(d, self.fitting.demonstration(d, config.turns)) for d in demonstrations]
        encoded: list[tuple[Demonstration, Encoded]] = [(d, found) for d, found in fitted if found]
        self.fitting.done()
        _warn_of_many([conversations for _, conversations in encoded])
        others = [other_splits([d.split]) for d, _ in encoded]
        training, heldout = split_as_labelled(encoded, others, "demonstrations", least=1)
        if not heldout:
            training, heldout = split_heldout(encoded, config.heldout, config.seed)
        require_heldout(heldout, config.patience)
        self.training, self.heldout = [item for _, item in training], [item for _, item in heldout]
        self.asked = [
            PromptRecord(d.prompt, name=d.name, tools=d.tools, template_kwargs=d.template_kwargs)
            for d, _ in heldout[: config.samples]
        ]
        self.generator = self._generator() if self.asked else None
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("sft", config, **inputs)

    def train(self) -> dict[str, Any]:
        """Train, save the checkpoint, write `report.html`, and return the run's result."""
        config = self.config
        batches = epoch_batches(self.training, config.batch_size, config.epochs, config.seed)
        with RunFolder(self.out, "sft", self.config_yaml, config.run.trackers) as run:

            def evaluate(step: int) -> dict[str, float]:
                self._sample(run, step)
                return self.evaluate()

            outcome = fit(
                run, self.model, batches, self._losses, self.budget, config, Goal("heldout_loss", higher=False),
                data=self.training + self.heldout, evaluate=evaluate, save=self._save, load=models.load,
                monitors=self.monitors,
            )  # fmt: skip
            counts = {"demonstrations": len(self.training), "heldout": len(self.heldout), **self.fitting.summary()}
            result = run.finish({**counts, **outcome.row}, outcome.step)
        write_run_report(self.out)
        return result

    def _save(self, folder: Path) -> None:
        models.save(folder, self.model, self.tokenizer)

    def _losses(self, demonstrations: Sequence[Encoded]) -> Iterator[tuple[torch.Tensor, Stats]]:
        """Yield the loss of each micro-batch of these demonstrations, divided by the learned tokens of all of them."""
        conversations = [conversation for demonstration in demonstrations for conversation in demonstration]
        lengths, learned = map(len, conversations), sum(conversation.learned for conversation in conversations)
        for group, packed in microbatches_of_conversations(list(lengths), self.budget.tokens, self.longest_packed):
            batch = batch_of([conversations[i] for i in group], self.model.device, packed)
            yield batch_loss(self.model, batch, learned), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the loss, in nats per token, and the perplexity on held-out demonstrations; {} if there are none."""
        if not self.heldout:
            return {}
        loss = self.budget.spend("sft, evaluation", lambda: sum(float(loss) for loss, _ in self._losses(self.heldout)))
        return {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 50.0))}

    # Samples --------------------------------------------------------------------------------------------------------

    def _generator(self) -> Generator | None:
        try:
            return Generator(self.model, self.tokenizer)
        except ValueError as error:
            warnings.warn(f"no samples at evaluations, since the model cannot be sampled from: {error}", stacklevel=3)
            return None

    def _sample(self, run: RunFolder, step: int) -> None:
        """Log greedy answers to a few held-out prompts as samples of the run; the generator's memory is released."""
        if self.generator is None:
            return
        limit = getattr(unwrapped(self.model).config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        rooms = [
            min(self.config.sample_tokens, limit - len(tokenize_record(prompt, self.tokenizer)[0]))
            for prompt in self.asked
        ]
        asked = [i for i, room in enumerate(rooms) if room > 0]
        if not asked:
            return
        params = [SamplingParams(temperature=0.0, max_new_tokens=rooms[i]) for i in asked]
        rollouts = self.generator.generate([self.asked[i] for i in asked], params)
        self.generator.release_memory()
        shown = [prompt_text(self.asked[i].prompt) for i in asked]
        said = zip(shown, rollouts.texts, rollouts.finish_reasons, strict=True)
        run.samples(step, [{"prompt": prompt, "text": text, "finished": end == "stop"} for prompt, text, end in said])


def _warn_of_many(demonstrations: list[Encoded]) -> None:
    """Warn of conversations that are read once for each answer: right, but slower than they might be."""
    several = sum(len(conversations) > 1 for conversations in demonstrations)
    if several:
        warnings.warn(
            f"{several} of {len(demonstrations)} demonstrations are read anew for some of their answers, since the "
            "chat template renders earlier turns differently once others follow; sft.turns = last learns the last "
            "answer only",
            stacklevel=3,
        )
