"""`rlhf-fast doctor --config`: whether a run fits, what to change if not, and what it costs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig

from rlhf_fast import cli
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig, settings
from rlhf_fast.config.settings import ConfigError, run_yaml
from rlhf_fast.planning import cost, forecast

ROOT = Path(__file__).parents[3]
SHAPE = LlamaConfig(
    hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=2048,
)  # fmt: skip
PREDICTED: dict[str, Any] = {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json and no weights."""
    folder = tmp_path_factory.mktemp("model")
    SHAPE.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer: as right, and counted in a third of the time."""
    folder = tmp_path_factory.mktemp("shallow")
    LlamaConfig(**{**SHAPE.to_dict(), "num_hidden_layers": 1}).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was predicted of a run is not predicted again: the command is called several times for it."""
    predict = forecast.Run.predict

    def once(run: forecast.Run, config: Any, device: Any, available: int) -> Any:
        key = f"{config} {run.shape} {run.rewards} {device} {available}"
        if key not in PREDICTED:
            PREDICTED[key] = predict(run, config, device, available)
        return PREDICTED[key]

    monkeypatch.setattr(forecast.Run, "predict", once)


def write(folder: Path, tree: dict[str, Any]) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = cli.main(["doctor", *words, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo", "ppo"])
def test_the_file_that_a_run_wrote_is_read(verb: str, model: Path, tmp_path: Path) -> None:
    config = forecast.CONFIGS[verb](max_length=77)  # type: ignore[call-arg]
    inputs = {"policy": model, "reward": max} if verb == "ppo" else {"model": model, "data": [1]}
    file = tmp_path / "config.yaml"
    file.write_text(run_yaml(verb, config, **inputs, out="there"))
    run = forecast.read_run(file)
    assert (run.verb, run.config, run.shape.hidden_size, run.rewards) == (verb, config, 128, ())


@pytest.mark.parametrize(
    ("reward", "models"), [("{}", 1), ("rule:math", 0), ("https://there/score", 0), ("1*{}, 0.5*rule:math, 2*{}", 2)]
)
def test_ppo_has_the_reward_models_that_its_file_names(reward: str, models: int, model: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"policy": str(model), "reward": reward.replace("{}", str(model))})
    assert len(forecast.read_run(file).rewards) == models


def test_a_reward_model_has_all_weights_but_the_head(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"policy": str(model), "reward": str(model), "prompts": "p", "out": "o"})
    run = forecast.read_run(file)
    assert len(run.rewards) == 1 and run.config == PPOConfig()
    parts = run.predict(run.config, "cpu", 10**10).phases["rollouts"]
    head = 2 << 20  # 2048 words of 128 numbers, in huge pages
    assert parts["reward models"] == parts["frozen weights"] - head + 4 * 128


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": "m"}, "has 0 of the sections"),
        ({"sft": {}, "dpo": {}}, "has 2 of the sections"),
        ({"sft": {"epoch": 1}}, "unknown setting --epoch; the nearest one is --epochs"),
        ({"model": "no/such/place", "sft": {}}, "give --model FOLDER"),
    ],
)
def test_a_file_that_says_too_little_is_an_error(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        forecast.read_run(write(tmp_path, tree))


@pytest.mark.seconds(5)
def test_a_run_that_fits_is_told_so(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"model": str(model), "sft": {}})
    code, found, err = doctor(capsys, "--config", str(file), "--memory", "8GB")
    assert (code, err, found["fits"], found["changes"]) == (0, "", True, [])
    assert found["peak"] == max(sum(parts.values()) for parts in found["phases"].values()) < 8e9
    assert cli.main(["doctor", "--config", str(file), "--memory", "8GB", "--price", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["GB", "samples", "training", "optimiser", "step"]
    assert any(line.startswith("sft takes most in training") and line.endswith("it fits.") for line in lines)
    assert lines[-1].split()[0] == "all"
    _, found, _ = doctor(capsys, "--config", str(file), "--memory", "8GB", "--price", "2")
    assert found["hours"] and found["dollars"] == pytest.approx(2 * sum(found["hours"].values()))
    _, free, _ = doctor(capsys, "--config", str(file), "--memory", "8GB", "--price", "0")
    assert (free["hours"], free["dollars"]) == (found["hours"], 0.0)


@pytest.mark.seconds(6)
def test_micro_batches_are_the_first_to_be_made_smaller(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    sft = {"max_length": 256, "optim": {"max_tokens_per_microbatch": 8192}}
    file = write(tmp_path, {"model": str(model), "sft": sft})
    _, whole, _ = doctor(capsys, "--config", str(file), "--memory", "8GB")
    limit = int(0.6 * whole["peak"] / (1 - forecast.SPARE))
    code, found, err = doctor(capsys, "--config", str(file), "--memory", str(limit))
    assert code == 1 and "do not fit into the" in err and err.count("\n") == 1
    (change,) = found["changes"]
    assert list(change["settings"]) == ["sft.optim.max_tokens_per_microbatch"] and change["fits"]
    assert 0.5 * whole["peak"] < change["peak"] <= limit * (1 - forecast.SPARE), "as large as it may be"
    # It is what the file has to say.
    sft["optim"] = {"max_tokens_per_microbatch": change["settings"]["sft.optim.max_tokens_per_microbatch"]}
    file = write(tmp_path, {"model": str(model), "sft": sft})
    code, found, _ = doctor(capsys, "--config", str(file), "--memory", str(limit))
    assert (code, found["peak"]) == (0, change["peak"])


@pytest.mark.parametrize(
    ("share", "fits"), [(0.94, True), (0.951, False), (0.97, False), (0.999, False), (1.01, False)]
)
@pytest.mark.seconds(5)
def test_a_run_that_needs_what_is_left_to_the_device_does_not_fit(
    capsys: pytest.CaptureFixture[str], shallow: Path, tmp_path: Path, share: float, fits: bool
) -> None:
    """Between 95 and 100 % of the memory as well; and no number in what is said is the smaller one."""
    file = write(tmp_path, {"model": str(shallow), "sft": {"max_length": 256}})
    _, whole, _ = doctor(capsys, "--config", str(file), "--memory", "8GB")
    limit = int(whole["peak"] / share)
    code, found, err = doctor(capsys, "--config", str(file), "--memory", str(limit))
    assert (code, found["fits"], found["peak"]) == (0 if fits else 1, fits, whole["peak"])
    if fits:
        assert err == "" and found["changes"] == []
        return
    peak, room, all_there = (float(x) for x in re.findall(r"([\d.]+) GB", err))
    assert peak > room and peak == pytest.approx(whole["peak"] / 1e9, rel=1e-3)
    assert room == pytest.approx(0.95 * limit / 1e9, rel=1e-3) and all_there == pytest.approx(limit / 1e9, rel=1e-3)
    assert found["changes"][-1]["fits"] and found["changes"][-1]["peak"] <= 0.95 * limit
    assert cli.main(["doctor", "--config", str(file), "--memory", str(limit)]) == 1
    assert "5% of which are left to the device itself: it does not fit." in capsys.readouterr().out


@pytest.mark.seconds(5)
def test_what_changes_results_comes_last(capsys: pytest.CaptureFixture[str], shallow: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"model": str(shallow), "dpo": {"lora": {"r": 0}}})
    code, found, _ = doctor(capsys, "--config", str(file), "--memory", "1MB")
    assert code == 1 and not any(change["fits"] for change in found["changes"])
    assert [list(change["settings"])[-1] for change in found["changes"]] == [
        "dpo.optim.checkpointing",
        "dpo.lora.r",
        "dpo.dtype",
    ]
    assert cli.main(["doctor", "--config", str(file), "--memory", "1MB"]) == 1
    assert "take shorter sequences, a smaller model or more memory" in capsys.readouterr().out
    peaks = [found["peak"], *(change["peak"] for change in found["changes"])]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5tb", 1.5e12), ("1000", 1000), ("512MiB", 2**29)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert forecast.read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "80 apples", "inf", "nan"])
def test_a_size_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size such as 80GB"):
        forecast.read_bytes(text)


@pytest.mark.parametrize(
    "words",
    [["--price", "-1"], ["--utilisation", "0"], ["--tflops", "inf"], ["--sequences", "0"], ["--device", "tpu"]],
)
def test_settings_out_of_range_are_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, _, err = doctor(capsys, *words)
    assert code == 2 and words[0] in err


# Cost ----------------------------------------------------------------------------------------------------------------

MACHINE = cost.Machine(tflops=100.0, bandwidth=1.0, utilisation=0.5)
DATA = cost.Data(sequences=1000, prompt_tokens=30, response_tokens=50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to look at")
def test_memory_is_looked_up_where_the_run_is_to_be_and_asked_for_where_that_is_not_here() -> None:
    for device in ("auto", "cpu"):
        where, there = forecast.device_and_memory(device, "")
        assert where == "cpu" and there > 1_000_000
    assert forecast.device_and_memory("cuda", "80GB") == ("cuda", 80_000_000_000)
    with pytest.raises(ConfigError, match="no GPU here"):
        forecast.device_and_memory("cuda", "")


def test_products_are_counted_as_on_paper() -> None:
    counts = cost.count(SFTConfig(lora=LoRAConfig(r=0)), SHAPE)
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384  # q, k, v, o; gate, up, down
    assert (counts.trunk, counts.head) == (3 * layer, 128 * 2048)
    assert counts.attention == 3 * 128
    assert cost.forward_operations(counts, 10, 4, 0) == 2 * (10 * counts.trunk + 4 * counts.head)
    adapted = cost.count(SFTConfig(lora=LoRAConfig(r=8)), SHAPE)
    assert adapted.trunk - counts.trunk == adapted.trained < 0.2 * counts.trunk


def test_a_frozen_model_takes_two_thirds_of_the_products_and_recomputing_a_third_more() -> None:
    def hours(r: int, checkpointing: bool) -> float:
        config = SFTConfig(epochs=1, lora=LoRAConfig(r=r), optim=OptimConfig(checkpointing=checkpointing))
        shape = LlamaConfig(**{**SHAPE.to_dict(), "hidden_size": 1024, "intermediate_size": 4096})
        return cost.seconds(config, cost.count(config, shape), DATA, MACHINE)["training"]

    assert hours(1, False) / hours(0, False) == pytest.approx(2 / 3, rel=0.03)
    assert hours(0, True) / hours(0, False) == pytest.approx(4 / 3, rel=0.03)


def test_time_is_in_proportion_to_the_data_and_to_the_machine() -> None:
    config = RewardConfig(epochs=1)
    counts = cost.count(config, SHAPE)
    once = cost.seconds(config, counts, DATA, MACHINE)["training"]
    twice = cost.Data(2000, 30, 50)
    slower = cost.Machine(50.0, 1.0, 0.5)
    assert cost.seconds(config, counts, twice, MACHINE)["training"] == pytest.approx(2 * once)
    assert cost.seconds(config, counts, DATA, slower)["training"] == pytest.approx(2 * once)


def test_generation_is_bound_by_reading_until_there_are_enough_sequences() -> None:
    def rollouts(prompts: int, bandwidth: float) -> float:
        config = PPOConfig(steps=1, prompts_per_step=prompts, samples_per_prompt=1, minibatches=1)
        machine = cost.Machine(1.0, bandwidth, 0.5)
        return cost.seconds(config, cost.count(config, SHAPE), DATA, machine)["rollouts"]

    assert rollouts(1, 0.01) == pytest.approx(2 * rollouts(1, 0.02), rel=0.01)
    assert rollouts(2, 0.01) < 1.2 * rollouts(1, 0.01), "weights are read once for all"
    assert rollouts(128, 10.0) == rollouts(128, 20.0), "products take longer"


def test_reading_a_step_takes_the_weights_and_the_keys_and_values_that_are_there_half_way() -> None:
    config = PPOConfig(steps=3, prompts_per_step=2, samples_per_prompt=4, minibatches=1)
    counts = cost.count(config, SHAPE)
    machine = cost.Machine(1e9, 0.01, 0.5)  # products take no time
    bytes_read = counts.weight_bytes + 8 * (30 + 50 / 2) * counts.kv_bytes
    found = cost.seconds(config, counts, DATA, machine)["rollouts"]
    assert found == pytest.approx(3 * 50 * bytes_read / (0.5 * 0.01 * 1e12), rel=1e-4)


def test_samples_of_an_older_policy_are_read_once_more() -> None:
    def scoring(**options: Any) -> float:
        config = PPOConfig(**options)
        return cost.seconds(config, cost.count(config, SHAPE), DATA, MACHINE)["scoring"]

    assert scoring(lag=1) == scoring(dtype="bfloat16") == pytest.approx(1.5 * scoring())


def test_a_critic_of_its_own_is_read_and_trained_beside_the_policy() -> None:
    def seconds(**options: Any) -> dict[str, float]:
        config = PPOConfig(lora=LoRAConfig(r=0), **options)
        counts = cost.count(config, SHAPE, [SHAPE])
        return cost.seconds(config, dataclasses.replace(counts, head=0, attention=0), DATA, MACHINE)

    shared, critics = seconds(), [seconds(critic=critic) for critic in ("separate", "reward")]
    for own in critics:
        assert own["scoring"] == pytest.approx(1.5 * shared["scoring"])
        assert own["training"] == pytest.approx(2 * shared["training"])
        assert own["rollouts"] == shared["rollouts"]
    assert seconds(critic="separate", advantage="grpo", samples_per_prompt=2)["training"] == pytest.approx(
        seconds(samples_per_prompt=2)["training"]
    )


def test_the_likeliest_responses_of_remax_are_sampled_and_scored() -> None:
    def seconds(advantage: Any) -> dict[str, float]:
        config = PPOConfig(advantage=advantage, samples_per_prompt=1, minibatches=1)
        return cost.seconds(config, cost.count(config, SHAPE), DATA, MACHINE)

    gae, remax = seconds("gae"), seconds("remax")
    assert remax["rollouts"] == pytest.approx(2 * gae["rollouts"])
    assert remax["scoring"] == pytest.approx(1.5 * gae["scoring"])
    assert remax["training"] == gae["training"]


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig, RewardConfig])
def test_a_run_ends_with_its_steps_or_its_data(cls: Any) -> None:
    def training(**options: Any) -> float:
        config = cls(batch_size=10, epochs=2, **options)
        return cost.seconds(config, cost.count(config, SHAPE), DATA, MACHINE)["training"]

    assert training(max_steps=50) == pytest.approx(0.25 * training())
    assert training(max_steps=10_000) == training()


# The pages that hold its figures ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.seconds(15)
def test_the_figures_of_the_documentation_are_what_the_command_gives() -> None:
    """PPO's, which has a term of every kind."""
    from bench import memory

    page = (ROOT / "docs" / "cost.md").read_text()
    assert page.count("$ rlhf-fast doctor") == 3
    ppo = page[page.index("$ rlhf-fast doctor --config examples/7b/ppo.yaml") :]
    assert memory.rendered(ppo) == ppo, "run: python -m bench.memory --docs"


def test_the_examples_are_files_that_their_verbs_take(tmp_path: Path) -> None:
    for verb in ("sft", "reward", "ppo"):
        file = ROOT / "examples" / "7b" / f"{verb}.yaml"
        cls, _ = cli.VERBS[verb]
        command = settings.build(cls, file, [])
        run = forecast.read_run(file, str(ROOT / "examples" / "7b"))
        assert run.verb == verb and run.config == getattr(command, verb)
        assert run.config.dtype == "bfloat16" and run.config.lora.r > 0
