"""The reward model: what it learns, how its agreement is measured, and that what it says is kept with it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rlhf_fast import models
from rlhf_fast.config import LoRAConfig, OptimConfig, RewardConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.data.pairs import PairGroup, join
from rlhf_fast.data.records import read_comparisons
from rlhf_fast.data.tokenize import tokenize_example
from rlhf_fast.models.checkpoint import read_extra
from rlhf_fast.rewards.model import RewardModel, Rewards, resolve_reward
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.trainers.reward import RewardTrainer, poisson_weight

ROWS = [
    {"prompt": f"question {i}", "chosen": "a" * (3 + i % 4) + "!", "rejected": "b" * (3 + (i * 7) % 5)}
    for i in range(40)
]


def with_itself(group: PairGroup) -> PairGroup:
    """The chosen response of its first comparison against itself, which no row may be."""
    chosen = group.examples[group.chosen[0]]
    return PairGroup([chosen], [0], [0], [0.0], [1.0], group.comparisons[:1])


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardTrainer, Path]:
    out = tmp_path_factory.mktemp("reward")
    config = RewardConfig(epochs=4, batch_size=8, lora=LoRAConfig(r=4), optim=OptimConfig(lr=3e-3))
    trainer = RewardTrainer(tiny_folder, ROWS, out, config)
    trainer.train()
    return trainer, out


def test_a_clear_preference_is_learned_on_prompts_never_trained_on(trained: tuple[RewardTrainer, Path]) -> None:
    trainer, _ = trained
    assert len(trainer.heldout) == 5
    assert trainer.agreement.mean == 1.0
    assert trainer.agreement.low <= trainer.agreement.mean <= trainer.agreement.high


def test_no_prompt_is_on_both_sides_of_the_split(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 10}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    trainer = RewardTrainer(tiny_folder, rows, tmp_path)
    prompts = [
        {example.prompt for group in part for example in group.examples} for part in (trainer.training, trainer.heldout)
    ]
    assert not prompts[0] & prompts[1]
    assert sum(group.pairs for group in trainer.training + trainer.heldout) == 60


def test_the_first_loss_is_that_of_a_coin(tiny_folder: Path, tmp_path: Path) -> None:
    """Identical texts can not differ in score: ln 2, and no gradient but that of centring."""
    trainer = RewardTrainer(tiny_folder, ROWS, tmp_path, RewardConfig(center_coef=0.0, heldout=0.5))
    (loss, stats), *_ = trainer._losses([with_itself(group) for group in trainer.training[:2]])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert float(stats["accuracy"]) == 0.5
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_the_score_is_read_at_the_last_real_token(trained: tuple[RewardTrainer, Path]) -> None:
    """Detail 8, against transformers' own classifier, one row at a time and padded together."""
    trainer, _ = trained
    texts = ["", "a", "abc!", "b" * 30]
    examples = [tokenize_example(trainer.tokenizer, "question", text, name="row") for text in texts]
    with torch.no_grad():
        together = models.score_last(trainer.model, pad(examples))
        for example, score in zip(examples, together, strict=True):
            ids = torch.tensor([[*example.prompt, *example.response]])
            assert float(trainer.model(input_ids=ids).logits[0, 0]) == pytest.approx(float(score), abs=1e-5)


def test_the_checkpoint_loads_in_plain_libraries_with_the_same_scores(
    trained: tuple[RewardTrainer, Path], tiny_folder: Path
) -> None:
    trainer, out = trained
    (folder,) = (out / "checkpoints").iterdir()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    plain = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_scores_of_the_policy_have_mean_zero_and_deviation_one(trained: tuple[RewardTrainer, Path]) -> None:
    """Detail 22: over the held-out responses, which are samples of the policy that PPO starts from."""
    trainer, out = trained
    reward = RewardModel(out)
    pairs = [(example.prompt, example) for group in trainer.heldout for example in group.examples]
    texts = [trainer.tokenizer.decode(example.response, skip_special_tokens=True) for _, example in pairs]
    prompts = [trainer.tokenizer.decode(prompt, skip_special_tokens=True) for prompt, _ in pairs]
    scores = torch.tensor(reward(prompts, texts))  # type: ignore[arg-type]
    assert abs(float(scores.mean())) < 1e-3 and float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_agreement_goes_with_the_checkpoint_and_gates_ppo(trained: tuple[RewardTrainer, Path]) -> None:
    trainer, out = trained
    (folder,) = (out / "checkpoints").iterdir()
    assert read_extra(folder)["heldout_agreement"] == trainer.agreement.as_dict()
    assert isinstance(resolve_reward(out, 0.99, 100), Rewards)
    with pytest.raises(ValueError, match="agrees with 100% of the held-out comparisons, less than"):
        resolve_reward(out, 1.01, 100)


