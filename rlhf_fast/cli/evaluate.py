"""The verb evaluate: the win rate of one policy against another."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_fast.cli import inputs
from rlhf_fast.cli.told import tell
from rlhf_fast.config import EvaluationConfig
from rlhf_fast.config.settings import ConfigError
from rlhf_fast.runs.folder import RunFolder, check_place

DEMO_GOLDEN = Path(__file__).resolve().parents[1] / "demo" / "golden.jsonl"


@dataclass(frozen=True)
class EvaluateCommand:
    """Win rate of a candidate against a baseline on held-out prompts, by a judge of your choice.

    The judge scores every reply, and the higher score wins. `simulated` is the annotator of the demo, whose rule is
    made for replies of an agency to its clients. For anything else give a reward model, a rule, a Python function or a
    URL, in the forms of docs/rewards.md; best is one that neither policy was trained on.

      rlhf-fast evaluate --candidate runs/ppo --baseline runs/sft --prompts heldout.jsonl --judge runs/other-reward \
        --out runs/compared

    With --golden the prompts have checks of their own (docs/golden.md), and the exit code decides: 0 better or equal, 1
    regression, 3 not enough evidence; 2 for wrong usage or a broken file.

      rlhf-fast evaluate --candidate runs/ppo --baseline runs/sft --golden golden.jsonl --out runs/compared
    """

    candidate: str  # folder, run, hub name or smollm2-135m
    baseline: str  # the same; also the reference that the KL is measured to
    out: str  # folder of the run
    prompts: str = ""  # {"prompt"} a line, with "category" for the simulated judge, and columns that a rule asks for
    golden: str = ""  # in place of prompts: {"id", "prompt", "category", "checks"} a line; demo for that of the demo
    trained_on: str = ""  # files of prompts with commas between; a golden prompt that is in them, or nearly, is refused
    margin: float = 0.05  # of a golden set: a share of right replies that is smaller by so much still counts as equal
    judge: str = "simulated"  # or runs/reward, rule:NAME, FILE.py:function, a URL, or a list "1*..., 0.5*..."
    split: str = ""  # only the prompts with this "split"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def run(command: EvaluateCommand) -> int:
    if bool(command.prompts) == bool(command.golden):
        raise ConfigError("prompts, golden: expected one of them: --prompts FILE with a judge, or --golden FILE")
    if command.golden and (command.judge != "simulated" or command.split):
        raise ConfigError("golden: it is judged by its own checks, all of it; leave --judge and --split out")
    if not 0 <= command.margin < 1:
        raise ConfigError(f"margin: {command.margin:g} came; expected a share from 0 to below 1, such as 0.05")
    if not command.golden and command.margin != EvaluateCommand.margin:
        raise ConfigError("margin: it is of a golden set; give --golden FILE, too")
    judged = {} if command.judge == "simulated" else {"judge": command.judge}
    golden = str(DEMO_GOLDEN) if command.golden == "demo" else command.golden
    trained = {f"trained_on ({name})": name for name in command.trained_on.split(",") if name}
    files = {"golden": golden} if golden else {"prompts": command.prompts}
    inputs.check({"candidate": command.candidate, "baseline": command.baseline}, {**files, **trained}, judged)
    check_place(command.out, "evaluation")
    from rlhf_fast.config.settings import to_yaml
    from rlhf_fast.data.records import read_prompts
    from rlhf_fast.evaluation import golden as golden_set
    from rlhf_fast.evaluation.judges import Judge, judge_of
    from rlhf_fast.evaluation.report import write_report
    from rlhf_fast.evaluation.win_rate import evaluate, require_several, write_evaluation

    config, told = command.evaluation, {}
    judge: Judge
    if golden:
        prompts, judge = golden_set.read_golden(golden), golden_set.GoldenJudge()
        told = {"golden": command.golden, "golden_hash": golden_set.fingerprint(prompts)}
    else:
        prompts, judge = read_prompts(command.prompts, command.split or None), judge_of(command.judge)
    require_several(prompts)
    judge.check(prompts)  # before the folder is made: a wrong one leaves nothing
    for name in trained.values():
        golden_set.refuse_trained_on(prompts, read_prompts(name))
    print(f"Judge: {judge.name}: {judge.note}", file=sys.stderr)
    if golden:
        least = golden_set.detectable(len(prompts), config.samples_per_prompt)
        print(
            f"{len(prompts)} prompts, replies to each: {config.samples_per_prompt}. They show a difference of "
            f"{100 * least:.1f} points four times in five; equal is a loss of at most {100 * command.margin:g}",
            file=sys.stderr,
        )
    code = 0
    with RunFolder(command.out, "evaluation", to_yaml(command)) as folder:
        names = ("candidate", "baseline")
        figures, rows = evaluate(command.candidate, command.baseline, prompts, config, names, judge)
        if golden:
            decision = golden_set.decide(golden_set.difference_of(rows), command.margin)
            code, told["decision"] = decision.code, decision.words
        result = write_evaluation(folder, {**figures, **told}, rows, told)
    write_report(Path(command.out))
    tell(result, command.out)
    return code
