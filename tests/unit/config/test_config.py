"""Settings: what overrides what, which mistakes are named, and the range of every setting."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.config import (
    AnnotateConfig,
    AnnotatorConfig,
    ComparisonsConfig,
    DemoConfig,
    DPOConfig,
    EvaluationConfig,
    LoRAConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    tiny_demo,
)
from rlhf_fast.config.settings import (
    ConfigError,
    build,
    changes,
    describe,
    flatten,
    from_flat,
    keys,
    run_yaml,
    to_dict,
    to_yaml,
)


@dataclass(frozen=True)
class Inner:
    ratio: float = 0.5  # of something
    limit: float | None = None
    kind: Literal["near", "far"] = "near"


@dataclass(frozen=True)
class Outer:
    """A stand-in with every type that a setting can have."""

    name: str
    count: int = 3
    loud: bool = False
    max_len: int = 8
    inner: Inner = field(default_factory=Inner)


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def outer(*arguments: str, file: Path | None = None) -> Outer:
    return build(Outer, file, ["--name", "x", *arguments])


def test_the_command_line_goes_before_yaml_and_yaml_before_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "count: 5\ninner:\n  ratio: 0.25\n  kind: far\n")
    assert outer(file=file) == Outer("x", count=5, inner=Inner(ratio=0.25, kind="far"))
    assert outer("--inner.ratio", "0.75", file=file) == Outer("x", count=5, inner=Inner(ratio=0.75, kind="far"))
    assert outer() == Outer("x")


def test_a_base_replaces_the_defaults_and_yields_to_yaml_and_command_line(tmp_path: Path) -> None:
    base = Outer("base", count=7, max_len=9, inner=Inner(ratio=0.1, limit=4.0))
    file = write(tmp_path, "max_len: 10\n")
    built = build(Outer, file, ["--inner.ratio=0.2"], base)
    assert built == Outer("base", count=7, max_len=10, inner=Inner(ratio=0.2, limit=4.0))


@pytest.mark.parametrize("arguments", [["--inner.ratio", "0.1"], ["--inner.ratio=0.1"]])
def test_dotted_keys_reach_nested_settings_with_and_without_an_equals_sign(arguments: list[str]) -> None:
    assert outer(*arguments).inner.ratio == 0.1


def test_a_hyphen_may_stand_for_an_underscore() -> None:
    assert outer("--max-len", "5").max_len == 5


def test_a_value_keeps_its_own_equals_signs_and_hyphens() -> None:
    assert build(Outer, None, ["--name=a-b=c"]).name == "a-b=c"


def test_a_negative_number_is_a_value_and_no_key() -> None:
    assert outer("--count", "-2").count == -2


@pytest.mark.parametrize(
    ("arguments", "loud"),
    [
        (["--loud"], True),
        (["--loud", "--count", "1"], True),
        (["--loud", "true"], True),
        (["--loud", "False"], False),
        (["--loud=TRUE"], True),
    ],
)
def test_a_true_or_false_setting_may_stand_alone(arguments: list[str], loud: bool) -> None:
    assert outer(*arguments).loud is loud


@pytest.mark.parametrize("arguments", [["--count"], ["--count", "--loud"], ["--name", "--count", "1"]])
def test_other_settings_need_a_value(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"^{arguments[0]} needs a value; "):
        build(Outer, None, arguments)


def test_a_value_that_looks_like_a_key_is_given_after_an_equals_sign() -> None:
    assert build(Outer, None, ["--name=--count"]).name == "--count"


def test_a_word_without_a_key_is_named() -> None:
    with pytest.raises(ConfigError, match="'stray' stands where a --key was expected"):
        outer("--count", "1", "stray")


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_unsets_an_optional_setting(word: str, tmp_path: Path) -> None:
    base = Outer("x", inner=Inner(limit=2.0))
    assert build(Outer, None, ["--inner.limit", word], base).inner.limit is None
    assert build(Outer, write(tmp_path, "inner: {limit: null}"), [], base).inner.limit is None


def test_an_optional_setting_takes_a_number() -> None:
    assert outer("--inner.limit", "1.5").inner.limit == 1.5


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("count", "1.5", "a whole number"),
        ("count", "many", "a whole number"),
        ("count", "none", "a whole number"),
        ("count", "inf", "a whole number"),
        ("loud", "maybe", "true or false"),
        ("loud", "1", "true or false"),
        ("inner.ratio", "abc", "a number"),
        ("inner.ratio", "", "a number"),
        ("inner.ratio", "nan", "a number"),
        ("inner.limit", "abc", "a number"),
        ("inner.kind", "middle", "one of 'near', 'far'"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_named_with_its_key_and_type(key: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        outer(f"--{key}={value}")
    assert str(caught.value) == f"--{key}: {value!r} is not {expected}"


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("count: 1.5", "count", "a whole number"),
        ("count: .inf", "count", "a whole number"),
        ("count: true", "count", "a whole number"),
        ("count: [1]", "count", "a whole number"),
        ("count: ", "count", "a whole number"),
        ("loud: 1", "loud", "true or false"),
        ("inner: {ratio: true}", "inner.ratio", "a number"),
        ("inner: {ratio: .nan}", "inner.ratio", "a number"),
        ("inner: {ratio: 2024-01-01}", "inner.ratio", "a number"),
        (f"inner: {{ratio: 1{'0' * 400}}}", "inner.ratio", "a number"),
        ("inner: {kind: [near]}", "inner.kind", "one of"),
        ("name: 12", "name", "text"),
    ],
)
def test_a_wrong_value_in_yaml_is_named_with_its_key_and_type(
    tmp_path: Path, text: str, key: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^--{key}: .* is not {expected}"):
        build(Outer, write(tmp_path, text), [])


def test_a_whole_number_written_as_a_float_in_yaml_is_one(tmp_path: Path) -> None:
    built = outer(file=write(tmp_path, "count: 5.0\ninner: {ratio: 1e-4}\n"))  # YAML 1.1 reads 1e-4 as text
    assert built.count == 5 and isinstance(built.count, int)
    assert built.inner.ratio == 1e-4


@pytest.mark.parametrize(
    ("given_key", "nearest"),
    [("ppo.kl_cof", "ppo.kl_coef"), ("kl_cof", "ppo.kl_coef"), ("kl_coef", "ppo.kl_coef"), ("modle", "model")],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path, given_key: str, nearest: str) -> None:
    message = f"unknown setting --{given_key}; the nearest one is --{nearest}"
    with pytest.raises(ConfigError) as on_command_line:
        build(DemoConfig, None, [f"--{given_key}", "1"])
    with pytest.raises(ConfigError) as in_yaml:
        build(DemoConfig, write(tmp_path, f"{given_key}: 1"), [])
    assert str(on_command_line.value) == str(in_yaml.value) == message


def test_an_unknown_key_inside_a_yaml_section_is_named_with_its_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting --ppo\.kl_cof; the nearest one is --ppo\.kl_coef"):
        build(DemoConfig, write(tmp_path, "ppo:\n  kl_cof: 1\n"), [])


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--name is missing"):
        build(Outer, None, ["--count", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "should hold keys and values, not a list"),
        ("just words", "should hold keys and values, not a str"),
        ("a: [1", "is not YAML"),
        ("a: \x00", "is not YAML"),
        (b"a: \xff\xfe", "is not YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        build(Outer, file, [])
    assert str(caught.value).startswith(f"--config: {file} {message}")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for file in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError) as caught:
            build(Outer, file, [])
        assert str(caught.value).startswith(f"--config: {file} cannot be read: ")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert outer(file=write(tmp_path, "# only a comment\n")) == Outer("x")


CONFIGS = [
    AnnotateConfig,
    AnnotatorConfig,
    ComparisonsConfig,
    DemoConfig,
    DPOConfig,
    EvaluationConfig,
    LoRAConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
]


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_config_is_frozen_and_comes_back_from_its_own_yaml(cls: type, tmp_path: Path) -> None:
    config: Any = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    assert build(cls, write(tmp_path, to_yaml(config)), []) == config


def test_the_tiny_demo_comes_back_from_its_own_yaml(tmp_path: Path) -> None:
    assert build(DemoConfig, write(tmp_path, to_yaml(tiny_demo())), []) == tiny_demo()


outers = st.builds(
    Outer,
    name=st.text(),
    count=st.integers(),
    loud=st.booleans(),
    max_len=st.integers(),
    inner=st.builds(
        Inner,
        ratio=st.floats(allow_nan=False),
        limit=st.none() | st.floats(allow_nan=False),
        kind=st.sampled_from(["near", "far"]),
    ),
)


@settings(max_examples=40, deadline=None)
@given(outers)
def test_any_config_comes_back_from_yaml(tmp_path_factory: pytest.TempPathFactory, config: Outer) -> None:
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_bytes(to_yaml(config).encode())
    assert build(Outer, file, []) == config


@settings(max_examples=40, deadline=None)
@given(outers)
def test_any_config_comes_back_from_the_command_line(config: Outer) -> None:
    arguments = [f"--{key}={value}" for key, value in flatten(to_dict(config)).items()]
    assert build(Outer, None, arguments) == config


@dataclass(frozen=True)
class Lists:
    ids: tuple[int, ...] = ()  # some
    names: tuple[str, ...] = ("a",)


def test_lists_are_words_with_commas_or_lists_of_yaml(tmp_path: Path) -> None:
    assert build(Lists, None, ["--ids", "1, 2", "--names="]) == Lists((1, 2), ())
    (tmp_path / "c.yaml").write_text("ids: [3]\nnames: x,y\n")
    assert build(Lists, tmp_path / "c.yaml", []) == Lists((3,), ("x", "y"))
    (tmp_path / "c.yaml").write_text(to_yaml(Lists((4, 5))))
    assert build(Lists, tmp_path / "c.yaml", []) == Lists((4, 5))
    assert [row[1:3] for row in describe(Lists)] == [("int,...", "none"), ("str,...", "('a',)")]
    with pytest.raises(ConfigError, match="--ids: 'x' is not a whole number"):
        build(Lists, None, ["--ids", "1,x"])
    (tmp_path / "c.yaml").write_text("ids: 3\n")
    with pytest.raises(ConfigError, match="--ids: 3 is not a list; give it as 1,2"):
        build(Lists, tmp_path / "c.yaml", [])


def test_keys_are_the_flattened_fields_in_order() -> None:
    assert keys(Outer) == ["name", "count", "loud", "max_len", "inner.ratio", "inner.limit", "inner.kind"]
    assert keys(Outer) == list(flatten(to_dict(Outer("x"))))


def test_descriptions_give_type_default_and_the_comment_of_the_source() -> None:
    rows = {key: rest for key, *rest in describe(Outer)}
    assert rows["name"] == ["str", "required", ""]
    assert rows["inner.ratio"] == ["float", "0.5", "of something"]
    assert rows["inner.limit"] == ["float or none", "none", ""]
    assert rows["inner.kind"] == ["near|far", "near", ""]


# Ranges --------------------------------------------------------------------------------------------------------------

BAD = {
    LoRAConfig: {"r": [-1], "alpha": [0.0, -1.0]},
    OptimConfig: {
        "lr": [0.0, -1e-4, math.inf],
        "warmup": [-0.1, 1.1],
        "weight_decay": [-0.1],
        "adam_eps": [0.0],
        "max_grad_norm": [-1.0, 0.0],
        "max_tokens_per_microbatch": [0],
        "max_skipped": [-1],
    },
    RunConfig: {"save_every": [-1], "keep_last": [0]},
    SFTConfig: {
        "epochs": [-1, 0],
        "max_steps": [0],
        "batch_size": [0],
        "heldout": [-0.1, 1.0, 1.5],
        "samples": [-1],
        "sample_tokens": [0],
        "patience": [0],
        "max_length": [0],
        "seed": [-1],
    },
    RewardConfig: {
        "epochs": [0],
        "max_steps": [0],
        "batch_size": [0],
        "heldout": [-0.5, 1.5],
        "center_coef": [-1.0],
        "patience": [0],
        "heads": [0],
        "lcb": [-0.5, math.inf],
        "normalize_samples": [-1],
        "max_new_tokens": [0],
        "max_length": [0],
        "seed": [-1],
    },
    DPOConfig: {
        "epochs": [0],
        "max_steps": [0],
        "batch_size": [0],
        "heldout": [1.0],
        "beta": [0.0, -0.1],
        "label_smoothing": [-0.1, 0.5],
        "patience": [0],
        "max_length": [0],
        "seed": [-1],
    },
    PPOConfig: {
        "steps": [0],
        "prompts_per_step": [0],
        "samples_per_prompt": [0],
        "max_new_tokens": [0],
        "temperature": [0.0, -1.0, math.inf],
        "epochs": [-1],
        "minibatches": [0],
        "kl_coef": [-0.1],
        "kl_target": [0.0],
        "kl_horizon": [0.0],
        "max_kl": [0.0],
        "max_update_kl": [0.0],
        "critic_warmup": [-1],
        "gamma": [-0.1, 1.1],
        "lam": [-0.1, 1.1],
        "clip_low": [-0.2],
        "clip_high": [-0.2],
        "dual_clip": [1.0, 0.5, math.inf],
        "value_clip": [-0.2],
        "value_coef": [-0.1],
        "reward_clip": [-1.0],
        "missing_eos_penalty": [-1.0],
        "min_reward_agreement": [-0.1, 1.1],
        "reward_timeout": [0.0, -1.0, math.inf],
        "reward_retries": [-1],
        "reward_batch": [0],
        "resample": [-1],
        "lag": [-1, 2],
        "rollout_cap": [0.0, -1.0, math.inf],
        "tau_pos": [0.0, -1.0, math.inf],
        "tau_neg": [0.0, -1.0, math.inf],
        "max_length": [0],
        "seed": [-1],
    },
    AnnotatorConfig: {"error_rate": [-0.1, 0.5, 1.0], "tie_margin": [-0.1, 1.1]},
    EvaluationConfig: {
        "samples_per_prompt": [0],
        "max_new_tokens": [0],
        "temperature": [-1.0],
        "tie_margin": [-0.1, math.inf],
        "seed": [-1],
    },
    AnnotateConfig: {
        "judgements": [0],
        "lease": [0.0, math.inf],
        "gold_share": [-0.1, 0.95, 1.1],
        "repeat_share": [-0.1, 0.95, 1.1],
        "repeat_after": [0],
        "random_share": [-0.1, 0.0, 1.1],
        "least_seconds": [-1.0, math.inf],
        "reports": [0],
        "dispute_below": [-0.1, 1.1],
        "samples_per_model": [0],
        "max_new_tokens": [0],
        "temperature": [0.0],
        "seed": [-1],
        "warnings": [{"a": 1}, {"a": " "}],
    },
    DemoConfig: {"pairs": [3], "port": [-1, 65536]},
    ComparisonsConfig: {
        "prompts": [-1],
        "samples_per_prompt": [1],  # one reply cannot be compared
        "max_new_tokens": [0],
        "temperature": [0.0],
        "seed": [-1],
    },
}
BAD_VALUES = [(cls, name, value) for cls, names in BAD.items() for name, values in names.items() for value in values]


@pytest.mark.parametrize(("cls", "name", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_named_with_what_was_expected(cls: type, name: str, value: float) -> None:
    with pytest.raises(ValueError) as caught:
        cls(**{name: value})
    assert str(caught.value).startswith(f"{name}: {value}; expected ")


def test_responses_are_only_compared_with_others() -> None:
    with pytest.raises(ValueError, match="samples_per_prompt: 1; expected at least 2 for advantage 'rloo', which"):
        PPOConfig(samples_per_prompt=1, advantage="rloo")
    assert PPOConfig(samples_per_prompt=1).advantage == "gae"


def test_what_compares_responses_is_asked_for_where_they_are_compared() -> None:
    with pytest.raises(ValueError, match="scale: 'group'; expected none, as advantage 'gae' has its own"):
        PPOConfig(scale="group")
    with pytest.raises(
        ValueError, match="resample: 2; expected 0, as equal scores do say something to advantage 'gae'"
    ):
        PPOConfig(resample=2)
    with pytest.raises(ValueError, match="resample: 1 with lag: 1; expected one of them to be 0"):
        PPOConfig(resample=1, lag=1, advantage="grpo")


@pytest.mark.parametrize(
    ("advantage", "papers", "loss"),
    [
        ("gae", None, "k3"),
        ("grpo", "k3", "k3"),
        ("dr_grpo", "k3", "k3"),
        ("rloo", None, "k3"),
        ("reinforce++", "k2", "k2"),
        ("remax", None, "k3"),
    ],
)
def test_the_kl_penalty_is_where_the_paper_has_it_unless_told(advantage: Any, papers: str | None, loss: str) -> None:
    found = [PPOConfig(advantage=advantage, kl_in=kl_in).kl_estimator for kl_in in (None, "loss", "reward")]
    assert found == [papers, loss, None]


def test_a_warmup_needs_a_critic_and_a_tracker_a_name() -> None:
    with pytest.raises(ValueError, match="critic_warmup: 2; expected 0, as advantage 'rloo' has no critic"):
        PPOConfig(critic_warmup=2, advantage="rloo")
    with pytest.raises(ValueError, match="trackers: 'wandbb'; expected some of tensorboard, wandb and trackio"):
        RunConfig(trackers=("wandbb",))


def test_a_bound_of_negative_advantages_is_of_the_clipped_objective() -> None:
    with pytest.raises(ValueError, match=r"dual_clip: 3\.0; expected none with objective 'cispo', which bounds"):
        PPOConfig(dual_clip=3.0, objective="cispo")
    assert PPOConfig(dual_clip=3.0).objective == "clip"
    with pytest.raises(
        ValueError, match=r"tau_pos, tau_neg: 1, 2; expected none of them set with objective 'clip', as"
    ):
        PPOConfig(tau_neg=2.0)
    assert PPOConfig(tau_neg=2.0, objective="sapo").tau_pos == 1


def test_there_are_no_more_minibatches_than_sequences() -> None:
    with pytest.raises(ValueError, match="minibatches: 9; expected at most the 8 sequences of a step"):
        PPOConfig(prompts_per_step=4, samples_per_prompt=2, minibatches=9)
    assert PPOConfig(prompts_per_step=4, samples_per_prompt=2, minibatches=8).minibatches == 8


@pytest.mark.parametrize("cls", BAD)
def test_every_number_has_a_range(cls: type) -> None:
    """A new setting of type int or float needs a line in BAD, or a reason to stand here."""
    free = {(AnnotatorConfig, "seed")}  # only ever hashed
    numbers = {
        item.name for item in dataclasses.fields(cls) if item.type in ("int", "int | None", "float", "float | None")
    }
    assert numbers - set(BAD[cls]) == {name for config, name in free if config is cls}


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, item.name) for cls in BAD for item in dataclasses.fields(cls) if item.type in ("float", "float | None")],
)
def test_nan_is_out_of_every_range_in_python_too(cls: type, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: nan; expected "):
        cls(**{name: math.nan})


def test_limits_may_be_infinite_and_edges_of_ranges_are_inside() -> None:
    assert OptimConfig(lr=1e-9, warmup=1.0, max_grad_norm=math.inf).max_grad_norm == math.inf
    assert PPOConfig(gamma=0.0, lam=1.0, value_clip=math.inf, kl_coef=0.0, kl_target=None).value_clip == math.inf
    assert EvaluationConfig(temperature=0.0, samples_per_prompt=1).temperature == 0.0
    assert LoRAConfig(r=0).r == 0


def test_several_replies_at_temperature_0_are_refused_before_a_model_is_loaded() -> None:
    """The default is two replies to each prompt."""
    words = "samples_per_prompt: 2 replies at temperature 0 would all be the same; expected 1, or a temperature above 0"
    with pytest.raises(ValueError, match=f"^{words}$"):
        EvaluationConfig(temperature=0.0)
    with pytest.raises(ConfigError, match=f"^--evaluation.{words}$"):
        build(DemoConfig, None, ["--evaluation.temperature", "0"])
    assert EvaluationConfig(temperature=1e-3, samples_per_prompt=2).samples_per_prompt == 2


def test_a_value_out_of_range_is_named_by_its_full_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--ppo\.optim\.lr: -1\.0; expected more than 0$"):
        build(DemoConfig, None, ["--ppo.optim.lr", "-1"])
    with pytest.raises(ConfigError, match=r"^--sft\.epochs: 0; expected at least 1$"):
        build(DemoConfig, write(tmp_path, "sft: {epochs: 0}"), [])


def test_values_out_of_python_are_checked_like_those_of_yaml() -> None:
    assert from_flat(DemoConfig, {"ppo.kl_coef": 0.2}).ppo.kl_coef == 0.2
    with pytest.raises(ConfigError, match=r"unknown setting --ppo\.kl_cof"):
        from_flat(DemoConfig, {"ppo.kl_cof": 0.2})


def test_what_was_given_in_python_is_described_the_same_in_every_process() -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return []

    class Judge:
        pass

    text = run_yaml("ppo", PPOConfig(), reward=[(0.5, reward), (1.0, Judge())], policy="runs/sft")
    assert "0x" not in text and "reward" in text and "Judge object" in text and "policy: runs/sft" in text


# Mappings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped:
    inner: Inner = field(default_factory=Inner)
    options: dict[str, Any] = field(default_factory=dict)  # of anybody


def test_the_keys_of_a_mapping_are_anybodys(tmp_path: Path) -> None:
    words = [
        "--options.loud",
        "false",
        "--options.deep.er=[1, x]",
        "--options.name",
        "yes sir",
        "--inner.ratio",
        "0.25",
    ]
    expected = Mapped(Inner(ratio=0.25), {"loud": False, "deep": {"er": [1, "x"]}, "name": "yes sir"})
    assert build(Mapped, None, words) == expected
    file = write(tmp_path, to_yaml(expected))
    assert build(Mapped, file, []) == expected
    assert build(Mapped, file, ["--options", "{loud: true}"]).options == {"loud": True}
    assert build(Mapped, None, []).options == {} and "options" in keys(Mapped)
    assert ("options", ".NAME any", "none", "of anybody") in describe(Mapped)
    with pytest.raises(ConfigError, match=r"--options: 3 is no mapping; give --options\.NAME VALUE, or in YAML"):
        build(Mapped, None, ["--options", "3"])
    with pytest.raises(ConfigError, match=r"--options\.a: '\[' is not YAML"):
        build(Mapped, None, ["--options.a", "["])
    with pytest.raises(ConfigError, match=r"--options\.a needs a value"):
        build(Mapped, None, ["--options.a"])
    with pytest.raises(ConfigError, match=r"unknown setting --optoins\.a; the nearest one is --options"):
        build(Mapped, None, ["--optoins.a", "1"])


class Described:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def test_what_was_given_in_python_is_described_in_sixty_characters_without_addresses() -> None:
    """So that a run is known again in another process, by what its settings say."""

    def said(text: str) -> str:
        return str(yaml.safe_load(run_yaml("sft", SFTConfig(), data=Described(text)))["data"])

    assert said("<Data at 0x7f0012ab>") == "(<Data>)" and said("x" * 60) == f"({'x' * 60})"
    assert said("a" * 40 + "b" * 4 + "c" * 17) == f"({'a' * 40}...{'c' * 17})"


def test_eight_changes_are_listed_and_the_rest_are_counted() -> None:
    def of(steps: range) -> str:
        return yaml.safe_dump({"ppo": {f"s{i:02}": i for i in steps}})

    def said(number: int) -> str:
        return changes(of(range(number)), yaml.safe_dump({"ppo": {f"s{i:02}": -i for i in range(number)}}))

    eight = ", ".join(f"ppo.s{i:02}: {i} -> {-i}" for i in range(1, 9))
    assert said(9) == eight and said(10) == f"{eight}, and 1 more" and said(12) == f"{eight}, and 3 more"