def test_a_tie_counts_half(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = RewardTrainer(tiny_folder, ROWS, tmp_path)
    trainer.heldout = [with_itself(group) for group in trainer.heldout]
    assert trainer.evaluate()["heldout_accuracy"] == 0.5


# Confidence and heads ------------------------------------------------------------------------------------------------


def losses(trainer: RewardTrainer) -> torch.Tensor:
    return torch.stack([loss for loss, _ in trainer._losses(trainer.training)]).sum()


def test_a_confidence_weighs_the_losses_of_both_orders(tiny_folder: Path, tmp_path: Path) -> None:
    """Against the formula in float64, with margins and centring; in one micro-batch and in many."""
    rows = [{**row, "confidence": [1.0, 0.5, 0.8][i % 3], "margin": 0.3 * (i % 2)} for i, row in enumerate(ROWS[:9])]
    config = RewardConfig(heldout=0.3, lora=LoRAConfig(r=0), center_coef=0.05)
    trainer = RewardTrainer(tiny_folder, rows, tmp_path, config)
    pairs = join(trainer.training, "cpu")
    with torch.no_grad():
        scores = models.score_last(trainer.model, pad(pairs.examples))[:, 0].double()
    chosen, rejected = scores[pairs.chosen], scores[pairs.rejected]
    x, c = chosen - rejected - pairs.margins, pairs.confidences.double()
    log_sigmoid = torch.nn.functional.logsigmoid
    expected = (-c * log_sigmoid(x) - (1 - c) * log_sigmoid(-x) + 0.05 * (chosen + rejected) ** 2).mean()
    assert float(losses(trainer).detach()) == pytest.approx(float(expected), rel=1e-5)
    optim = OptimConfig(max_tokens_per_microbatch=1)
    apart = RewardTrainer(tiny_folder, rows, tmp_path, dataclasses.replace(config, optim=optim))
    assert float(losses(apart).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_certain_comparisons_have_the_loss_of_comparisons_without_confidence(tiny_folder: Path, tmp_path: Path) -> None:
    plain = RewardTrainer(tiny_folder, ROWS[:9], tmp_path, RewardConfig(heldout=0.3))
    certain = [{**row, "confidence": 1.0} for row in ROWS[:9]]
    assert torch.equal(losses(plain), losses(RewardTrainer(tiny_folder, certain, tmp_path, RewardConfig(heldout=0.3))))
    plain.soft_labels = True  # the long way, with weights 1 and 0
    torch.testing.assert_close(losses(plain), losses(RewardTrainer(tiny_folder, certain, tmp_path, plain.config)))


def test_several_heads_are_trained_on_their_own_resamples(tiny_folder: Path, tmp_path: Path) -> None:
    """Their loss is the mean of those of single heads, each prompt counted as often as a head's resample holds it."""
    config = RewardConfig(heldout=0.3, heads=3, center_coef=0.0, lora=LoRAConfig(r=0))
    trainer = RewardTrainer(tiny_folder, ROWS[:12], tmp_path, config)
    pairs = join(trainer.training, "cpu")
    prompts = [group.examples[0].prompt for group in trainer.training]  # one comparison each
    with torch.no_grad():
        scores = models.score_last(trainer.model, pad(pairs.examples)).double()
    x = scores[pairs.chosen] - scores[pairs.rejected]  # (P, 3)
    times = torch.tensor([[poisson_weight(config.seed, head, prompt) for head in range(3)] for prompt in prompts])
    assert not torch.equal(times[:, 0], times[:, 1])
    expected = (times * -torch.nn.functional.logsigmoid(x)).mean()
    assert float(losses(trainer).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_a_resample_counts_prompts_as_a_poisson_variable_of_mean_one() -> None:
    counts = [poisson_weight(0, head, (prompt,)) for head in range(4) for prompt in range(5000)]
    for n in range(4):  # five standard errors
        share, expected = counts.count(n) / len(counts), math.exp(-1) / math.factorial(n)
        assert share == pytest.approx(expected, abs=5 * (expected * (1 - expected) / len(counts)) ** 0.5)
    assert counts == [poisson_weight(0, head, (prompt,)) for head in range(4) for prompt in range(5000)]


@pytest.fixture(scope="module")
def ensemble(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardTrainer, Path]:
    out = tmp_path_factory.mktemp("ensemble")
    optim = OptimConfig(lr=3e-3)
    config = RewardConfig(epochs=2, batch_size=8, heads=3, lcb=0.5, lora=LoRAConfig(r=4), optim=optim,
                          normalize_samples=2, max_new_tokens=6)  # fmt: skip
    rows = [{**row, "category": f"kind {i % 2}"} for i, row in enumerate(ROWS)]
    trainer = RewardTrainer(tiny_folder, rows, out, config)
    trainer.train()
    return trainer, out


def test_the_score_of_an_ensemble_is_its_lower_bound_and_comes_back_from_its_checkpoint(
    ensemble: tuple[RewardTrainer, Path],
) -> None:
    trainer, out = ensemble
    reward = RewardModel(out)
    scores, spread = reward.measure(["question"] * 3, ["a!", "bbb", "other"])
    examples = [tokenize_example(trainer.tokenizer, "question", text, name="row") for text in ("a!", "bbb", "other")]
    with torch.no_grad():
        by_head = models.score_last(trainer.model, pad(examples)).double()
    assert by_head.shape == (3, 3) and (by_head.std(dim=1) > 1e-4).all()
    mean, std = trainer.scale
    expected = (by_head.mean(dim=1) - 0.5 * by_head.std(dim=1, correction=0) - mean) / std
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)
    assert spread == pytest.approx((by_head.std(dim=1, correction=0) / std).tolist(), abs=1e-3)
    assert reward(["question"] * 3, ["a!", "bbb", "other"]) == scores
    assert reward.measure([], []) == ([], [])


def test_one_head_has_no_spread(trained: tuple[RewardTrainer, Path]) -> None:
    scores, spread = RewardModel(trained[1]).measure(["question"], ["abc"])
    assert len(scores) == 1 and spread == [0.0]


# The report ----------------------------------------------------------------------------------------------------------


def test_scores_of_responses_sampled_from_the_start_have_mean_zero_and_deviation_one(
    ensemble: tuple[RewardTrainer, Path],
) -> None:
    """Detail 22, where the held-out responses are not the policy's own."""
    trainer, out = ensemble
    policy, tokenizer = models.load(trainer.start)
    prompts = [group.comparisons[0].prompt for group in trainer.heldout]
    rollouts = Generator(policy, tokenizer).generate(prompts, SamplingParams(n=2, max_new_tokens=6))
    scores = torch.tensor(RewardModel(out)([prompts[i] for i in rollouts.prompt_index.tolist()], rollouts.texts))
    assert abs(float(scores.mean())) < 1e-3 and float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_the_report_says_what_the_result_says(ensemble: tuple[RewardTrainer, Path]) -> None:
    trainer, out = ensemble
    report = json.loads((out / "reward_report.json").read_text())
    summary = json.loads((out / "result.json").read_text())["summary"]
    assert report["accuracy"] == summary["heldout_accuracy"] == trainer.agreement.as_dict()
    assert (report["verdict"], report["calibration"]["ece"]) == (summary["verdict"], summary["ece"])
    assert (report["scores"]["mean"], report["scores"]["std"]) == (summary["score_mean"], summary["score_std"])
    assert report["scores"]["over"].startswith("10 responses sampled from the policy")
    assert sum(report["scores"]["histogram"]["policy"]) == 10
    assert sum(row["comparisons"] for row in report["by"]["category"]) == report["comparisons"] == 5
    assert report["heads"]["heads"] == 3
    assert report["alone"]["texts"] == 4 and report["alone"]["most_deviations"] < 1e-3


def test_held_out_comparisons_are_kept_with_their_scores_the_worst_first(ensemble: tuple[RewardTrainer, Path]) -> None:
    _, out = ensemble
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    gaps = [row["chosen_score"] - row["rejected_score"] for row in rows]
    assert len(rows) == 5 and gaps == sorted(gaps)
    reward = RewardModel(out)
    for row in rows:
        (score,) = reward([row["prompt"]], [row["chosen"]])
        assert row["chosen_score"] == pytest.approx(score, abs=2e-3)


def test_what_the_data_calls_another_split_is_never_trained_on(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "split": "valid" if i in (3, 7) else "train"} for i, row in enumerate(ROWS[:12])]
    trainer = RewardTrainer(tiny_folder, rows, tmp_path)
    assert [group.comparisons[0].prompt for group in trainer.heldout] == ["question 3", "question 7"]
    assert len(trainer.training) == 10


HH_RLHF = Path(__file__).resolve().parents[4] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"


@pytest.mark.skipif(not HH_RLHF.exists(), reason="the human comparisons of HH-RLHF are not beside the tree")
def test_human_comparisons_are_learned_from(tiny_folder: Path, tmp_path: Path) -> None:
    """A hundred short ones, by a model of bytes that cannot understand them but can learn them by heart."""
    short = [row for row in read_comparisons(HH_RLHF) if len(str(row.prompt)) + len(row.chosen + row.rejected) < 500]
    config = RewardConfig(epochs=6, heldout=0.1, lora=LoRAConfig(r=0), optim=OptimConfig(lr=3e-3))
    trainer = RewardTrainer(tiny_folder, short[:100], tmp_path, config)
    result = trainer.train()["summary"]
    assert result["comparisons"] + result["heldout"] == 100
    assert 0.0 <= result["heldout_accuracy"]["low"] <= result["heldout_accuracy"]["high"] <= 1.0
    with torch.no_grad():
        accuracy = sum(float(stats["accuracy"]) for _, stats in trainer._losses(trainer.training))
    assert accuracy > 0.75
