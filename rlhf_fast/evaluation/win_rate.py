"""Compare one policy with another on held-out prompts: win rate and score difference, paired, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_fast import models, ops
from rlhf_fast.config import EvaluationConfig, settings
from rlhf_fast.data.records import PromptRecord, user_text
from rlhf_fast.data.templates import use_template
from rlhf_fast.data.text_metrics import repetition, words
from rlhf_fast.evaluation.judges import Judge, Verdict, judge_of, mean_parts
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.scoring import per_example
from rlhf_fast.rewards.model import Reward
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.runs.files import write_atomic
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.runs.terminal import bar_updater, progress_bar
from rlhf_fast.statistics.intervals import clustered_bootstrap, clustered_share

MAX_TOKENS = 2048  # padded tokens scored at once


@dataclass(frozen=True)
class Side:
    """Replies of one policy to the prompts and what the judge says of them, in the order of `Rollouts`."""

    rollouts: Rollouts
    verdicts: list[Verdict]

    @property
    def scores(self) -> np.ndarray:
        return np.array([verdict.score for verdict in self.verdicts])


def evaluate(
    a: str | Path,
    b: str | Path,
    prompts: Sequence[PromptRecord],
    config: EvaluationConfig | dict[str, Any] | None = None,
    names: tuple[str, str] = ("a", "b"),
    judge: Judge | Reward | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare policy `a` with policy `b`, which is also the reference that the KL is measured to.

    Each samples `samples_per_prompt` replies to every prompt; the judge scores them, and sample k of `a` is compared
    with sample k of `b`, a tie within `tie_margin`. Intervals resample whole prompts, since samples of one prompt are
    not independent; a prompt that comes several times is one.

    Args:
        names: of the policies, in figures and rows.
        judge: judges.py; a reward in any form, or by default the simulated annotator, whose rule is made for the demo's
            prompts.

    Returns:
        The figures (`evaluation.json`), and one row a compared pair (`samples.jsonl`).

    Raises:
        ValueError: fewer than two prompts, or prompts that the judge cannot judge by; before anything is loaded.
    """
    config = settings.given(EvaluationConfig, config)
    require_several(prompts)
    judge = judge_of(judge)
    judge.check(prompts)
    model_a, tokenizer_a = models.load(a, merged=True)
    model_b, tokenizer_b = models.load(b, merged=True)
    for tokenizer in (tokenizer_a, tokenizer_b):
        use_template(tokenizer, config.chat_template, config.template_kwargs, config.parse_special_tokens)
    side_a = _sample(model_a, tokenizer_a, prompts, config, judge, names[0])
    side_b = _sample(model_b, tokenizer_b, prompts, config, judge, names[1])
    of = side_a.rollouts.prompt_index.tolist()
    numbers = _numbers(prompts)
    cluster = [numbers[i] for i in of]
    difference = side_a.scores - side_b.scores
    wins = np.where(np.abs(difference) <= config.tie_margin + 1e-9, 0.5, (difference > 0).astype(float))
    parts = {key: mean_parts(side.verdicts) for key, side in (("a", side_a), ("b", side_b))}
    figures: dict[str, Any] = {
        "judge": judge.name,
        "judge_note": judge.note,
        "tie_margin": config.tie_margin,
        "a": names[0],
        "b": names[1],
        "prompts": len(set(numbers)),
        "samples_per_prompt": config.samples_per_prompt,
        "score_difference": clustered_bootstrap(difference, cluster).as_dict(),
        "win_rate": clustered_share(wins, cluster).as_dict(),
        "wins": int((wins == 1.0).sum()),
        "ties": int((wins == 0.5).sum()),
        "losses": int((wins == 0.0).sum()),
        "a_metrics": _metrics(side_a, _mean_kl(model_b, side_a.rollouts, config.temperature)),
        "b_metrics": _metrics(side_b, 0.0),
        "criteria": {name: {key: parts[key][name] for key in parts} for name in parts["a"] if name in parts["b"]},
        "by_category": _by_category(side_a.scores, side_b.scores, _categories(prompts, of), cluster),
    }
    return figures, [_row(prompts[i], k, side_a, side_b) for k, i in enumerate(of)]


def require_several(prompts: Sequence[PromptRecord]) -> None:
    """Refuse fewer than two different prompts, for which there is no interval."""
    different = len(set(_numbers(prompts)))
    if different < 2:
        raise ValueError(
            f"prompts: {different} came; expected at least 2, as the intervals say what other prompts would give"
        )


