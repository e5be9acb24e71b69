"""The whole loop in one run folder: SFT -> sampled pairs -> comparisons -> reward model -> PPO -> evaluation -> report.

Each phase has a folder of its own, finished when its `result.json` is there. Run again with the same settings, the
pipeline goes on after the last finished phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig

from rlhf_fast import models
from rlhf_fast.config import DemoConfig, settings
from rlhf_fast.data.batches import shuffled
from rlhf_fast.data.records import PromptRecord, prompt_text, read_demonstrations, read_prompts
from rlhf_fast.data.rows import Row
from rlhf_fast.data.templates import Prompt
from rlhf_fast.evaluation.report import write_report
from rlhf_fast.evaluation.win_rate import evaluate, write_evaluation
from rlhf_fast.feedback.simulated import SimulatedAnnotator
from rlhf_fast.models.byte_tokenizer import VOCAB_SIZE
from rlhf_fast.rewards.measures import AIM
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.runs.claim import Claim
from rlhf_fast.runs.files import require_space, write_atomic, write_jsonl
from rlhf_fast.runs.folder import RunFolder, is_finished, read_result
from rlhf_fast.runs.terminal import bar_updater, progress_bar
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

SYSTEM = "You answer clients of a design agency."  # stands before every prompt of the demo
OF_TINY = (  # whatever the reward model's verdict is
    "a random model learns no preferences, so this reward model is worth nothing; PPO is trained on it all the same, "
    "only to show how it goes (ppo.min_reward_agreement is 0 here)"
)
OF_JUDGE = (
    "The replies of the evaluation were scored by the simulated annotator, a written rule that knows nothing of what "
    "people preferred here: its win rate is not theirs."
)
PHASES = ("sft", "comparisons", "reward", "ppo", "evaluation")


def _print(line: str) -> None:
    print(line, flush=True)  # a link is of no use in a buffer


def run_demo(config: DemoConfig, say: Callable[[str], None] = _print) -> Path:
    """Run what is not yet finished of the demo and write `report.html`; returns its path.

    Raises:
        ValueError: the folder holds a run with other settings; the message lists them. Or more pairs are to be judged
            than there will be.
        FileExistsError: it holds something else, or is in use.
        OSError: the disk is too small, before anything is computed.
    """
    out = Path(config.out)
    if not (out / "config.yaml").exists():
        require_space(out, 100_000_000 if config.tiny else 1_000_000_000, "the demo")
    run = _Demo(config, out, say)
    with Claim(out, "demo"):
        _start(out, config)
        return _run_phases(run, say)


def _run_phases(run: _Demo, say: Callable[[str], None]) -> Path:
    config, out = run.config, run.out
    phases = (run.sft, run.comparisons, run.reward, run.ppo, run.evaluation)
    for number, (name, phase) in enumerate(zip(PHASES, phases, strict=True), start=1):
        if is_finished(out / name):
            say(f"[{number}/{len(PHASES)}] {name}: finished earlier")
            continue
        say(f"[{number}/{len(PHASES)}] {name}")
        phase()
        result = read_result(out / name)
        say(f"      {result['seconds']:.0f} s; {_brief(result['summary'])}")
        if name == "reward" and config.human:
            say(f"      {_of_people(result['summary'], config.ppo.min_reward_agreement)}")
        if name == "reward" and config.tiny:
            say(f"      {OF_TINY}")
        elif name == "reward" and result["summary"].get("heldout_accuracy", {"mean": 0.0})["mean"] < AIM:
            say(f"      held-out agreement is below the {AIM:.0%} worth aiming at: more comparisons would help")
    if config.human:
        say(OF_JUDGE)
    report = write_report(out)
    say(f"Report: {report}")
    return report


class _Demo:
    """The phases of one demo run, each reading what the ones before it have written."""

    def __init__(self, config: DemoConfig, out: Path, say: Callable[[str], None] = _print) -> None:
        self.config, self.out, self.say = config, out, say
        files = resources.files("rlhf_fast.demo")
        prompts = Path(str(files / "prompts.jsonl"))
        self.training_prompts = [_with_system(p) for p in read_prompts(prompts, split="train")]
        self.evaluation_prompts = [_with_system(p) for p in read_prompts(prompts, split="eval")]
        most = (config.comparisons.prompts or len(self.training_prompts)) * math.comb(
            config.comparisons.samples_per_prompt, 2
        )
        if config.human and config.pairs > most:
            raise ValueError(
                f"pairs: {config.pairs}; the replies make {most} pairs at most; raise comparisons.prompts (of "
                f"{len(self.training_prompts)}) or comparisons.samples_per_prompt"
            )
        self.demonstrations = [
            {"prompt": _messages(d.prompt), "completion": d.completion}
            for d in read_demonstrations(Path(str(files / "demonstrations.jsonl")))
        ]

    def sft(self) -> None:
        model = self.config.model
        if self.config.tiny:
            model = str(self.out / "base")
            if not (self.out / "base").exists():
                models.save(self.out / "base", *models.load(tiny_model()))
        SFTTrainer(model, self.demonstrations, self.out / "sft", self.config.sft).train()

    def comparisons(self) -> None:
        """Sample replies to training prompts from the SFT policy and let people or the simulated annotator compare."""
        config = self.config.comparisons
        prompts = shuffled(self.training_prompts, config.seed)[: config.prompts or None]
        with RunFolder(self.out / "comparisons", "comparisons", settings.to_yaml(config)) as run:
            rows, summary = (self._by_people if self.config.human else self._simulated)(prompts, run.path)
            write_jsonl(run.path / "comparisons.jsonl", rows)
            run.finish(summary)

    def _simulated(self, prompts: list[PromptRecord], _: Path) -> tuple[list[Row], dict[str, Any]]:
        annotator = SimulatedAnnotator(self.config.comparisons.annotator)
        replies, finished = self._sample(prompts)
        rows = [
            comparison.as_dict()
            for prompt, texts in zip(prompts, replies, strict=True)
            for comparison in annotator.compare_all(prompt.prompt, prompt.category, texts)
        ]
        return rows, {
            "prompts": len(prompts),
            "replies": sum(map(len, replies)),
            "comparisons": len(rows),
            "annotator": annotator.name,
            "finished": finished,
        }

    def _by_people(self, prompts: list[PromptRecord], folder: Path) -> tuple[list[Row], dict[str, Any]]:
        """Comparisons by people, kept in `folder`/votes.db as they are made; ties are left out."""
        from rlhf_fast.feedback import exchange  # these need the extra `annotate`
        from rlhf_fast.feedback.app.session import ask
        from rlhf_fast.feedback.progress import LEAST
        from rlhf_fast.feedback.store import Plan, Store

        wanted = self.config.pairs
        store = Store(folder / "votes.db")
        if not store.setting("sampled"):
            store.set_plan(Plan(judgements=1, gold_share=0.0, repeat_share=0.0, seed=self.config.comparisons.seed))
            replies, finished = self._sample(prompts)
            for prompt, texts in zip(prompts, replies, strict=True):
                # No database holds a null character, as random bytes have.
                usable = [text for text in dict.fromkeys(texts) if text.strip() and "\0" not in text]
                if len(usable) > 1:
                    made = {"checkpoint": "sft", "seed": self.config.comparisons.seed}
                    store.add_prompt(prompt.prompt, [{"text": text, **made} for text in usable], prompt.category)
            store.set_setting("sampled", {"replies": sum(map(len, replies)), "finished": finished})
        found = ask(store, folder, wanted, self.config.port, lambda line: self.say(f"      {line}"))
        rows = exchange.comparisons(store, heldout=0.0, splits=False)
        people = {vote["annotator"] for row in rows for vote in row["provenance"]["votes"]}
        sampled = store.setting("sampled")
        store.close()
        if len(rows) < LEAST:
            raise ValueError(
                f"comparisons: {len(rows)} pairs have a better side, of {found.judged} judged, and no pair is left; at "
                f"least {LEAST} are needed. Take another --out and more comparisons.prompts"
            )
        if found.judged < wanted:
            self.say(f"      no pair is left: going on with {found.judged} of {wanted}")
        return rows, {
            "prompts": len(prompts),
            **sampled,
            "judged": found.judged,
            "about_equal": found.equal,
            "seconds_a_pair": found.seconds,
            "comparisons": len(rows),
            "annotator": f"people ({len(people)})",
        }

    def _sample(self, prompts: list[PromptRecord]) -> tuple[list[list[str]], float]:
        """(replies to each prompt, share of them that ended by themselves), from the SFT policy."""
        config = self.config.comparisons
        model, tokenizer = models.load(self.out / "sft", merged=True)
        params = SamplingParams(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        with progress_bar(len(prompts) * params.n, "comparisons", "reply") as bar:
            rollouts = Generator(model, tokenizer).generate(prompts, params, bar_updater(bar))
        replies = [rollouts.texts[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]
        return replies, sum(reason == "stop" for reason in rollouts.finish_reasons) / len(rollouts)

    def reward(self) -> None:
        comparisons = self.out / "comparisons" / "comparisons.jsonl"
        RewardTrainer(self.out / "sft", comparisons, self.out / "reward", self.config.reward).train()

    def ppo(self) -> None:
        PPOTrainer(
            self.out / "sft", self.out / "reward", self.training_prompts, self.out / "ppo", self.config.ppo
        ).train()

    def evaluation(self) -> None:
        """PPO against SFT on prompts that nothing was trained on."""
        run = RunFolder(self.out / "evaluation", "evaluation", settings.to_yaml(self.config.evaluation))
        figures, rows = evaluate(
            self.out / "ppo", self.out / "sft", self.evaluation_prompts, self.config.evaluation, names=("ppo", "sft")
        )
        write_evaluation(run, figures, rows)


def tiny_model() -> LlamaConfig:
    """A Llama of two layers for the byte tokenizer."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def _start(out: Path, config: DemoConfig) -> None:
    """Write the settings into the demo's folder, or see that those of an earlier start are the same.

    The port of the page may differ, and until enough is judged how much that is.
    """
    file = out / "config.yaml"
    free = ("port",) if is_finished(out / "comparisons") else ("port", "pairs")
    if file.exists():
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        earlier = yaml.safe_dump({**before, "out": config.out})
        defaults = settings.flatten(settings.to_dict(DemoConfig()))
        if changed := settings.changes(earlier, settings.to_yaml(config), free, defaults):
            raise ValueError(f"--out: {out} was started with other settings ({changed}); choose another --out")
    write_atomic(file, settings.to_yaml(config))


