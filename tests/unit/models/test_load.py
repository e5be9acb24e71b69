from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast import models
from rlhf_fast.config import LoRAConfig
from rlhf_fast.data.batches import Example, pad
from rlhf_fast.models.byte_tokenizer import VOCAB_SIZE

Nudge = Callable[..., None]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 1]])
EXAMPLES = [Example((5, 6, 7), (8, 9, 1)), Example((20, 21), (22,))]
LORA = LoRAConfig(r=4, alpha=8)
FULL = LoRAConfig(r=0)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def train(model: nn.Module, steps: int = 3) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        loss = -models.response_logprobs(model, pad(EXAMPLES))[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def adapter_folder(tiny: tuple[Any, Any], nudge: Nudge, tmp_path: Path) -> Path:
    """A saved policy adapter whose weights are not zero."""
    policy = models.trainable(tiny[0], LORA)
    nudge(policy)
    models.save(tmp_path / "adapter", policy, tiny[1])
    return tmp_path / "adapter"


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_saved_model_in_evaluation_mode(tiny_folder: Path) -> None:
    for name in (tiny_folder, str(tiny_folder)):
        model, tokenizer = models.load(name)
        assert not model.training and model.dtype == torch.float32
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_folder)))
        assert tokenizer.eos_token == "<eos>"


def test_a_run_gives_its_newest_checkpoint_by_number_and_no_half_written_one(
    tiny: tuple[Any, Any], tmp_path: Path, nudge: Nudge
) -> None:
    model, tokenizer = tiny
    nudge(model.requires_grad_(True))
    for step in (9, 10):
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        models.save(tmp_path / "checkpoints" / f"step-{step}", model, tokenizer)
    shutil.copytree(tmp_path / "checkpoints" / "step-9", tmp_path / "checkpoints" / ".step-20.tmp")
    shutil.copytree(tmp_path / "checkpoints" / "step-9", tmp_path / "checkpoints" / "step-30-old")
    assert models.resolve(tmp_path).endswith("step-10")
    assert models.load(tmp_path)[0].model.norm.weight[0].item() == 10


def test_a_config_gives_random_weights_from_the_seed(family_config: Callable[..., Any]) -> None:
    config = family_config("llama")
    state = torch.random.get_rng_state()
    first, again, other = (models.load(config, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state), "loading must not use up the caller's random numbers"
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert config.pad_token_id != 0 or config.eos_token_id != 1, "the caller's config is left alone"
    assert (first.config.pad_token_id, first.config.eos_token_id) == (0, 1)


def test_a_vocabulary_too_small_for_the_byte_tokenizer_is_refused(family_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"config.vocab_size: 100 is less than the byte tokenizer's {VOCAB_SIZE}"):
        models.load(family_config("llama", vocab_size=100))


def test_an_unknown_name_is_one_clear_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"'smolm2-135m' is neither .* did you mean 'smollm2-135m'\?"):
        models.load("smolm2-135m")
    with pytest.raises(FileNotFoundError, match=r"there is no folder /no/such/folder \(nor /no/such\); expected"):
        models.load("/no/such/folder")


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor adapter_config.json nor checkpoints/step-N"):
        models.load(tmp_path)


@pytest.mark.parametrize("load", [models.load, models.load_reward])
def test_a_hub_name_without_a_network_is_not_found(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'nobody/no-such-model' was not found: .*HF_HUB_OFFLINE is set"):
        load("nobody/no-such-model")


# Damaged and hostile folders ------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": lambda folder: truncate(folder / "model.safetensors"),
    "weights that are none": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 999) and None,
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "config cut short": lambda folder: truncate(folder / "config.json"),
    "config empty": lambda folder: (folder / "config.json").write_text("{}") and None,
    "tokenizer cut short": lambda folder: truncate(folder / "tokenizer.json"),
    "tokenizer missing": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    DAMAGES[damage](folder)
    with pytest.raises(ValueError, match=r"model: .*damaged cannot be read \(.+\); if it is damaged, save or download"):
        models.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 128, "its weights have other shapes than its config.json says"),
        ("num_attention_heads", "four", "Validation error for field 'num_attention_heads': TypeError"),
        ("model_type", "zzz", "has model type `zzz`"),
    ],
)
def test_a_foreign_config_is_told_in_words(tiny_folder: Path, tmp_path: Path, key: str, value: Any, words: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "foreign")
    file = tmp_path / "foreign" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"foreign cannot be read .*{re.escape(words)}"):
        models.load(tmp_path / "foreign")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_named(adapter_folder: Path, file: str) -> None:
    truncate(adapter_folder / file)
    with pytest.raises(ValueError, match="adapter cannot be read"):
        models.load(adapter_folder)


