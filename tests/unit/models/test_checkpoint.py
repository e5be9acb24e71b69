from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast import models
from rlhf_fast.config import LoRAConfig
from rlhf_fast.data.batches import Example, pad
from rlhf_fast.models.checkpoint import read_extra

Nudge = Callable[..., None]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 1], [20, 30, 40, 50, 60, 70, 80, 90]])
LORA = LoRAConfig(r=4, alpha=8)
FULL = LoRAConfig(r=0)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.fixture
def policy(tiny: tuple[Any, Any], nudge: Nudge, request: pytest.FixtureRequest) -> Any:
    model = models.trainable(tiny[0], getattr(request, "param", FULL))
    nudge(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["folder", "config"])
def test_a_policy_loads_in_transformers_with_the_same_bits(
    tiny_folder: Path,
    family_config: Callable[..., Any],
    nudge: Nudge,
    tmp_path: Path,
    dtype: torch.dtype,
    source: str,
) -> None:
    model, tokenizer = models.load(tiny_folder if source == "folder" else family_config("llama"), dtype=dtype)
    policy = models.trainable(model, FULL)
    nudge(policy)
    models.save(tmp_path / "a", policy, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(policy))
    assert torch.equal(logits(models.load(tmp_path / "a", dtype=dtype)[0]), logits(policy))


@pytest.mark.parametrize("policy", [LORA], indirect=True)
def test_an_adapter_loads_in_peft_with_the_same_bits(
    policy: Any, tiny: tuple[Any, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    models.save(tmp_path / "a", policy, tiny[1])
    expected = logits(policy)
    assert not torch.equal(expected, logits(models.load(tiny_folder)[0])), "the adapter shows nothing"
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")), expected)
    onto_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "a")
    assert torch.equal(logits(onto_base), expected)
    assert torch.equal(logits(models.load(tmp_path / "a")[0]), expected)


def test_a_reward_model_loads_in_transformers_with_the_same_bits(
    tiny_folder: Path, nudge: Nudge, tmp_path: Path
) -> None:
    model, tokenizer = models.reward_from(tiny_folder, FULL)
    nudge(model)
    models.save(tmp_path / "a", model, tokenizer)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert loaded.config.num_labels == 1
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(models.load_reward(tmp_path / "a")[0]), logits(model))


def test_a_reward_adapter_loads_in_peft_with_the_same_bits(tiny_folder: Path, nudge: Nudge, tmp_path: Path) -> None:
    model, tokenizer = models.reward_from(tiny_folder, LORA)
    nudge(model)
    models.save(tmp_path / "a", model, tokenizer)
    expected = logits(model)
    # The number of labels is the base model's affair; peft keeps it nowhere.
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=1)
    assert torch.equal(logits(loaded), expected)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "a")), expected)
    assert torch.equal(logits(models.load_reward(tmp_path / "a")[0]), expected)


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_score_last_is_what_transformers_pools(tiny_folder: Path, nudge: Nudge, lora: LoRAConfig) -> None:
    model, tokenizer = models.reward_from(tiny_folder, lora)
    nudge(model)
    examples = [
        Example((5, 6), (7, 8, 9, 10, 11, 1)),  # the longest: no padding at all
        Example((5, 6, 7), (1,)),
        Example((9,), (0, 8, 0, 0, 1)),  # the pad token inside the response
        Example((0, 9), (4,)),
    ]
    batch = pad(examples)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    with torch.no_grad():
        pooled = model(input_ids=batch.input_ids).logits
        scores = models.score_last(model, batch)
    torch.testing.assert_close(scores, pooled, rtol=0, atol=1e-6)
    assert scores.std() > 1e-3


