"""The verb evaluate: the win rate of one policy against another."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_fast.cli import inputs
from rlhf_fast.cli.told import tell
from rlhf_fast.config import EvaluationConfig
from rlhf_fast.runs.folder import RunFolder, check_place


@dataclass(frozen=True)
class EvaluateCommand:
    """Win rate of policy a against policy b on held-out prompts, by a judge of your choice.

    The judge scores every reply, and the higher score wins. `simulated` is the annotator of the demo, whose rule is
    made for replies of an agency to its clients. For anything else give a reward model, a rule, a Python function or a
    URL, in the forms of docs/rewards.md; best is one that neither policy was trained on.

      rlhf-fast evaluate --a runs/ppo --b runs/sft --prompts heldout.jsonl --judge runs/other-reward --out runs/compared
    """

    a: str  # folder, run, hub name or smollm2-135m
    b: str  # the same; also the reference that the KL is measured to
    prompts: str  # {"prompt"} a line, with "category" for the simulated judge, and columns that a rule asks for
    out: str  # folder of the run
    judge: str = "simulated"  # or runs/reward, rule:NAME, FILE.py:function, a URL, or a list "1*..., 0.5*..."
    split: str = ""  # only the prompts with this "split"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def run(command: EvaluateCommand) -> None:
    judged = {} if command.judge == "simulated" else {"judge": command.judge}
    inputs.check({"a": command.a, "b": command.b}, {"prompts": command.prompts}, judged)
    check_place(command.out, "evaluation")
    from rlhf_fast.config.settings import to_yaml
    from rlhf_fast.data.records import read_prompts
    from rlhf_fast.evaluation.judges import judge_of
    from rlhf_fast.evaluation.report import write_report
    from rlhf_fast.evaluation.win_rate import evaluate, require_several, write_evaluation

    prompts = read_prompts(command.prompts, command.split or None)
    require_several(prompts)
    judge = judge_of(command.judge)  # before the folder is made: a wrong one leaves nothing
    judge.check(prompts)
    print(f"Judge: {judge.name}: {judge.note}", file=sys.stderr)
    with RunFolder(command.out, "evaluation", to_yaml(command)) as folder:
        figures, rows = evaluate(command.a, command.b, prompts, command.evaluation, judge=judge)
        result = write_evaluation(folder, figures, rows)
    write_report(Path(command.out))
    tell(result, command.out)