def test_weights_that_a_folder_lacks_are_an_error_not_random_numbers(
    family_config: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    models.save(tmp_path / "a", *models.load(family_config("llama", tie_word_embeddings=False)))
    file = tmp_path / "a" / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for lm_head.weight \(1 missing\)"):
        models.load(tmp_path / "a")


def test_a_tokenizer_without_an_end_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(tiny_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="endless names no end-of-sequence token"):
        models.load(folder)


class Malice:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_code_in_a_models_folder_is_never_run(tiny_folder: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "custom", tmp_path / "ran"
    shutil.copytree(tiny_folder, folder)
    for file in ("model.py", "configuration.py", "tokenizer.py"):
        (folder / file).write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration.Config",
        "AutoModelForCausalLM": "model.Model",
        "AutoModelForSequenceClassification": "model.Model",
    }
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "custom", "auto_map": auto_map}))
    for load in (models.load, models.load_reward, lambda name: models.reward_from(name, LORA)):
        with pytest.raises(ValueError, match="custom cannot be read"):
            load(folder)
    assert not marker.exists()


def test_remote_code_is_trusted_nowhere(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        original = auto.from_pretrained

        def spy(*arguments: Any, original: Any = original, **options: Any) -> Any:
            seen.append(options["trust_remote_code"])
            return original(*arguments, **options)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    models.load(tiny_folder)
    assert seen == [False, False]


def test_a_pickle_of_weights_is_read_as_weights_only(tiny: tuple[Any, Any], tiny_folder: Path, tmp_path: Path) -> None:
    """Older hub models come as pytorch_model.bin; transformers opens it with weights_only=True."""
    folder, marker = tmp_path / "pickle", tmp_path / "ran"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny[0].state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(logits(models.load(folder)[0]), logits(tiny[0]))
    torch.save({**tiny[0].state_dict(), "more": Malice(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its weights are a pickle of more than tensors, which is not opened"):
        models.load(folder)
    assert not marker.exists()


# Adapters -------------------------------------------------------------------------------------------------------------


def test_trainable_trains_the_adapter_only_or_everything(tiny_folder: Path) -> None:
    with_adapter = models.trainable(models.load(tiny_folder)[0], LORA)
    names = trainable_names(with_adapter)
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert len(names) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks
    everything = models.trainable(models.load(tiny_folder)[0], FULL)
    assert trainable_names(everything) == {name for name, _ in everything.named_parameters()}
    assert not with_adapter.training and not everything.training


def test_a_fresh_adapter_changes_nothing_and_depends_on_the_seed_only(tiny_folder: Path) -> None:
    base = logits(models.load(tiny_folder)[0])
    first, again, other = (models.trainable(models.load(tiny_folder)[0], LORA, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first), base)
    a = {name: p for name, p in first.named_parameters() if "lora_A" in name}
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in a.items())
    assert not any(torch.equal(p, dict(other.named_parameters())[name]) for name, p in a.items())


def test_a_loaded_adapter_is_trained_on_and_merged_for_training_everything(adapter_folder: Path) -> None:
    loaded, _ = models.load(adapter_folder)
    before = logits(loaded)
    policy = models.trainable(loaded, LORA)
    assert trainable_names(policy) and all("lora_" in name for name in trainable_names(policy))
    assert torch.equal(logits(policy), before)
    merged = models.trainable(models.load(adapter_folder)[0], FULL)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-5)


def test_another_rank_than_the_adapters_is_an_error_that_names_both(adapter_folder: Path) -> None:
    message = r"lora.r: 6 does not fit the adapter of .*, which has rank 4"
    with pytest.raises(ValueError, match=message):
        models.trainable(models.load(adapter_folder)[0], LoRAConfig(r=6))
    with pytest.raises(ValueError, match=message):
        models.reward_from(adapter_folder, LoRAConfig(r=6))


def test_with_its_adapter_disabled_a_trained_policy_is_the_base_model_exactly(tiny_folder: Path) -> None:
    base = logits(models.load(tiny_folder)[0])
    policy = models.trainable(models.load(tiny_folder)[0], LORA)
    train(policy)
    assert not torch.equal(logits(policy), base)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), base)


@pytest.mark.parametrize("lora", [LORA, FULL])
def test_the_reference_stays_bit_for_bit_what_the_policy_was(tiny_folder: Path, lora: LoRAConfig, nudge: Nudge) -> None:
    policy = models.trainable(models.load(tiny_folder)[0], lora)
    nudge(policy)
    start = logits(policy)
    reference = models.frozen_copy(policy)
    own = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        assert (parameter.data_ptr() == own[name].data_ptr()) == (not own[name].requires_grad), name
    assert trainable_names(reference) == set()
    assert trainable_names(policy), "the policy itself must stay trainable"
    train(policy)
    assert not torch.equal(logits(policy), start)
    assert torch.equal(logits(reference), start)
    with torch.no_grad():  # and through the path that training takes
        assert not torch.equal(*(models.response_logprobs(m, pad(EXAMPLES))[0] for m in (policy, reference)))


def test_the_reference_keeps_tied_weights_tied(tiny_folder: Path) -> None:
    reference = models.frozen_copy(models.trainable(models.load(tiny_folder)[0], FULL))
    assert reference.lm_head.weight is reference.model.embed_tokens.weight


# Reward models --------------------------------------------------------------------------------------------------------


