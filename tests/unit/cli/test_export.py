"""A run's model as a folder that goes anywhere: plain libraries load it, and nothing in it refers to another place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast import models
from rlhf_fast.cli import main
from rlhf_fast.config import LoRAConfig
from rlhf_fast.runs.model_names import is_reward

IDS = torch.arange(5, 25).view(1, -1)


@pytest.fixture
def run(tiny: tuple[Any, Any], tmp_path: Path, nudge: Any) -> Path:
    """A run whose outcome is an adapter on a model that lies elsewhere."""
    models.save(tmp_path / "base", *tiny)
    model, tokenizer = models.load(tmp_path / "base")
    model = models.trainable(model, LoRAConfig(r=4))
    nudge(model, 0.2)
    models.save(tmp_path / "run" / "checkpoints" / "step-2", model, tokenizer)
    (tmp_path / "run" / "config.yaml").write_text("sft:\n  seed: 3\n")
    return tmp_path / "run"


def test_a_policy_goes_anywhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, merged = models.load(run)[0](IDS).logits, models.load(run, merged=True)[0](IDS).logits
    assert not (run / "checkpoints" / "step-2" / "README.md").exists()  # peft's is a form to fill in
    assert main(["export", "--model", str(run), "--out", str(tmp_path / "away")]) == 0
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(run)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "away")
    assert torch.equal(found(IDS).logits, merged)
    assert float((merged - expected).norm() / expected.norm()) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "away")("ab").input_ids
    names = {file.name for file in (tmp_path / "away").iterdir()}
    assert "adapter_config.json" not in names and "README.md" in names
    said = "".join(file.read_text("utf-8", "replace") for file in (tmp_path / "away").glob("*.json"))
    assert str(tmp_path) not in said
    card = (tmp_path / "away" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "seed: 3" in card
    assert main(["export", "--model", str(tmp_path / "away"), "--out", str(tmp_path / "away")]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_reward_model_keeps_its_scale(tiny_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = models.reward_from(tiny_folder, LoRAConfig(r=4))
    models.save(tmp_path / "reward", model, tokenizer, {"score_mean": 0.25, "score_std": 2.0, "heads": 1})
    assert is_reward(tmp_path / "reward") and not is_reward(tiny_folder)
    words = ["export", "--model", str(tmp_path / "reward"), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(words) == 0
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    expected = models.load_reward(tmp_path / "reward")[0](IDS).logits
    assert torch.allclose(found(IDS).logits.float(), expected, atol=0.05)
    assert found.dtype == torch.bfloat16 and '"score_std": 2.0' in (tmp_path / "out" / "rlhf_fast.json").read_text()


def test_where_models_go_is_said_by_a_word_or_the_environment(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_FAST_DEVICE", "cpu")
    words = ["export", "--model", str(tiny_folder), "--out", str(tmp_path / "a")]
    assert main([*words, "--device", "cpu"]) == 0
    for name, said in (
        ("tpu", "device: 'tpu'; expected cpu, cuda or cuda:N"),
        ("cuda:77", "sees"),
        ("cpu:1", "expected"),
    ):
        assert main([*words[:-1], str(tmp_path / "b"), f"--device={name}"]) == 1
        assert said in capsys.readouterr().err
    assert main([*words, "--device"]) == 2


def test_an_adapter_is_on_the_layers_that_are_named(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model = models.trainable(tiny[0], LoRAConfig(r=2, targets=("q_proj", "v_proj")))
    on = {name.split(".")[-4] for name, x in model.named_parameters() if x.requires_grad}
    assert on == {"q_proj", "v_proj"}
    models.save(tmp_path / "adapter", model, tiny[1])
    again = models.load(tmp_path / "adapter")[0]
    models.trainable(again, LoRAConfig(r=2, targets=("v_proj", "q_proj")))
    with pytest.raises(ValueError, match=r"lora\.targets: k_proj does not fit the adapter of the checkpoint, .* on q"):
        models.trainable(again, LoRAConfig(r=2, targets=("k_proj",)))
    with pytest.raises(ValueError, match=r"lora\.targets: k_proj does not fit the adapter of .*adapter, which is on q"):
        models.reward_from(tmp_path / "adapter", LoRAConfig(r=2, targets=("k_proj",)))
    with pytest.raises(ValueError, match=r"lora\.targets: 'query' is no linear layer of this model; it has down_proj,"):
        models.trainable(models.load(tmp_path / "adapter", merged=True)[0], LoRAConfig(r=2, targets=("query",)))
