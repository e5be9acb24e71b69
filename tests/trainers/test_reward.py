"""The reward model: what it learns, how its agreement is measured, and that what it says is kept with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rlhf_fast import models
from rlhf_fast.config import LoRAConfig, OptimConfig, RewardConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.data.chat import encode
from rlhf_fast.data.records import read_comparisons
from rlhf_fast.models.checkpoint import read_extra
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.rewards import RewardModel, Rewards, resolve_reward

ROWS = [
    {"prompt": f"question {i}", "chosen": "a" * (3 + i % 4) + "!", "rejected": "b" * (3 + (i * 7) % 5)}
    for i in range(40)
]


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
    rows = [{"prompt": f"q{i}", "chosen": "same", "rejected": "same"} for i in range(4)]
    trainer = RewardTrainer(tiny_folder, rows, tmp_path, RewardConfig(center_coef=0.0, heldout=0.5))
    (loss, stats), *_ = trainer._losses(trainer.training)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert float(stats["accuracy"]) == 0.5
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_the_score_is_read_at_the_last_real_token(trained: tuple[RewardTrainer, Path]) -> None:
    """Detail 8, against transformers' own classifier, one row at a time and padded together."""
    trainer, _ = trained
    texts = ["", "a", "abc!", "b" * 30]
    examples = [encode(trainer.tokenizer, "question", text, 100, "row") for text in texts]
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
    rows = [{"prompt": f"q{i}", "chosen": "same", "rejected": "same"} for i in range(8)]
    assert RewardTrainer(tiny_folder, rows, tmp_path).evaluate()["heldout_accuracy"] == 0.5


HH_RLHF = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"


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