def test_a_new_reward_model_has_the_trunk_of_its_policy(tiny_folder: Path, adapter_folder: Path) -> None:
    # Another alpha than the adapter's own would scale the adapter, and the policy would be another one.
    for name, lora in ((tiny_folder, FULL), (tiny_folder, LORA), (adapter_folder, LoRAConfig(r=4, alpha=64))):
        policy, _ = models.load(name)
        reward, _ = models.reward_from(name, lora)
        with torch.no_grad():
            assert torch.equal(models.hidden_states(reward, IDS), models.hidden_states(policy, IDS)), (name, lora)


def test_a_new_reward_model_trains_its_adapter_and_head_only_or_everything(
    tiny_folder: Path, adapter_folder: Path
) -> None:
    for name in (tiny_folder, adapter_folder):
        names = trainable_names(models.reward_from(name, LORA)[0])
        heads = {n for n in names if "lora_" not in n}
        assert [n.rpartition("score.")[2] for n in heads] == ["modules_to_save.default.weight"], heads
        assert len(names) == 2 * 2 * 7 + 1
        everything, _ = models.reward_from(name, FULL)
        assert trainable_names(everything) == {n for n, _ in everything.named_parameters()}
        assert not any("lora" in n for n, _ in everything.named_parameters())


def test_a_reward_model_of_all_weights_starts_from_the_merged_adapter(adapter_folder: Path) -> None:
    policy, reward = models.load(adapter_folder)[0], models.reward_from(adapter_folder, FULL)[0]
    with torch.no_grad():
        states = (models.hidden_states(reward, IDS), models.hidden_states(policy, IDS))
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


def test_the_scalar_head_starts_with_deviation_one_over_root_h_plus_1(tiny_folder: Path) -> None:
    heads = [models.reward_from(tiny_folder, FULL, seed)[0].score.weight.detach().flatten() for seed in range(8)]
    size = heads[0].numel()
    assert float(torch.cat(heads).std()) == pytest.approx((size + 1) ** -0.5, rel=0.12)  # four standard errors
    again = models.reward_from(tiny_folder, FULL, 0)[0].score.weight.flatten()
    assert torch.equal(heads[0], again) and not torch.equal(heads[0], heads[1])


def test_the_head_of_a_reward_adapter_is_the_one_of_its_seed(tiny_folder: Path, adapter_folder: Path) -> None:
    batch = pad(EXAMPLES)
    with torch.no_grad():
        plain = models.score_last(models.reward_from(tiny_folder, FULL, seed=5)[0], batch)
        fresh = models.score_last(models.reward_from(tiny_folder, LORA, seed=5)[0], batch)
        onto_adapter = models.score_last(models.reward_from(adapter_folder, LORA, seed=5)[0], batch)
    assert torch.equal(plain, fresh)
    assert not torch.equal(plain, onto_adapter)


def test_a_policy_is_no_reward_model_and_a_reward_model_no_policy(
    tiny_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no weights for score\.weight"):
        models.load_reward(tiny_folder)
    with pytest.raises(ValueError, match="is no reward model"):
        models.load_reward(adapter_folder)
    for name, lora in (("full", FULL), ("lora", LORA)):
        models.save(tmp_path / name, *models.reward_from(tiny_folder, lora))
        models.load_reward(tmp_path / name)
        with pytest.raises(ValueError, match="is a reward model, not a language model"):
            models.load(tmp_path / name)


def test_the_first_of_several_heads_is_the_only_one_and_they_differ(tiny_folder: Path) -> None:
    one = models.reward_from(tiny_folder, FULL, seed=3)[0].score.weight
    several = models.reward_from(tiny_folder, FULL, seed=3, heads=3)[0].score.weight
    assert several.shape[0] == 3 and torch.equal(several[:1], one)
    assert not torch.equal(several[0], several[1]) and not torch.equal(several[1], several[2])


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_a_checkpoint_of_several_heads_loads_here_and_in_plain_libraries(
    tiny_folder: Path, tmp_path: Path, lora: LoRAConfig
) -> None:
    model, tokenizer = models.reward_from(tiny_folder, lora, heads=3)
    models.save(tmp_path / "a", model, tokenizer, {"heads": 3})
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        ours, _ = models.load_reward(tmp_path / "a")
        assert torch.equal(ours(input_ids=IDS).logits, expected) and expected.shape == (len(IDS), 3)
        if lora is FULL:
            plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
        else:
            base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=3)
            plain = PeftModel.from_pretrained(base, tmp_path / "a")
        assert torch.equal(plain.eval()(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("heads", [0, "3", True, None])
def test_a_wrong_number_of_heads_in_a_checkpoint_is_named(tiny_folder: Path, tmp_path: Path, heads: Any) -> None:
    models.save(tmp_path / "a", *models.reward_from(tiny_folder, LORA), extra={"heads": heads})
    with pytest.raises(ValueError, match=r"says heads: .* expected a whole number from 1"):
        models.load_reward(tmp_path / "a")


def test_a_family_without_a_scalar_head_is_refused_by_name(family_config: Callable[..., Any], tmp_path: Path) -> None:
    models.save(tmp_path / "cohere", *models.load(family_config("cohere")))
    with pytest.raises(ValueError, match=r"cohere"):
        models.reward_from(tmp_path / "cohere", LORA)
