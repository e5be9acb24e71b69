"""Supervised fine-tuning: what is learned from, what is held out, and what is left on the disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, BloomConfig

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.cli import main
from rlhf_fast.config import LoRAConfig, OptimConfig, SFTConfig
from rlhf_fast.data.batches import shuffled
from rlhf_fast.data.conversations import batch_of
from rlhf_fast.trainers.sft import SFTTrainer, batch_loss

CHAT = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "second one"},
]
CHATS = [
    [{**message, "content": message["content"] * (1 + i % 3) + str(i)} for message in CHAT[: 2 + 2 * (i % 2)]]
    for i in range(9)
]
DROPS_THOUGHTS = (
    "{{ message['content'] if loop.last or message['role'] != 'assistant' "
    "else message['content'].split('</think>')[-1] }}"
)
ROWS = [{"prompt": f"say {letter}", "completion": letter * 3} for letter in "abcdefghij"]


def trainer(folder: Path, out: Path, **options: object) -> SFTTrainer:
    return SFTTrainer(folder, ROWS, out, SFTConfig(lora=LoRAConfig(r=0), **options))  # type: ignore[arg-type]


def test_the_loss_is_on_every_answer_and_its_end_only(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    sft = SFTTrainer(tiny_folder, rows, tmp_path, SFTConfig(lora=LoRAConfig(r=0), samples=0))
    (conversation,) = max(sft.training + sft.heldout, key=lambda of: len(of[0]))
    ids, eos = conversation.input_ids, sft.tokenizer.eos_token_id
    logits = sft.model(input_ids=torch.tensor([ids])).logits[0].detach()
    logprobs = torch.log_softmax(logits.double(), -1)
    learned, answers = 0.0, ["first", "second one"]
    for answer in answers:  # found by their text, since each stands there once
        tokens = [*sft.tokenizer(answer, add_special_tokens=False)["input_ids"], eos]
        (start,) = [i for i in range(len(ids)) if list(ids[i : i + len(tokens)]) == tokens]
        learned -= sum(float(logprobs[start + i - 1, token]) for i, token in enumerate(tokens))
    assert conversation.learned == sum(map(len, answers)) + len(answers)
    assert float(batch_loss(sft.model, batch_of([conversation]), 1).detach()) == pytest.approx(learned, rel=1e-5)


@pytest.mark.parametrize("r", [0, 4])
def test_loss_and_gradient_are_the_same_packed_padded_or_one_by_one_in_any_order(
    r: int, family: Any, tmp_path: Path
) -> None:
    """To 1e-6 of the gradient's norm in float32, whatever the micro-batch. Gemma 2 attends by itself, and is padded."""
    models.save(tmp_path / "model", *models.load(family))
    config = SFTConfig(lora=LoRAConfig(r=r), samples=0)
    sft = SFTTrainer(tmp_path / "model", [{"messages": chat} for chat in CHATS], tmp_path / "run", config)
    assert (sft.longest_packed > 0) == (family.model_type != "gemma2")
    parameters = [p for p in sft.model.parameters() if p.requires_grad]
    with torch.no_grad():  # an adapter begins at zero, and half of its gradient with it
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))

    def found(max_tokens: int, packed: bool, order: list[int]) -> tuple[float, torch.Tensor, int]:
        sft.budget.tokens = max_tokens
        sft.longest_packed = longest if packed else 0
        for parameter in parameters:
            parameter.grad = None
        total, steps = 0.0, 0
        for loss, _ in sft._losses([demonstrations[i] for i in order]):
            loss.backward()
            total, steps = total + float(loss.detach()), steps + 1
        gradient = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        return total, gradient, steps

    longest, demonstrations = sft.longest_packed, sft.training
    forwards = list(range(len(demonstrations)))
    loss, gradient, steps = found(1, False, forwards)
    assert steps == len(forwards)
    assert gradient.norm() > 1e-3
    for max_tokens, packed in ((1, True), (60, True), (60, False), (1000, True), (1000, False)):
        for order in (forwards, forwards[::-1], shuffled(forwards, 5)):
            other_loss, other, steps = found(max_tokens, packed, order)
            assert other_loss == pytest.approx(loss, rel=1e-6)
            assert float((gradient - other).norm() / gradient.norm()) < 1e-6
            assert max_tokens < 1000 or steps == 1


def test_demonstrations_whose_template_changes_its_mind_are_read_for_each_answer(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    """And stay together: none of a demonstration's answers is held out while others are learned."""
    model, tokenizer = tiny
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message['content'] }}", DROPS_THOUGHTS)
    models.save(tmp_path / "model", model, tokenizer)
    chats = [[*CHAT[:1], {"role": "assistant", "content": f"<think>hm {i}</think>{i}"}, *CHAT[2:]] for i in range(10)]
    with pytest.warns(UserWarning, match="10 of 10 demonstrations are read anew for some of their answers"):
        sft = SFTTrainer(tmp_path / "model", [{"messages": chat} for chat in chats], tmp_path / "run", SFTConfig())
    assert (len(sft.training), len(sft.heldout)) == (9, 1)
    assert all(len(of) == 2 for of in sft.training + sft.heldout)
    sft.train()


def test_each_evaluation_leaves_what_the_model_says_and_changes_nothing_else(tiny_folder: Path, tmp_path: Path) -> None:
    def lines(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def run(samples: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bytes]:
        out, optim = tmp_path / str(samples), OptimConfig(lr=0.01)
        config = SFTConfig(batch_size=3, heldout=0.3, samples=samples, sample_tokens=5, optim=optim)
        SFTTrainer(tiny_folder, ROWS, out, config).train()
        metrics = [{**row, "seconds": 0} for row in lines(out / "metrics.jsonl")]
        weights = (out / "checkpoints" / "step-6" / "adapter_model.safetensors").read_bytes()
        return metrics, lines(out / "samples.jsonl"), weights

    metrics, samples, weights = run(2)
    assert (metrics, [], weights) == run(0)
    evaluated = [row["step"] for row in metrics if "heldout_loss" in row]
    assert [row["step"] for row in samples] == [step for step in evaluated for _ in range(2)]
    assert {row["prompt"] for row in samples} < {row["prompt"] for row in ROWS}
    model, tokenizer = models.load(tmp_path / "2")
    last = samples[-2:]
    again = Generator(model, tokenizer).generate(
        [row["prompt"] for row in last], SamplingParams(temperature=0.0, max_new_tokens=5)
    )
    assert again.texts == [row["text"] for row in last]
    assert [reason == "stop" for reason in again.finish_reasons] == [row["finished"] for row in last]


def test_a_prompt_near_the_models_context_gets_a_shorter_sample(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    model.config.max_position_embeddings = 24
    models.save(tmp_path / "model", model, tokenizer)
    rows = [{"prompt": "x" * length, "completion": "y"} for length in (19, 19)]
    SFTTrainer(tmp_path / "model", rows, tmp_path / "run", SFTConfig(epochs=1)).train()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(len(row["text"].encode(errors="ignore")) <= 3 * 3 for row in samples)


def test_a_model_that_cannot_be_sampled_from_is_trained_all_the_same(tmp_path: Path) -> None:
    models.save(tmp_path / "model", *models.load(BloomConfig(vocab_size=260, hidden_size=32, n_layer=1, n_head=2)))
    with pytest.warns(UserWarning, match="no samples at evaluations"):
        sft = SFTTrainer(tmp_path / "model", ROWS, tmp_path / "run", SFTConfig(epochs=1))
    assert sft.longest_packed == 0
    assert math.isfinite(sft.train()["summary"]["heldout_loss"])


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
