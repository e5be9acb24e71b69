"""Every verb of the command line, one after the other on a tiny model, as a person would call them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from rlhf_fast.cli import main


def rows(path: Path, items: list[dict]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def test_the_verbs_make_a_policy_together(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demonstrations = rows(tmp_path / "sft.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}."} for i in range(6)])
    comparisons = rows(
        tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f"a{i}.", "rejected": "b"} for i in range(8)]
    )
    prompts = rows(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}", "category": "simple"} for i in range(4)])
    runs = {name: str(tmp_path / name) for name in ("sft", "reward", "dpo", "ppo", "evaluation")}
    tiny = "--model", str(tiny_folder)
    assert main(["sft", *tiny, "--data", demonstrations, "--out", runs["sft"], "--sft.epochs", "1"]) == 0
    assert main(["reward", "--model", runs["sft"], "--data", comparisons, "--out", runs["reward"]]) == 0
    assert "held-out comparisons" in (tmp_path / "reward" / "report.html").read_text()
    assert main(["dpo", "--model", runs["sft"], "--data", comparisons, "--out", runs["dpo"]]) == 0
    ppo = ["ppo", "--policy", runs["sft"], "--reward", runs["reward"], "--prompts", prompts, "--out", runs["ppo"]]
    small = "--ppo.steps 1 --ppo.prompts_per_step 2 --ppo.max_new_tokens 6 --ppo.min_reward_agreement 0".split()
    assert main([*ppo, *small]) == 0
    capsys.readouterr()
    assert main(["generate", "--model", runs["ppo"], "--prompts", prompts, "--n", "2", "--max_new_tokens", "4"]) == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["prompt"] for reply in replies] == [f"q{i}" for i in range(4) for _ in range(2)]
    assert {reply["finish_reason"] for reply in replies} <= {"stop", "length"}
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd you?\n"))
    assert main(["generate", "--model", runs["ppo"], "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2
    evaluate = ["evaluate", "--candidate", runs["ppo"], "--baseline", runs["dpo"], "--prompts", prompts]
    evaluate += ["--out", runs["evaluation"]]
    greedy = "--evaluation.temperature 0 --evaluation.samples_per_prompt 1 --evaluation.max_new_tokens 6".split()
    assert main([*evaluate[:-1], str(tmp_path / "greedy"), *greedy]) == 0
    assert main([*evaluate, "--evaluation.max_new_tokens", "6"]) == 0
    figures = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert figures["prompts"] == 4 and "simulated" in figures["judge"]
    for run in runs.values():
        assert "<h1>" in (Path(run) / "report.html").read_text()


def test_a_verb_says_before_and_after_and_what_is_next(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demonstrations = rows(tmp_path / "sft.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}."} for i in range(6)])
    heldout = rows(tmp_path / "heldout.jsonl", [{"prompt": f"p{i}", "completion": f"a{i}."} for i in range(3)])
    out = str(tmp_path / "run")
    words = ["sft", "--model", str(tiny_folder), "--data", demonstrations, "--heldout_data", heldout, "--out", out]
    assert main([*words, "--sft.max_steps", "2", "--sft.batch_size", "2"]) == 0
    said = capsys.readouterr().out
    head, loss = said.splitlines()[:2]
    assert head.split() == ["before", "after"] and loss.split()[:2] == ["held-out", "loss"]
    before, after = map(float, loss.split()[2:])
    assert before != after
    lines = [line.split() for line in said.splitlines()]
    assert ["demonstrations", "6"] in lines and ["held-out", "3"] in lines
    assert f"Report: {out}/report.html" in said and f"Next:   rlhf-fast generate --model {out}" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["checkpoint"] == "step-2" and result["summary"]["heldout_loss_before"] == pytest.approx(before, 1e-3)
    assert "heldout_data" in (tmp_path / "run" / "config.yaml").read_text()
    assert main([*words[:-3], str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "b")]) == 1
    assert "heldout_data: there is no file" in capsys.readouterr().err
    assert main([*words[:4], "Anthropic/hh-rlhf", "--out", str(tmp_path / "b")]) == 1
    assert "datasets.load_dataset('Anthropic/hh-rlhf', split='train').to_json('data.jsonl')" in capsys.readouterr().err


def test_ppo_is_rewarded_by_rules_that_are_named_on_the_command_line_or_in_yaml(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = rows(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}", "answer": str(i)} for i in range(4)])
    words = ["ppo", "--policy", str(tiny_folder), "--prompts", prompts]
    words += "--ppo.steps 1 --ppo.prompts_per_step 2 --ppo.samples_per_prompt 2 --ppo.max_new_tokens 6".split()
    text = "1*rule:math, -0.5*rule:length:3"
    (tmp_path / "ppo.yaml").write_text(f"reward: {text}\n")
    assert main([*words, "--reward", text, "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--config", str(tmp_path / "ppo.yaml"), "--out", str(tmp_path / "b")]) == 0
    (a,), (b,) = (map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines()) for out in "ab")
    assert a["score"] == b["score"] == pytest.approx(a["score/math"] - 0.5 * a["score/length"], abs=1e-9)
    assert text in (tmp_path / "a" / "config.yaml").read_text()
    capsys.readouterr()
    assert main([*words, "--reward", "rule:maths", "--out", str(tmp_path / "c")]) == 1
    assert "there is no rule 'maths'; the nearest one is 'math'" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_ppo_refuses_a_reward_model_that_agrees_too_little(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs that say both give an agreement of one half; below 60 % PPO starts only when told to."""
    sides = [("a", "b"), ("b", "a")]
    same = rows(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"q{i}", "chosen": one, "rejected": other} for i in range(16) for one, other in sides],
    )
    prompts = rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    reward, out = str(tmp_path / "reward"), tmp_path / "ppo"
    assert main(["reward", "--model", str(tiny_folder), "--data", same, "--out", reward]) == 0
    words = ["ppo", "--policy", str(tiny_folder), "--reward", reward, "--prompts", prompts, "--out", str(out)]
    small = "--ppo.steps 1 --ppo.prompts_per_step 1 --ppo.max_new_tokens 4".split()
    capsys.readouterr()
    assert main([*words, *small]) == 1
    assert "agrees with 50% of the held-out comparisons, less than ppo.min_reward_agreement = 60%" in (
        capsys.readouterr().err
    )
    assert not out.exists()
    assert main([*words, *small, "--ppo.min_reward_agreement", "0.5"]) == 0


