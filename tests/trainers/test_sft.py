"""Supervised fine-tuning: what is learned from, what is held out, and what is left on the disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.cli import main
from rlhf_fast.config import LoRAConfig, OptimConfig, SFTConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.trainers.sft import SFTTrainer

ROWS = [{"prompt": f"say {letter}", "completion": letter * 3} for letter in "abcdefghij"]


def trainer(folder: Path, out: Path, **options: object) -> SFTTrainer:
    return SFTTrainer(folder, ROWS, out, SFTConfig(lora=LoRAConfig(r=0), **options))  # type: ignore[arg-type]


def test_the_loss_is_on_the_response_and_its_end_only(tiny_folder: Path, tmp_path: Path) -> None:
    sft = trainer(tiny_folder, tmp_path)
    example = sft.training[0]
    logits = sft.model(input_ids=torch.tensor([[*example.prompt, *example.response]])).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    start = len(example.prompt)
    expected = -sum(float(logprobs[start - 1 + i, token]) for i, token in enumerate(example.response))
    assert example.response[-1] == sft.tokenizer.eos_token_id
    assert float(sft._loss(pad([example]), 1)) == pytest.approx(expected, rel=1e-5)


def test_the_end_is_learned(tiny_folder: Path, tmp_path: Path) -> None:
    """Detail 1: a model trained on short answers stops by itself, since the end token is no padding and has a loss."""
    sft = trainer(tiny_folder, tmp_path, epochs=60, batch_size=5, optim=OptimConfig(lr=5e-3))
    sft.train()
    prompts = [row["prompt"] for row in ROWS]
    rollouts = Generator(sft.model, sft.tokenizer).generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=20))
    assert rollouts.finish_reasons.count("stop") >= 9
    assert sum(len(text) == 3 for text in rollouts.texts) >= 8


def test_a_run_leaves_metrics_config_result_and_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    sft = trainer(tiny_folder, tmp_path / "run", epochs=2, batch_size=3, heldout=0.1)
    result = sft.train()
    assert (len(sft.training), len(sft.heldout)) == (9, 1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 3, 6]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows if "loss" in row)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["model"] == str(tiny_folder) and written["sft"]["epochs"] == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-6"]


@pytest.mark.parametrize("r", [0, 4])
def test_the_checkpoint_loads_in_plain_libraries_with_the_same_logits(
    r: int, tiny_folder: Path, tmp_path: Path
) -> None:
    sft = SFTTrainer(tiny_folder, ROWS, tmp_path, SFTConfig(epochs=1, lora=LoRAConfig(r=r)))
    sft.train()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    plain = (AutoPeftModelForCausalLM if r else AutoModelForCausalLM).from_pretrained(folder).eval()
    again, _ = models.load(tmp_path)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        logits = sft.model(input_ids=ids).logits
        assert torch.equal(plain(input_ids=ids).logits, logits)
        assert torch.equal(again(input_ids=ids).logits, logits)
        start, _ = models.load(tiny_folder)
        assert not torch.equal(start(input_ids=ids).logits, logits)


def test_the_same_seed_gives_the_same_weights(tiny_folder: Path, tmp_path: Path) -> None:
    def weights(out: Path, seed: int) -> torch.Tensor:
        sft = SFTTrainer(tiny_folder, ROWS, out, SFTConfig(epochs=1, seed=seed, lora=LoRAConfig(r=2)))
        sft.train()
        return torch.cat([p.detach().flatten() for p in sft.model.parameters()])

    first = weights(tmp_path / "a", 1)
    assert torch.equal(first, weights(tmp_path / "b", 1))
    assert not torch.equal(first, weights(tmp_path / "c", 2))


def test_a_demonstration_too_long_is_named_before_anything_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "' + "b" * 99 + '"}\n')
    with pytest.raises(ValueError, match=r"data.jsonl line 2: prompt and response have \d+ tokens, more than"):
        SFTTrainer(tiny_folder, file, tmp_path / "run", SFTConfig(max_length=50))
    assert not (tmp_path / "run").exists()


def test_the_config_of_a_run_starts_the_same_run_again(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = SFTConfig(epochs=1, batch_size=3, lora=LoRAConfig(r=2))
    SFTTrainer(tiny_folder, data, tmp_path / "a", config).train()
    assert main(["sft", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    weights = [
        (tmp_path / out / "checkpoints" / "step-3" / "adapter_model.safetensors").read_bytes() for out in ("a", "b")
    ]
    assert weights[0] == weights[1]


def test_a_finished_run_is_not_overwritten(tiny_folder: Path, tmp_path: Path) -> None:
    trainer(tiny_folder, tmp_path, epochs=1).train()
    with pytest.raises(FileExistsError, match="holds a finished run"):
        trainer(tiny_folder, tmp_path, epochs=1).train()