def _with_system(record: PromptRecord) -> PromptRecord:
    return replace(record, prompt=_messages(record.prompt))


def _messages(prompt: Prompt) -> Prompt:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt_text(prompt)}]


def _of_people(summary: dict[str, Any], gate: float) -> str:
    """What a reward model of few human comparisons is worth, in words."""
    agreement = summary.get("heldout_accuracy")
    measured = "nothing was held out to measure it on"
    if agreement:
        mean, low, high = (f"{agreement[name]:.0%}" for name in ("mean", "low", "high"))
        measured = f"on {summary['heldout']} others it agrees with them on {mean}; {low} to {high} may be true"
    then = f"PPO starts from {gate:.0%} on" if gate else "PPO is trained on it all the same, to show how it goes"
    return f"learned from {summary['comparisons']} pairs that people judged; {measured}. {then}"


def _brief(summary: dict[str, Any]) -> str:
    """A summary on one line."""
    parts = []
    for name, value in summary.items():
        if name in ("notes", "judge_note") or name.endswith("_before"):  # sentences; they stand in the report
            continue
        if isinstance(value, dict):
            value = f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        elif isinstance(value, float):
            value = f"{value:.3f}"
        before = summary.get(f"{name}_before")
        parts.append(f"{name} {value}" if before is None else f"{name} {before:.3f} -> {value}")
    return ", ".join(parts)