def test_grpo_is_paid_by_a_function_in_a_file_and_its_run_is_one_of_ppo(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rlhf-fast ppo` goes on with what `rlhf-fast grpo` began, as from one of its own runs."""
    monkeypatch.chdir(tmp_path)
    prompts = rows(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}", "answer": str(i)} for i in range(4)])
    Path("my.py").write_text(
        "def digits(prompts, responses, answer):\n    return [sum(c.isdigit() for c in r) for r in responses]\n"
    )
    words = [
        "grpo",
        "--policy",
        str(tiny_folder),
        "--prompts",
        prompts,
        "--reward",
        "1*my.py:digits, 0.1*rule:length:3",
    ]
    words += "--out grpo --ppo.steps 2 --ppo.prompts_per_step 2 --ppo.samples_per_prompt 2".split()
    words += ["--ppo.max_new_tokens", "6"]
    assert main(words) == 0
    metrics = [json.loads(line) for line in Path("grpo/metrics.jsonl").read_text().splitlines()]
    assert all({"score/digits", "score/length"} <= row.keys() and "value_loss" not in row for row in metrics)
    config = Path("grpo/config.yaml").read_text()
    assert "advantage: grpo" in config and "my.py:digits" in config
    for verb in ("ppo", "grpo"):
        assert main([verb, "--config", "grpo/config.yaml", "--out", verb + "-again"]) == 0
        again = [json.loads(line) for line in Path(verb + "-again/metrics.jsonl").read_text().splitlines()]
        assert [row["score"] for row in again] == [row["score"] for row in metrics]
    capsys.readouterr()
    assert main(["rloo", "--config", "grpo/config.yaml", "--out", "rloo"]) == 2
    assert "--ppo.advantage: 'grpo'; the verb rloo is for 'rloo'" in capsys.readouterr().err
