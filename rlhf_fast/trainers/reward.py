"""Reward model: Bradley-Terry on comparisons, a scalar head or several on the last real token."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from rlhf_fast import models, ops
from rlhf_fast.config import RewardConfig, settings
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
from rlhf_fast.data.records import Comparison, PromptRecord, Source, read_comparisons
from rlhf_fast.data.splits import label_splits, require_heldout
from rlhf_fast.data.tokenize import tokenize_example, tokenize_record
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.scoring import per_example
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.pages.reward_report import write_reward_report
from rlhf_fast.rewards.measures import Heldout, agrees, histogram, measure, not_measured
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.runs.files import write_atomic
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.runs.terminal import bar_updater, progress_bar
from rlhf_fast.statistics.intervals import Interval, clustered_share
from rlhf_fast.trainers.loop.chat_settings import use_settings
from rlhf_fast.trainers.loop.checkpoints import Goal
from rlhf_fast.trainers.loop.lengths import fitting_for
from rlhf_fast.trainers.loop.monitor import Monitor
from rlhf_fast.trainers.loop.preflight import begin, made_ready
from rlhf_fast.trainers.loop.steps import Stats, fit

POISSON = np.cumsum([math.exp(-1) / math.factorial(n) for n in range(12)])  # of mean 1: P(X <= n)
SCALE_RESPONSES = 256  # training responses that set the scale where none is held out
SCALE_PROMPTS = 64  # training prompts whose sampled responses set it, where none is held out and the policy is sampled
UNBATCHED_TEXTS = 4  # responses that are scored once more, each alone, to see that the batch does not matter


def build(config: RewardConfig, shape: PreTrainedConfig) -> Model:
    """Build the reward model that a run trains, from its configs alone.

    Args:
        shape: transformers' config of the policy that it starts from.

    Returns:
        The model with random weights, or within `torch.device("meta")` with shapes and no memory.
    """
    model = models.reward_from_shape(shape, getattr(torch, config.dtype), config.heads)
    return made_ready(models.trainable_scorer(model, config.lora, config.seed), config)


def batch_loss(
    config: RewardConfig,
    model: Model,
    batch: Batch,
    pairs: Pairs,
    total: int,
    weights: torch.Tensor | None,
    soft_labels: bool,
) -> tuple[torch.Tensor, Stats]:
    """Compute the Bradley-Terry loss of all K heads on one micro-batch, divided by the `total` pairs of the batch.

    A comparison of confidence c enters the loss twice, with weight c as labelled and 1 - c with the responses swapped.
    That is the expected loss of a label that is right with probability c; it is least where the scores differ by the
    log-odds of c.

    Args:
        pairs: which rows of the batch were chosen over which, P pairs.
        weights: (K * P,) float32, how often each pair is in each head's resample; None: once in each.
        soft_labels: some comparison of the run has a confidence below 1.

    Returns:
        The loss, float32 of shape (), and the accuracy of the combined score; a tie counts half.
    """
    scores = models.score_last(model, batch)  # (B, K)
    heads = scores.shape[1]
    with torch.no_grad():
        score = models.lower_bound(scores, config.lcb)  # (B,)
        stats = {"accuracy": agrees(score[pairs.chosen] - score[pairs.rejected]).sum() / total}
    chosen, rejected = (scores[side].T.flatten() for side in (pairs.chosen, pairs.rejected))  # (K * P,)
    margins = pairs.margins.repeat(heads)
    if soft_labels:
        confidences = pairs.confidences.repeat(heads)
        label_weights = torch.cat([confidences, 1 - confidences])
        weights = label_weights if weights is None else label_weights * weights.repeat(2)
        chosen, rejected = torch.cat([chosen, rejected]), torch.cat([rejected, chosen])
        margins = torch.cat([margins, -margins])
    loss, _ = ops.reward_loss(
        chosen,
        rejected,
        margin=margins,
        center_coef=config.center_coef,
        denominator=heads * total,
        weights=weights,
    )
    return loss, stats


class RewardTrainer:
    """Trainer of a reward model on comparisons, which measures its agreement with held-out ones.

    With several heads the score is their mean less `lcb` standard deviations; each head is trained on a resample of
    the prompts.

    Args:
        model: the checkpoint of the policy to start from (its weights and adapter; the heads are new).
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
        out: str | Path = "runs/reward",
        config: RewardConfig | dict[str, Any] | None = None,
        heldout_data: Source | Sequence[Comparison] | None = None,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        config, inputs = begin(
            "reward", RewardConfig, config, monitors, model=model, data=data, out=out, heldout_data=heldout_data
        )
        self.monitors = monitors
        self.start = model
        self.comparisons = read_comparisons(data)
        if heldout_data is not None:
            self.comparisons = label_splits(self.comparisons, read_comparisons(heldout_data), apart=True)
        dtype = getattr(torch, config.dtype)
        started, self.tokenizer = models.reward_from(model, config.lora, config.seed, dtype, config.heads)
        self.config = config = use_settings(config, "reward", out, self.tokenizer)
        models.pad_apart(started, self.tokenizer)
        self.model = made_ready(started, config)
        # Groups hold all comparisons of a prompt, so no prompt is in both parts; an interval needs two of them.
        self.fitting = fitting_for(self.model, self.tokenizer, config, "reward")
        groups = group_pairs(self.comparisons, self.fitting, scored=True)
        self.fitting.done()
        self.split = split_pairs(groups, config.heldout, config.seed, least=2)
        self.training, self.heldout = self.split.training, self.split.heldout
        require_heldout(self.heldout, config.patience)
        if config.normalize_samples:
            self._require_room()
        self.soft_labels = any(confidence < 1 for group in groups for confidence in group.confidences)
        self.device = next(self.model.parameters()).device
        self.shared = models.longest_shared(self.model)
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("reward", config, **inputs)
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        self.agreement: Interval | None = None  # as last measured; None while it is not
        self.by_head = torch.empty(0, config.heads)  # scores of the held-out responses, as last evaluated
        self.scale = (0.0, 1.0)  # mean and deviation of the policy's scores
        self.policy_scores: torch.Tensor | None = None  # scores of its samples, where they set the scale

    def train(self) -> dict[str, Any]:
        """Train, measure, save the checkpoint with the normalisation of its scores, and return the run's result.

        The folder gets `reward_report.json` with all that was measured, `samples.jsonl` with the held-out comparisons,
        the worst first, and `report.html`, a page of both.
        """
        config = self.config
        batches = epoch_batches_by_pairs(self.training, config.batch_size, config.epochs, config.seed)
        with RunFolder(self.out, "reward", self.config_yaml, config.run.trackers) as run:
            outcome = fit(
                run, self.model, batches, self._losses, self.budget, config, Goal("heldout_accuracy", higher=True),
                data=self.training + self.heldout,
                evaluate=lambda _: self.evaluate(), save=self._save, load=models.load_reward, monitors=self.monitors,
            )  # fmt: skip
            if outcome.step != len(batches):
                self.evaluate()
                self._set_scale()
            report = self._report(run)
            summary: dict[str, Any] = {
                "comparisons": sum(group.pairs for group in self.training),
                "heldout": sum(group.pairs for group in self.heldout),
                "heldout_prompts": len({group.examples[0].prompt for group in self.heldout}),
                "verdict": report["verdict"],
                "notes": report["notes"],
                "score_mean": self.scale[0],
                "score_std": self.scale[1],
            }
            if self.agreement is not None:
                summary |= {
                    "heldout_accuracy": self.agreement.as_dict(),
                    **run.before(["heldout_accuracy"]),
                    "always_longer": report["length"]["always_longer"]["mean"],
                    "ece": report["calibration"]["ece"],
                }
            result = run.finish({**summary, **self.fitting.summary()}, outcome.step)
        write_reward_report(self.out)
        return result

    def _save(self, folder: Path) -> None:
        self._set_scale()
        mean, std = self.scale
        agreement = None if self.agreement is None else self.agreement.as_dict()
        extra = {"score_mean": mean, "score_std": std, "heldout_agreement": agreement}
        extra |= {"heads": self.config.heads, "lcb": self.config.lcb}
        models.save(folder, self.model, self.tokenizer, extra)

    def _losses(self, groups: list[PairGroup]) -> Iterator[tuple[torch.Tensor, Stats]]:
        """Yield loss and statistics of each micro-batch of these groups, divided by the pairs of all of them."""
        total = sum(group.pairs for group in groups)
        for part in microbatches_of_groups(groups, self.budget.tokens, self.shared):
            pairs = join(part, self.device)
            batch = pad(pairs.examples, self.device, self.shared)
            weights = self._resample_weights(part) if self.config.heads > 1 else None
            yield batch_loss(
                self.config, self.model, batch, pairs, total, weights=weights, soft_labels=self.soft_labels
            )

    def _resample_weights(self, groups: list[PairGroup]) -> torch.Tensor:
        """Draw how often each comparison is in each head's resample: (K * P,) float32, head by head.

        All comparisons of a prompt are drawn together, or one by one where comparisons, not prompts, are held out.
        """
        seed, one_by_one = self.config.seed, self.split.by_pairs
        times = [
            float(poisson_weight(seed, head, prompt, (chosen.response, rejected.response) if one_by_one else ()))
            for head in range(self.config.heads)
            for group in groups
            for prompt, chosen, rejected in group.sides()
        ]
        return torch.tensor(times, device=self.device)

    def evaluate(self) -> dict[str, float]:
        """Measure the agreement with the held-out comparisons, with an interval over their prompts; a tie counts half.

        Returns:
            Metrics by name; {} if nothing is held out.
        """
        if not self.heldout:
            return {}
        pairs = join(self.heldout, self.device)
        self.by_head = self._scores(pairs.examples)
        scores = models.lower_bound(self.by_head, self.config.lcb)
        difference = scores[pairs.chosen] - scores[pairs.rejected]
        self.agreement = clustered_share(agrees(difference.cpu().numpy()), self._clusters())
        self.scale = _mean_and_std(scores)
        spread = {"heldout_disagreement": float(self.by_head.std(dim=1, correction=0).mean()) / self.scale[1]}
        return {
            "heldout_accuracy": self.agreement.mean,
            "heldout_accuracy_low": self.agreement.low,
            "heldout_accuracy_high": self.agreement.high,
            **(spread if self.config.heads > 1 else {}),
        }

    def _clusters(self) -> list[int]:
        """Number the held-out comparisons by prompt, or one by one where comparisons are held out one by one."""
        return [i for i, group in enumerate(self.heldout) for _ in range(group.pairs)]

    def _scores(self, examples: list[Example]) -> torch.Tensor:
        """Score examples by every head: (N, K) float32."""
        (parts,) = per_example(
            examples,
            lambda batch: [models.score_last(self.model, batch)],
            self.budget.tokens,
            self.device,
            self.shared,
        )
        return torch.cat(parts)  # (N, K)

    # The report -----------------------------------------------------------------------------------------------------

    def _report(self, run: RunFolder) -> dict[str, Any]:
        """Measure the last evaluation's scores, write reward_report.json and the samples, and return the report."""
        if not self.heldout:
            report = not_measured(self.comparisons)
            report["notes"] += [self.fitting.told()] if self.fitting.told() else []
            write_atomic(run.path / "reward_report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
            return report
        pairs = join(self.heldout, "cpu")
        scores = models.lower_bound(self.by_head, self.config.lcb).cpu()
        heldout = Heldout(
            comparisons=[comparison for group in self.heldout for comparison in group.comparisons],
            prompts=np.array(self._clusters()),
            chosen=pairs.chosen.numpy(),
            rejected=pairs.rejected.numpy(),
            scores=scores.double().numpy(),
            by_head=self.by_head.double().cpu().numpy(),
            tokens=np.array([example.own_tokens for example in pairs.examples]),
        )
        report = measure(heldout, self.comparisons)
        report["notes"] += [self.fitting.told()] if self.fitting.told() else []
        if self.split.by_pairs:
            report["notes"].append("these comparisons' prompts were trained on, and agreement on others is not known")
        report["alone"] = self._batch_effect(pairs.examples)
        report["scores"] = self._score_histogram(heldout)
        write_atomic(run.path / "reward_report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
        for i in np.argsort(heldout.difference, kind="stable"):
            comparison = heldout.comparisons[i]
            sides = {
                "chosen_score": (heldout.scores[heldout.chosen[i]] - self.scale[0]) / self.scale[1],
                "rejected_score": (heldout.scores[heldout.rejected[i]] - self.scale[0]) / self.scale[1],
            }
            run.sample({**comparison.as_dict(), **{name: round(float(score), 4) for name, score in sides.items()}})
        return report

    def _batch_effect(self, examples: list[Example]) -> dict[str, float]:
        """Measure how far a text's score alone is from its score in a batch, in standard deviations of the scores."""
        by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        chosen = sorted({by_length[i] for i in np.linspace(0, len(examples) - 1, UNBATCHED_TEXTS).round().astype(int)})
        alone = torch.cat([self._scores([examples[i]]) for i in chosen])
        together = self.by_head[torch.tensor(chosen, device=self.by_head.device)]
        return {"texts": len(chosen), "most_deviations": float((alone - together).abs().max()) / self.scale[1]}

    def _score_histogram(self, heldout: Heldout) -> dict[str, Any]:
        """Count scores in bins, in the unit that PPO sees: of chosen and of rejected responses, and of the policy's own
        where those set the scale."""
        scores = {"chosen": heldout.scores[heldout.chosen], "rejected": heldout.scores[heldout.rejected]}
        over = "the held-out responses"
        if self.policy_scores is not None:
            scores["policy"] = self.policy_scores.double().cpu().numpy()
            over = f"{len(self.policy_scores)} responses sampled from the policy to the held-out prompts"
        mean, std = self.scale
        scaled = {name: (values - mean) / std for name, values in scores.items()}
        return {"over": over, "mean": mean, "std": std, "histogram": histogram(scaled)}

    def _set_scale(self) -> None:
        """Set the scale by the policy's own responses if `normalize_samples` asks for them, else, where nothing is held
        out, by training responses. (With held-out responses, `evaluate` has set it by those.)"""
        if self.config.normalize_samples:
            self.policy_scores = models.lower_bound(self._scores(self._policy_samples), self.config.lcb)
            self.scale = _mean_and_std(self.policy_scores)
        elif not self.heldout:
            examples = [example for group in self.training[:SCALE_RESPONSES] for example in group.examples]
            examples = examples[:SCALE_RESPONSES]
            self.scale = _mean_and_std(models.lower_bound(self._scores(examples), self.config.lcb))

    def _prompts_to_sample(self) -> list[PromptRecord]:
        """List the prompts to sample the policy on, for its responses to set the scale."""
        groups = self.heldout or self.training[:SCALE_PROMPTS]
        rows = {group.examples[0].prompt: group.comparisons[0] for group in groups}.values()
        return [PromptRecord(r.prompt, name=r.name, tools=r.tools, template_kwargs=r.template_kwargs) for r in rows]

    def _require_room(self) -> None:
        """Refuse prompts that leave the policy no room for a response, before anything is trained.

        Raises:
            ValueError: names the row and the two numbers that exceed the model's positions.
        """
        context, new = self.fitting.context, self.config.max_new_tokens
        for row in self._prompts_to_sample():
            (prompt,) = tokenize_record(row, self.tokenizer)
            if context is not None and len(prompt) + new > context:
                raise ValueError(
                    f"{row.name or 'a row'}: its prompt of {len(prompt)} tokens with reward.max_new_tokens = {new} "
                    f"exceeds the {context} positions that the model has; lower one of them, or leave out "
                    "reward.normalize_samples"
                )

    @functools.cached_property
    def _policy_samples(self) -> list[Example]:
        """Sample responses of the policy that the reward model started from, tokenised as PPO's reward reads them."""
        config = self.config
        policy, tokenizer = models.load(self.start, getattr(torch, config.dtype), merged=True)
        use_settings(config, "reward", self.out, tokenizer)
        params = SamplingParams(n=config.normalize_samples, max_new_tokens=config.max_new_tokens, seed=config.seed)
        prompts = self._prompts_to_sample()
        with progress_bar(len(prompts) * params.n, "reward", "reply") as bar:
            rollouts = Generator(policy, tokenizer).generate(prompts, params, bar_updater(bar))
        sampled = [prompts[i] for i in rollouts.prompt_index.tolist()]
        return [
            tokenize_example(tokenizer, p.prompt, text, p.tools, p.template_kwargs, name=p.name, strict=False)
            for p, text in zip(sampled, rollouts.texts, strict=True)
        ]


def poisson_weight(seed: int, head: int, prompt: tuple[int, ...], pair: tuple[tuple[int, ...], ...] = ()) -> int:
    """Draw how often a prompt, or a pair of its responses, is in a head's bootstrap resample: Poisson of mean 1.

    The number is a hash of the arguments, so it is the same in every epoch, order and micro-batch.

    Args:
        prompt: token ids.
        pair: token ids of the chosen and the rejected response; (): the whole prompt is drawn.
    """
    key = repr((seed, head, prompt, *pair)).encode()
    uniform = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    return int(np.searchsorted(POISSON, uniform, side="right"))


def _mean_and_std(scores: torch.Tensor) -> tuple[float, float]:
    """Compute the mean and the standard deviation by which scores are normalised; the latter is at least 1e-6."""
    return float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)
