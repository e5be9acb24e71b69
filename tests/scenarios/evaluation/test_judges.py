"""Who judges a comparison of two policies: the built-in annotator, where it can, or any reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast import cli
from rlhf_fast.config import EvaluationConfig
from rlhf_fast.data.records import PromptRecord
from rlhf_fast.evaluation.judges import BuiltInAnnotator, RewardJudge, Verdict, judge_of, mean_parts
from rlhf_fast.evaluation.win_rate import evaluate
from rlhf_fast.feedback.simulated import WEIGHTS, SimulatedAnnotator

PROMPTS = [PromptRecord(f"q{i}", "simple") for i in range(3)]


def longer(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_the_built_in_annotator_says_what_it_is_for() -> None:
    judge = judge_of(None)
    assert isinstance(judge, BuiltInAnnotator) and isinstance(judge_of("simulated"), BuiltInAnnotator)
    assert "demo's subject" in judge.note and "simulated" in judge.name
    (verdict,) = judge.rate(PROMPTS[:1], ["I will call you tomorrow."])
    rating = SimulatedAnnotator().rate("q0", "simple", "I will call you tomorrow.")
    assert verdict.score == rating.score and verdict.parts.keys() == WEIGHTS.keys()


def test_a_prompt_without_a_category_is_refused_by_it_and_by_nobody_else() -> None:
    prompts = [*PROMPTS, PromptRecord("q", name="p.jsonl line 4"), PromptRecord("q", name="p.jsonl line 5")]
    with pytest.raises(
        ValueError, match=r"^p\.jsonl line 4: it has no category \(2 of 5 prompts .*\(--judge runs/reward"
    ):
        judge_of(None).check(prompts)
    judge_of("rule:length:3").check(prompts)


def test_any_reward_is_a_judge() -> None:
    judge = judge_of([(1.0, longer), (2.0, "rule:length:2")])
    assert isinstance(judge, RewardJudge) and judge.name == "longer + length"
    assert judge.rate(PROMPTS[:2], ["a b", "a"]) == [
        Verdict(5.0, {"longer": 3.0, "length": 1.0}),
        Verdict(2.0, {"longer": 1.0, "length": 0.5}),
    ]
    assert judge_of("rule:length:2").rate(PROMPTS[:1], ["a b"]) == [Verdict(1.0)]
    assert judge_of(judge) is judge


def test_a_reward_model_is_a_judge_that_says_how_far_it_agrees_with_people(tiny_folder: Path, tmp_path: Path) -> None:
    from rlhf_fast import models
    from rlhf_fast.config import LoRAConfig

    extra = {"heldout_agreement": {"mean": 0.75, "low": 0.7, "high": 0.8}, "score_mean": 0.0, "score_std": 1.0}
    models.save(tmp_path / "reward", *models.reward_from(tiny_folder, LoRAConfig(r=0)), extra=extra)
    judge = judge_of(tmp_path / "reward")
    assert judge.name == str(tmp_path / "reward") and judge.note.endswith("; reward agrees with 75% of its held-out "
                                                                           "comparisons")  # fmt: skip
    first, second = judge.rate(PROMPTS[:2], ["a", "b"])
    assert first.score != second.score and not first.parts
    with pytest.raises(ValueError, match=r"response 0.* 2048"):  # the model's positions
        judge.rate(PROMPTS[:1], ["x" * 3000])


def test_columns_that_a_judge_asks_for_are_checked_first() -> None:
    with pytest.raises(ValueError, match="reward math asks for the column 'answer'"):
        judge_of("rule:math").check(PROMPTS)


def test_means_are_over_what_was_given() -> None:
    verdicts = [Verdict(0.0, {"a": 1.0}), Verdict(0.0, {"a": 2.0, "b": 4.0})]
    assert mean_parts(verdicts) == {"a": 1.5, "b": 4.0}


class Fixed:
    """Scores in turn."""

    name, note = "fixed", "made up"

    def __init__(self, *scores: list[float]) -> None:
        self.scores = list(scores)

    def check(self, prompts: Any) -> None: ...

    def rate(self, prompts: Any, replies: Any) -> list[Verdict]:
        return [Verdict(score) for score in self.scores.pop(0)]


@pytest.mark.parametrize(
    ("margin", "wins", "ties", "losses"), [(0.0, 1, 1, 1), (0.2, 1, 1, 1), (0.25, 0, 2, 1), (0.6, 0, 3, 0)]
)
def test_wins_ties_and_losses_by_the_margin(
    tiny_folder: Path, margin: float, wins: int, ties: int, losses: int
) -> None:
    config = EvaluationConfig(samples_per_prompt=1, max_new_tokens=2, tie_margin=margin)
    judge = Fixed([0.5, 0.75, 0.0], [0.5, 0.5, 0.5])
    figures, rows = evaluate(tiny_folder, tiny_folder, PROMPTS, config, judge=judge)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (wins, ties, losses)
    assert figures["win_rate"]["mean"] == pytest.approx((wins + ties / 2) / 3)
    assert figures["score_difference"]["mean"] == pytest.approx(-0.25 / 3)
    assert (figures["judge"], figures["judge_note"], figures["criteria"]) == ("fixed", "made up", {})
    assert [row["a"]["score"] for row in rows] == [0.5, 0.75, 0.0]


# On the command line -------------------------------------------------------------------------------------------------


def command(tiny_folder: Path, tmp_path: Path, judge: str, row: dict[str, Any]) -> list[str]:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}", **row}) + "\n" for i in range(2)))
    words = ["evaluate", "--candidate", str(tiny_folder), "--baseline", str(tiny_folder)]
    words += ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")]
    words += ["--evaluation.max_new_tokens", "2"]
    return [*words, *(["--judge", judge] if judge else [])]


def test_a_judge_is_chosen_and_named_on_the_screen_and_in_the_figures(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.py").write_text("def count(prompts, responses):\n    return [len(r) for r in responses]\n")
    judge = f"1*{tmp_path}/my.py:count, 0.5*rule:length:4"
    assert cli.main(command(tiny_folder, tmp_path, judge, {})) == 0
    captured = capsys.readouterr()
    assert f"Judge: {judge}: a policy that was trained on this very reward" in captured.err
    assert f"judge: {judge}\njudge note: a policy that" in captured.out
    assert f"The judge is {judge}: a policy" in (tmp_path / "out" / "report.html").read_text()
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["judge"] == judge and figures["criteria"].keys() == {"count", "length"}


def test_the_built_in_judge_says_on_the_screen_what_it_is_for(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(tiny_folder, tmp_path, "", {"category": "simple"})) == 0
    assert (
        "Judge: simulated annotator, without error: its rule is made for the demo's subject" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("", "p.jsonl line 1: it has no category (2 of 2 prompts have none)"),
        ("rule:maths", "there is no rule 'maths'"),
        ("runs/none", "judge: there is no folder runs/none"),
        ("smollm2-135m", "judge: smollm2-135m is a language model, not a reward model"),
        ("rule:math", "asks for the column 'answer'"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str, words: str
) -> None:
    assert cli.main(command(tiny_folder, tmp_path, judge, {})) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