def _numbers(prompts: Sequence[PromptRecord]) -> list[int]:
    """Number the prompts, equal ones alike."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(json.dumps(prompt.prompt, sort_keys=True), len(numbers)) for prompt in prompts]


def write_evaluation(
    run: RunFolder, figures: dict[str, Any], rows: list[dict[str, Any]], told: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write what `evaluate` returned into a run's folder and finish the run; returns its result, with what is `told`
    besides in its summary."""
    for row in rows:
        run.sample(row)
    write_atomic(run.path / "evaluation.json", json.dumps(figures, indent=2) + "\n")
    headline = {name: figures[name] for name in ("score_difference", "win_rate")}
    said = {name: figures[name] for name in ("judge", "judge_note")}
    counts = {name: figures[name] for name in ("wins", "ties", "losses")}
    return run.finish({**said, **headline, **counts, "kl": figures["a_metrics"]["kl"], **(told or {})})


def _sample(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[PromptRecord],
    config: EvaluationConfig,
    judge: Judge,
    name: str,
) -> Side:
    params = SamplingParams(
        n=config.samples_per_prompt,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    with progress_bar(len(prompts) * params.n, f"evaluate {name}", "reply") as bar:
        rollouts = Generator(model, tokenizer).generate(prompts, params, bar_updater(bar))
    asked = [prompts[i] for i in rollouts.prompt_index.tolist()]
    return Side(rollouts, judge.rate(asked, rollouts.texts))


def _mean_kl(reference: Model, rollouts: Rollouts, temperature: float) -> float:
    """KL(policy || reference) in nats a sequence, estimated on the policy's own samples; at temperature 0 as at 1."""
    examples = rollouts.examples()
    (parts,) = per_example(
        examples,
        lambda batch: [models.response_logprobs(reference, batch, temperature or 1.0)[0]],
        MAX_TOKENS,
        rollouts.input_ids.device,
        models.longest_shared(reference),
    )
    # Models are loaded in float32, where the sampler's log-probabilities are those of a forward pass, to rounding.
    own = rollouts.logprobs[rollouts.response_mask]  # (R,)
    return float(ops.kl_estimate(own, torch.cat(parts), kind="k1").sum()) / len(examples)


def _metrics(side: Side, kl: float) -> dict[str, float]:
    rollouts = side.rollouts
    return {
        "score": _mean(side.scores),
        "kl": kl,
        "tokens": float(rollouts.response_mask.sum()) / len(rollouts),
        "words": _mean([float(len(words(text))) for text in rollouts.texts]),
        "repetition": _mean([repetition(text) for text in rollouts.texts]),
        "finished": _mean([float(reason == "stop") for reason in rollouts.finish_reasons]),
    }


def _categories(prompts: Sequence[PromptRecord], of: Sequence[int]) -> list[str]:
    """Name each reply's category. Where no prompt has one, they are "all"; where some have none, these are "none"."""
    without = "none" if any(prompt.category for prompt in prompts) else "all"
    return [prompts[i].category or without for i in of]


def _by_category(
    scores_a: np.ndarray, scores_b: np.ndarray, categories: list[str], clusters: list[int]
) -> dict[str, dict[str, Any]]:
    result = {}
    for category in sorted(set(categories)):
        rows = np.array([i for i, name in enumerate(categories) if name == category])
        inside = [clusters[i] for i in rows]
        count = len(set(inside))
        difference = clustered_bootstrap(scores_a[rows] - scores_b[rows], inside).as_dict() if count > 1 else None
        result[category] = {
            "prompts": count,
            "a_score": _mean(scores_a[rows]),
            "b_score": _mean(scores_b[rows]),
            "score_difference": difference,
        }
    return result


def _row(prompt: PromptRecord, index: int, side_a: Side, side_b: Side) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": user_text(prompt.prompt), "category": prompt.category}
    for key, side in (("a", side_a), ("b", side_b)):
        verdict = side.verdicts[index]
        row[key] = {
            "text": side.rollouts.texts[index],
            "score": round(verdict.score, 4),
            "ratings": {name: round(part, 4) for name, part in verdict.parts.items()},
            "finish_reason": side.rollouts.finish_reasons[index],
        }
    return row


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))
