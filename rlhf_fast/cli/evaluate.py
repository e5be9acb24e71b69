"""The verb evaluate: the win rate of one policy against another."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_fast.cli import inputs
from rlhf_fast.cli.told import tell
from rlhf_fast.config import EvaluationConfig


@dataclass(frozen=True)
class EvaluateCommand:
    """Win rate of policy a against policy b on held-out prompts, by the simulated annotator."""

    a: str  # folder, run, hub name or smollm2-135m
    b: str  # the same; also the reference that the KL is measured to
    prompts: str  # {"prompt", "category"} a line
    out: str  # folder of the run
    split: str = ""  # only the prompts with this "split"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def run(command: EvaluateCommand) -> None:
    inputs.check({"a": command.a, "b": command.b}, {"prompts": command.prompts})
    from rlhf_fast.data.records import read_prompts
    from rlhf_fast.evaluation.win_rate import evaluate, write_evaluation
    from rlhf_fast.run_folder import RunFolder
    from rlhf_fast.settings import to_yaml

    prompts = read_prompts(command.prompts, command.split or None)
    folder = RunFolder(command.out, "evaluation", to_yaml(command))
    figures, rows = evaluate(command.a, command.b, prompts, command.evaluation)
    tell(write_evaluation(folder, figures, rows), command.out)