def test_a_pad_token_that_ends_a_response_is_its_last_token(tiny_folder: Path) -> None:
    """Transformers would pool the token before it: what was generated cannot be told from padding there."""
    model, _ = models.reward_from(tiny_folder, FULL)
    with torch.no_grad():
        ended = models.score_last(model, pad([Example((5, 6), (7, 0))]))
        states = models.hidden_states(model, torch.tensor([[5, 6, 7, 0]]))
        torch.testing.assert_close(ended, model.score(states[:, -1]), rtol=0, atol=1e-6)
    assert not torch.equal(ended, models.score_last(model, pad([Example((5, 6), (7,))])))


def test_tied_weights_are_saved_once_and_tied_when_loaded(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    models.save(tmp_path / "a", *tiny)
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118  # a file, not a dict
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model, _ = models.load(tmp_path / "a")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_untied_weights_are_both_saved(family_config: Callable[..., Any], tmp_path: Path) -> None:
    model, tokenizer = models.load(family_config("llama", tie_word_embeddings=False))
    models.save(tmp_path / "a", model, tokenizer)
    loaded, _ = models.load(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("policy", [FULL, LORA], indirect=True)
def test_weights_are_safetensors_only_and_extras_come_back(policy: Any, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    head = nn.Linear(64, 1)
    extra = {"step": 3, "kl_controller": {"coef": 0.1}}
    models.save(tmp_path / "a", policy, tiny[1], extra, head.state_dict())
    names = {path.name for path in (tmp_path / "a").rglob("*")}
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ".md"}
    assert {"value_head.safetensors", "rlhf_fast.json", "tokenizer.json"} <= names
    assert read_extra(tmp_path / "a") == extra
    with safe_open(tmp_path / "a" / "value_head.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight"), head.weight)
        assert torch.equal(file.get_tensor("bias"), head.bias)


def test_a_checkpoint_without_extras_has_none(tiny_folder: Path) -> None:
    assert read_extra(tiny_folder) == {}


def test_an_adapter_on_a_model_that_is_nowhere_saved_is_refused(
    family_config: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = models.load(family_config("llama"))
    with pytest.raises(ValueError, match="base model was made from a config"):
        models.save(tmp_path / "a", models.trainable(model, LORA), tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
@pytest.mark.parametrize("place", ["weights", "tokenizer", "last"])
@pytest.mark.parametrize("policy", [FULL, LORA], indirect=True)
def test_a_full_disk_leaves_nothing_behind_and_the_old_checkpoint_untouched(
    policy: Any,
    tiny: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    place: str,
) -> None:
    _, tokenizer = tiny
    models.save(tmp_path / "a", policy, tokenizer, {"step": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def full(*arguments: Any, **options: Any) -> None:
        raise error

    if place == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
        monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    elif place == "tokenizer":
        monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    else:
        monkeypatch.setattr("rlhf_fast.models.checkpoint.save_file", full)
    for name in ("a", "b"):
        with pytest.raises(OSError, match=f"no space left while writing .*{name}") as caught:
            models.save(tmp_path / name, policy, tokenizer, {"step": 2}, nn.Linear(2, 1).state_dict())
        assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_what_a_killed_save_left_aside_is_no_obstacle(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").mkdir()
    (tmp_path / ".a.tmp" / "half").write_text("")
    models.save(tmp_path / "a", *tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / "half").exists()


def test_an_adapter_saved_from_a_relative_name_loads_from_another_directory(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink(tiny_folder, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = models.load("base")
    models.save(Path("adapter"), models.trainable(model, LORA), tokenizer)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    models.load("../adapter")


def test_an_adapter_whose_base_model_is_gone_says_so(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    models.save(tmp_path / "a", models.trainable(tiny[0], LORA), tiny[1])
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for base, message in ((str(tmp_path / "gone"), "base model of the adapter .* is missing"), (None, "does not name")):
        file.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            models.load(tmp_path / "a")


def test_a_folder_of_something_else_is_not_replaced(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="mine is a folder that holds no model; it is not replaced"):
        models.save(tmp_path / "mine", *tiny)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    for _ in range(2):  # a checkpoint is
        models.save(tmp_path / "model", *tiny)
