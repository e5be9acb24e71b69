"""The settings of chat templates in all trainers, and what of them stays with checkpoints and runs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    Generator,
    LoRAConfig,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SamplingParams,
    SFTConfig,
    SFTTrainer,
    models,
)  # fmt: skip
from rlhf_fast.data.records import read_prompts
from rlhf_fast.data.tokenize import tokenize_example, tokenize_prompt
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.trainers.loop import chat_settings
from tests.scenarios.trainers.test_resume import interrupted

LED = "{{ 'be ' + mood if mood else '' }}" + CHAT_TEMPLATE
DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE
ROWS = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(12)]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes!", "rejected": "no"} for i in range(6)]
SMALL = {"max_new_tokens": 4, "steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2, "minibatches": 1, "epochs": 1}


def folder_with(template: str | None, tiny: tuple[Any, Any], folder: Path) -> Path:
    model, tokenizer = tiny
    tokenizer.chat_template = template
    models.save(folder, model, tokenizer)
    return folder


def zero(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.0] * len(responses)


def test_every_trainer_takes_them_and_its_checkpoint_keeps_them(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    base = folder_with(LED, tiny, tmp_path / "base")
    chat = {"template_kwargs": {"mood": "kind"}, "lora": LoRAConfig(r=4)}
    begin = tiny[1]("be kind", add_special_tokens=False)["input_ids"]
    sft = SFTTrainer(base, ROWS, tmp_path / "sft", SFTConfig(samples=0, epochs=1, **chat))
    reward = RewardTrainer(base, PAIRS, tmp_path / "reward", RewardConfig(**chat))
    dpo = DPOTrainer(base, PAIRS, tmp_path / "dpo", DPOConfig(**chat))
    ppo = PPOTrainer(base, zero, ROWS, tmp_path / "ppo", PPOConfig(**SMALL, **chat))
    asked = [
        sft.training[0][0].input_ids, reward.training[0].examples[0].prompt, dpo.training[0].examples[0].prompt,
        ppo.sampler.take(1)[0].rollouts.examples()[0].prompt,
    ]  # fmt: skip
    assert all(list(ids[: len(begin)]) == begin for ids in asked)
    for trainer in (sft, reward):
        trainer.train()
    assert yaml.safe_load((tmp_path / "sft" / "config.yaml").read_text())["sft"]["template_kwargs"] == {"mood": "kind"}
    # Whoever goes on from these checkpoints asks as they were trained, unless told otherwise.
    model, tokenizer = models.load(tmp_path / "sft")
    params = SamplingParams(max_new_tokens=2)
    assert Generator(model, tokenizer).generate(["q"], params).examples()[0].prompt[: len(begin)] == tuple(begin)
    lax = {**SMALL, "min_reward_agreement": 0.0, "lora": LoRAConfig(r=4)}
    later = PPOTrainer(tmp_path / "sft", tmp_path / "reward", ROWS, tmp_path / "ppo2", PPOConfig(**lax))
    assert list(later.sampler.take(1)[0].rollouts.examples()[0].prompt[: len(begin)]) == begin
    assert list(RewardModel(tmp_path / "reward").examples(["q"], ["a"])[0].prompt[: len(begin)]) == begin
    other = PPOConfig(**lax, template_kwargs={"mood": "rude"})
    rude = PPOTrainer(tmp_path / "sft", zero, ROWS, tmp_path / "ppo3", other)
    assert rude.tokenizer.decode(rude.sampler.take(1)[0].rollouts.examples()[0].prompt).startswith("be rude")


def test_a_template_is_given_to_a_base_model_and_saved_with_it(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    base = folder_with(None, tiny, tmp_path / "base")
    rows = [{"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": f"q{i}"},
                          {"role": "assistant", "content": "a"}]} for i in range(4)]  # fmt: skip
    with pytest.raises(ValueError, match="row 0: the tokenizer has no chat template, which messages of"):
        SFTTrainer(base, rows, tmp_path / "sft")
    SFTTrainer(base, rows, tmp_path / "sft", SFTConfig(chat_template="plain", samples=0, epochs=1)).train()
    tokenizer = models.load(tmp_path / "sft")[1]
    assert tokenizer.decode(tokenize_prompt(tokenizer, "q")) == "User: q\n\nAssistant:"
    with pytest.raises(ValueError, match="chat_template: chatml needs the token"):
        SFTTrainer(base, rows, tmp_path / "sft2", SFTConfig(chat_template="chatml"))
    assert not (tmp_path / "sft2").exists(), "before anything is written"


def test_special_tokens_are_parsed_where_that_is_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a<user>b"} for i in range(3)]
    plain, parsed = (
        SFTTrainer(tiny_folder, rows, tmp_path / str(parse), SFTConfig(parse_special_tokens=parse, samples=0))
        for parse in (False, True)
    )
    user = plain.tokenizer.convert_tokens_to_ids("<user>")
    assert [sft.training[0][0].input_ids.count(user) for sft in (plain, parsed)] == [1, 2]


def test_a_run_goes_on_after_midnight_with_the_day_that_it_began(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder_with(DATED, tiny, tmp_path / "base")

    class Clock(datetime.date):
        now = datetime.date(2026, 1, 31)

        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return cls.now

    monkeypatch.setattr(chat_settings.datetime, "date", Clock)
    run = tmp_path / "run"
    interrupted(base, run, monkeypatch)
    Clock.now = datetime.date(2026, 2, 1)
    config = SFTConfig(batch_size=2, lora=LoRAConfig(r=4))
    resumed = SFTTrainer(base, [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(12)], run, config)
    assert resumed.tokenizer.decode(resumed.training[0][0].input_ids).startswith("2026-01-31")
    resumed.train()
    assert yaml.safe_load((run / "config.yaml").read_text())["sft"]["date"] == "2026-01-31"
    # The day is the run's own: another run has its own, also from the checkpoint of this one, and may be told one.
    fresh = SFTTrainer(run, ROWS, tmp_path / "other", config)
    assert fresh.tokenizer.decode(fresh.training[0][0].input_ids).startswith("2026-02-01")
    told = SFTTrainer(run, ROWS, tmp_path / "told", SFTConfig(date="2020-02-29", lora=LoRAConfig(r=4)))
    assert told.tokenizer.decode(told.training[0][0].input_ids).startswith("2020-02-29")
    with pytest.raises(ValueError, match="date: '2020-02-30'; expected a day such as 2026-01-31"):
        SFTConfig(date="2020-02-30")


def test_a_reward_model_reads_the_run_s_day_and_the_rows_tools(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    template = DATED.replace("{% for message", "{{ tools[0].name if tools else '' }}{% for message", 1)
    base = folder_with(template, tiny, tmp_path / "base")
    RewardTrainer(base, PAIRS, tmp_path / "reward", RewardConfig(date="2001-01-01", lora=LoRAConfig(r=4))).train()
    rows = [{"prompt": "q", "tools": [{"name": "clock"}]}, {"prompt": "r"}]
    config = PPOConfig(**SMALL, date="2002-02-02", min_reward_agreement=0.0)
    ppo = PPOTrainer(base, tmp_path / "reward", rows, tmp_path / "ppo", config)
    (part,) = ppo.reward.parts
    columns = part.wants.of(ppo.prompts, part.name)
    examples = part.function.examples(["q", "r"], ["a", "b"], **columns)
    texts = [ppo.tokenizer.decode(example.prompt) for example in examples]
    assert texts[0].startswith("2002-02-02clock") and texts[1].startswith("2002-02-02<user>")
    ppo.train()


def test_whatever_a_policy_wrote_is_scored_where_a_demonstration_of_it_would_be_refused(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    """A thought, where the generation prompt has closed the only place for it."""
    closed = "{% if add_generation_prompt %}<assistant><think>\n\n</think>\n\n{% endif %}"
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    base = folder_with(turns + closed, tiny, tmp_path / "base")
    RewardTrainer(base, PAIRS, tmp_path / "reward", RewardConfig(lora=LoRAConfig(r=4))).train()
    reward, thought = RewardModel(tmp_path / "reward"), "<think>Hm.</think>Yes."
    with pytest.raises(ValueError, match="has a thought, for which the generation prompt leaves no place"):
        tokenize_example(reward.tokenizer, "q", thought)
    (example,) = reward.examples(["q"], [thought])
    assert reward.tokenizer.decode(example.prompt + example.response).endswith(thought + "<eos>")
    assert len(reward(["q", "q"], [thought, "Yes."])) == 2


def test_prompts_that_the_reward_model_could_not_read_are_refused_before_sampling(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    base = folder_with(CHAT_TEMPLATE, tiny, tmp_path / "base")
    no_system = "{% for m in messages if m.role != 'system' %}<user>{{ m.content }}<eos>{% endfor %}"
    other = folder_with(no_system, models.load(base), tmp_path / "other")
    RewardTrainer(other, PAIRS, tmp_path / "reward", RewardConfig(lora=LoRAConfig(r=4))).train()
    prompts = read_prompts([{"prompt": [{"role": r, "content": c} for r, c in (("system", "Be."), ("user", "q"))]}] * 2)
    with pytest.raises(ValueError, match="the chat template does not render message 0, of role 'system'"):
        PPOTrainer(base, tmp_path / "reward", prompts, tmp_path / "ppo", PPOConfig(**SMALL, min_reward_agreement=0))


@pytest.mark.parametrize("failure", ["raise_exception('no such words')", "1 // 0", "messages[9]['content']['x']"])
def test_what_a_template_refuses_is_named_by_file_and_line_in_every_trainer(
    failure: str, tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    refusal = "{% if 'odd' in messages[0]['content'] %}{{ " + failure + " }}{% endif %}"
    base = folder_with(refusal + CHAT_TEMPLATE, tiny, tmp_path / "base")
    row = {"completion": "a", "chosen": "a", "rejected": "b"}
    lines = [json.dumps({"prompt": prompt, **row}) for prompt in ("q0", "q1", "odd", "q3")]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    makers: list[Any] = [
        lambda: SFTTrainer(base, data, tmp_path / "sft"),
        lambda: RewardTrainer(base, data, tmp_path / "reward"),
        lambda: DPOTrainer(base, data, tmp_path / "dpo"),
        lambda: PPOTrainer(base, zero, data, tmp_path / "ppo", PPOConfig(**SMALL)),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=r"rows\.jsonl line 3: the chat template refuses the messages: "):
            make()


def test_settings_of_a_row_that_no_template_takes_are_named_by_the_row(tiny_folder: Path, tmp_path: Path) -> None:
    for kwargs in ({"messages": []}, {"mood": object()}):
        rows = [ROWS[0], {**ROWS[1], "chat_template_kwargs": kwargs}]
        with pytest.raises(ValueError, match=r"^row 1: "):
            SFTTrainer(tiny_folder, rows, tmp_path / "sft")
