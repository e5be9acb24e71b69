"""Every figure of a comparison of two policies, against numbers made by hand from fixed verdicts and plain logits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast import cli, models
from rlhf_fast.config import EvaluationConfig, tiny_demo
from rlhf_fast.data.records import PromptRecord
from rlhf_fast.data.text_metrics import repetition, words
from rlhf_fast.evaluation.judges import Verdict
from rlhf_fast.evaluation.win_rate import evaluate, write_evaluation
from rlhf_fast.pipeline import _Demo
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.statistics.intervals import clustered_bootstrap, clustered_share

PROMPTS = [
    PromptRecord("first", "simple"),
    PromptRecord([{"role": "user", "content": "second"}], "hard"),
    PromptRecord("third", "hard"),
    PromptRecord("fourth", "odd"),
    PromptRecord("fifth", "simple"),
]
CLUSTERS = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # two samples of each
# Two wins, a tie by a hair over the margin's rounding on either side, equal scores, losses.
SCORES_A = [0.90, 0.80, 0.70, 0.20, 0.50, 0.123456, 1.25, 0.30, 0.00, 0.40]
SCORES_B = [0.50, 0.70, 0.80, 0.60, 0.50, 0.723456, 0.25, 0.60, 0.05, 0.55]
OUTCOMES = [1.0, 0.5, 0.5, 0.0, 0.5, 0.0, 1.0, 0.0, 0.5, 0.0]  # with a margin of 0.1
CONFIG = EvaluationConfig(samples_per_prompt=2, max_new_tokens=24, temperature=0.8, tie_margin=0.1, seed=5)


class Table:
    """Says of the replies of the first policy that it is asked about SCORES_A, and of the next SCORES_B."""

    name, note = "a table", "says what it was told to"

    def __init__(self) -> None:
        self.asked: list[tuple[list[PromptRecord], list[str]]] = []

    def check(self, prompts: Any) -> None: ...

    def rate(self, prompts: Any, replies: Any) -> list[Verdict]:
        self.asked.append((list(prompts), list(replies)))
        scores = (SCORES_A, SCORES_B)[len(self.asked) - 1]
        only = ("only_a", "only_b")[len(self.asked) - 1]
        return [
            Verdict(score, {"half": score / 2, only: 1.0, **({"rare": float(i)} if i in (2, 5) else {})})
            for i, score in enumerate(scores)
        ]


@pytest.fixture(scope="module")
def policies(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """a and b, both some way from a random model, and from each other."""
    found = []
    for name, seed, letters, pull in (("a", 3, " a", 0.21), ("b", 4, " aeo", 0.16)):
        model, tokenizer = models.load(tiny_folder)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
            # What all tokens have in common, and some have more of: replies of words that come again, and ends.
            weight = model.get_input_embeddings().weight
            weight += 0.1
            weight[tokenizer(letters, add_special_tokens=False)["input_ids"]] += pull
            weight[tokenizer.eos_token_id] += pull - 0.04
        found.append(tmp_path_factory.mktemp("policies") / name)
        models.save(found[-1], model, tokenizer)
    return found[0], found[1]


def samples(folder: Path, config: EvaluationConfig = CONFIG) -> Rollouts:
    """What a policy says to the prompts, each with samples of its own."""
    params = SamplingParams(
        n=config.samples_per_prompt,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    return Generator(*models.load(folder)).generate(PROMPTS, params)


@torch.no_grad()
def mean_kl(a: Path, b: Path, said: Rollouts, temperature: float) -> float:
    """Of whole responses: the sum of log a - log b over their tokens, in float64, from the logits of plain models."""
    both = [AutoModelForCausalLM.from_pretrained(folder).double().eval() for folder in (a, b)]
    total = 0.0
    for example in said.examples():
        ids = torch.tensor([[*example.prompt, *example.response]])
        log_a, log_b = (torch.log_softmax(model(input_ids=ids).logits[0] / temperature, -1) for model in both)
        for place, token in enumerate(example.response, start=len(example.prompt) - 1):
            total += float(log_a[place, token] - log_b[place, token])
    return total / len(said)


@pytest.fixture(scope="module")
def compared(policies: tuple[Path, Path]) -> tuple[Table, dict[str, Any], list[dict[str, Any]]]:
    judge = Table()
    return judge, *evaluate(*policies, PROMPTS, CONFIG, names=("new", "old"), judge=judge)


@pytest.fixture(scope="module")
def said(policies: tuple[Path, Path]) -> tuple[Rollouts, Rollouts]:
    return samples(policies[0]), samples(policies[1])


Compared = tuple[Table, dict[str, Any], list[dict[str, Any]]]


def test_the_judge_reads_the_replies_of_a_and_then_those_of_b_beside_their_prompts(
    compared: Compared, said: tuple[Rollouts, Rollouts]
) -> None:
    asked = [PROMPTS[i] for i in CLUSTERS]
    assert compared[0].asked == [(asked, said[0].texts), (asked, said[1].texts)]
    assert said[0].texts != said[1].texts


def test_the_difference_is_a_less_b_and_wins_and_ties_are_as_counted_by_hand(compared: Compared) -> None:
    _, figures, _ = compared
    difference = [a - b for a, b in zip(SCORES_A, SCORES_B, strict=True)]
    assert figures["score_difference"] == clustered_bootstrap(difference, CLUSTERS).as_dict()
    assert figures["score_difference"]["mean"] == pytest.approx(-0.01)
    assert figures["win_rate"] == clustered_share(OUTCOMES, CLUSTERS).as_dict()
    assert figures["win_rate"]["mean"] == pytest.approx(0.4)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 4, 4)
    alone = range(len(OUTCOMES))  # as if samples of one prompt were independent
    assert figures["win_rate"] != clustered_share(OUTCOMES, alone).as_dict()
    assert figures["score_difference"] != clustered_bootstrap(difference, alone).as_dict()


def test_a_margin_of_nothing_ties_equal_scores_alone(policies: tuple[Path, Path]) -> None:
    config = EvaluationConfig(samples_per_prompt=2, max_new_tokens=1)
    figures, _ = evaluate(*policies, PROMPTS, config, judge=Table())
    assert (figures["wins"], figures["ties"], figures["losses"], figures["tie_margin"]) == (3, 1, 6, 0.0)


def test_the_figures_say_who_was_compared_by_whom_and_on_what(compared: Compared) -> None:
    _, figures, _ = compared
    told = {"judge": "a table", "judge_note": "says what it was told to", "tie_margin": 0.1, "a": "new", "b": "old"}
    assert {name: figures[name] for name in told} == told
    assert (figures["prompts"], figures["samples_per_prompt"]) == (5, 2)
    means = [sum(scores) / 20 for scores in (SCORES_A, SCORES_B)]  # of half the scores
    assert figures["criteria"] == {
        "half": pytest.approx({"a": means[0], "b": means[1]}),
        "rare": {"a": 3.5, "b": 3.5},  # of those that have it; what one policy's verdicts alone have is left out
    }
    known = {
        "score_difference", "win_rate", "wins", "ties", "losses", "prompts", "samples_per_prompt", "criteria",
        "by_category", "a_metrics", "b_metrics",
    }  # fmt: skip
    assert figures.keys() == known | told.keys()


def test_the_metrics_of_a_side_are_those_of_its_own_replies(
    compared: Compared, said: tuple[Rollouts, Rollouts], policies: tuple[Path, Path]
) -> None:
    _, figures, _ = compared
    kl = mean_kl(*policies, said[0], 0.8)
    assert kl > 0.5 and mean_kl(*policies, said[1], 0.8) < -0.5  # on its own samples a is the likelier
    for side, scores, rollouts, expected_kl in (("a", SCORES_A, said[0], kl), ("b", SCORES_B, said[1], 0.0)):
        texts = rollouts.texts
        ends = [reason == "stop" for reason in rollouts.finish_reasons]
        assert 0 < sum(ends) < 10, "choose policies that sometimes end"
        metrics = figures[f"{side}_metrics"]
        assert metrics.keys() == {"score", "kl", "tokens", "words", "repetition", "finished"}
        assert metrics["score"] == pytest.approx(sum(scores) / 10)
        assert metrics["kl"] == pytest.approx(expected_kl, rel=1e-4)
        assert metrics["tokens"] == sum(len(example.response) for example in rollouts.examples()) / 10
        assert metrics["finished"] == sum(ends) / 10
        assert metrics["words"] == pytest.approx(sum(len(words(text)) for text in texts) / 10)
        assert metrics["repetition"] == pytest.approx(sum(map(repetition, texts)) / 10)
    for name in ("words", "repetition", "tokens", "finished"):
        assert figures["a_metrics"][name] != figures["b_metrics"][name], name


def test_at_temperature_0_the_kl_is_that_at_1(policies: tuple[Path, Path]) -> None:
    config = EvaluationConfig(samples_per_prompt=1, max_new_tokens=6, temperature=0.0)
    judge = Table()
    judge.rate = lambda prompts, replies: [Verdict(float(len(text))) for text in replies]  # type: ignore[method-assign]
    figures, _ = evaluate(*policies, PROMPTS, config, judge=judge)
    expected = mean_kl(*policies, samples(policies[0], config), 1.0)
    assert figures["a_metrics"]["kl"] == pytest.approx(expected, rel=1e-4) and abs(expected) > 0.1


def test_every_category_has_the_figures_of_its_own_rows(compared: Compared) -> None:
    found = compared[1]["by_category"]
    assert list(found) == ["hard", "odd", "simple"]
    rows = {"hard": [2, 3, 4, 5], "odd": [6, 7], "simple": [0, 1, 8, 9]}
    for category, numbers in rows.items():
        a, b = ([scores[i] for i in numbers] for scores in (SCORES_A, SCORES_B))
        clusters = [CLUSTERS[i] for i in numbers]
        difference = [x - y for x, y in zip(a, b, strict=True)]
        assert found[category] == {
            "prompts": len(set(clusters)),
            "a_score": pytest.approx(np.mean(a)),
            "b_score": pytest.approx(np.mean(b)),
            "score_difference": None if category == "odd" else clustered_bootstrap(difference, clusters).as_dict(),
        }


def test_a_prompt_that_comes_twice_is_one(tiny_folder: Path) -> None:
    """As if it had twice as many samples, which say no more of other prompts."""
    prompts = [PromptRecord("first"), PromptRecord("second"), PromptRecord("first"), *PROMPTS[3:]]
    config = EvaluationConfig(samples_per_prompt=2, max_new_tokens=1, tie_margin=0.1)
    figures, rows = evaluate(tiny_folder, tiny_folder, prompts, config, judge=Table())
    clusters = [0, 0, 1, 1, 0, 0, 2, 2, 3, 3]
    difference = [a - b for a, b in zip(SCORES_A, SCORES_B, strict=True)]
    assert figures["score_difference"] == clustered_bootstrap(difference, clusters).as_dict()
    assert figures["win_rate"] == clustered_share(OUTCOMES, clusters).as_dict()
    assert figures["prompts"] == 4 and figures["by_category"]["none"]["prompts"] == 2
    assert [row["prompt"] for row in rows] == ["first"] * 2 + ["second"] * 2 + ["first"] * 2 + ["fourth"] * 2 + [
        "fifth"
    ] * 2


@pytest.mark.parametrize(
    ("categories", "expected"),
    [("-----", {"all": 5}), ("s--hh", {"hard": 2, "none": 2, "simple": 1}), ("a-aaa", {"all": 4, "none": 1})],
)
def test_prompts_without_a_category_are_all_or_apart_from_those_with_one(
    categories: str, expected: dict[str, int], tiny_folder: Path
) -> None:
    names = {"s": "simple", "h": "hard", "a": "all", "-": ""}
    prompts = [PromptRecord(f"q{i}", names[letter]) for i, letter in enumerate(categories)]
    config = EvaluationConfig(samples_per_prompt=2, max_new_tokens=1)
    figures, _ = evaluate(tiny_folder, tiny_folder, prompts, config, judge=Table())
    assert {name: row["prompts"] for name, row in figures["by_category"].items()} == expected


def test_a_row_has_the_two_replies_to_a_prompt_with_what_was_said_of_each(
    compared: Compared, said: tuple[Rollouts, Rollouts]
) -> None:
    _, _, rows = compared
    asked = ["first", "second", "third", "fourth", "fifth"]
    expected = []
    for i, of in enumerate(CLUSTERS):
        row: dict[str, Any] = {"prompt": asked[of], "category": PROMPTS[of].category}
        for side, scores, rollouts in (("a", SCORES_A, said[0]), ("b", SCORES_B, said[1])):
            ratings = {"half": round(scores[i] / 2, 4), f"only_{side}": 1.0}
            row[side] = {
                "text": rollouts.texts[i],
                "score": round(scores[i], 4),
                "ratings": {**ratings, **({"rare": float(i)} if i in (2, 5) else {})},
                "finish_reason": rollouts.finish_reasons[i],
            }
        expected.append(row)
    assert rows == expected


def test_what_is_written_is_what_was_found(compared: Compared, tmp_path: Path) -> None:
    _, figures, rows = compared
    with RunFolder(tmp_path, "evaluation", "") as run:
        result = write_evaluation(run, figures, rows)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == figures
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == rows
    names = ("judge", "judge_note", "score_difference", "win_rate", "wins", "ties", "losses")
    assert result["summary"] == {**{name: figures[name] for name in names}, "kl": figures["a_metrics"]["kl"]}
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_the_verb_compares_the_candidate_with_the_baseline(policies: tuple[Path, Path], tmp_path: Path) -> None:
    """The judge of this test says how many spaces there are, and those of a reply of a are found by themselves."""
    (tmp_path / "my.py").write_text(
        "def spaces(prompts, responses):\n    return [float(r.count(' ')) for r in responses]\n"
    )
    asked = [{"prompt": record.prompt, "category": record.category, "split": "test"} for record in PROMPTS]
    extra = {"prompt": "not asked", "category": "", "split": "train"}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [extra, *asked]))
    words = ["evaluate", "--candidate", policies[0], "--baseline", policies[1], "--prompts", tmp_path / "p.jsonl"]
    words += ["--split", "test", "--judge", f"{tmp_path}/my.py:spaces", "--out", tmp_path / "out"]
    for name in ("samples_per_prompt", "max_new_tokens", "temperature", "tie_margin", "seed"):
        words += [f"--evaluation.{name}", getattr(CONFIG, name)]
    assert cli.main([str(word) for word in words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    a, b = samples(policies[0]), samples(policies[1])
    assert [row["a"]["text"] for row in rows] == a.texts and [row["b"]["text"] for row in rows] == b.texts
    assert a.texts != b.texts
    difference = [float(x.count(" ") - y.count(" ")) for x, y in zip(a.texts, b.texts, strict=True)]
    assert figures["score_difference"] == clustered_bootstrap(difference, CLUSTERS).as_dict()
    assert figures["score_difference"]["mean"] != 0 and (figures["a"], figures["b"]) == ("candidate", "baseline")
    assert figures["a_metrics"]["kl"] == pytest.approx(mean_kl(*policies, a, CONFIG.temperature), rel=1e-4)


def test_the_demo_compares_ppo_with_sft(policies: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny_demo()
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, max_new_tokens=4))
    for name, folder in zip(("ppo", "sft"), policies, strict=True):
        shutil.copytree(folder, tmp_path / name)
    demo = _Demo(config, tmp_path)
    demo.evaluation()
    figures = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert (figures["a"], figures["b"], figures["prompts"]) == ("ppo", "sft", 50)
    params = SamplingParams(n=config.evaluation.samples_per_prompt, max_new_tokens=4, seed=config.evaluation.seed)
    for side, folder in zip("ab", policies, strict=True):
        texts = Generator(*models.load(folder)).generate(demo.evaluation_prompts, params).texts
        assert [row[side]["text"] for row in rows] == texts
    assert any(row["a"]["text"] != row["b"]["text"] for row in rows)


def test_a_single_prompt_is_refused_before_anything_is_loaded_or_written(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^prompts: 1 came; expected at least 2, as the intervals say"):
        evaluate(tmp_path / "no model", tmp_path / "no model", PROMPTS[:1] * 3, judge=Table())
    (tmp_path / "p.jsonl").write_text('{"prompt": "q", "category": "simple"}\n')
    words = ["evaluate", "--candidate", str(tiny_folder), "--baseline", str(tiny_folder)]
    words += ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "prompts: 1 came; expected at least 2" in capsys.readouterr().err and not (tmp_path / "out").exists()
