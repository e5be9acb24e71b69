"""The command line: its verbs and settings, its help, its exit codes, and errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast import __version__, cli
from rlhf_fast.config import DemoConfig, PPOConfig, tiny_demo
from rlhf_fast.config.settings import describe, keys, run_yaml

# Every verb and every setting that a person can give. A longer list is a harder program to learn, so it grows on
# purpose only.
PPO = """
    policy reward prompts out heldout_data ppo.steps ppo.prompts_per_step ppo.samples_per_prompt
    ppo.max_new_tokens ppo.stop_token_ids ppo.temperature ppo.epochs ppo.minibatches ppo.kl_coef
    ppo.kl_target ppo.kl_horizon ppo.max_kl ppo.max_update_kl ppo.advantage ppo.kl_in ppo.scale
    ppo.resample ppo.critic ppo.critic_warmup ppo.gamma ppo.lam ppo.ratio ppo.objective ppo.aggregation
    ppo.clip_low ppo.clip_high ppo.tau_pos ppo.tau_neg ppo.dual_clip ppo.value_clip ppo.value_coef
    ppo.whiten_rewards
    ppo.reward_clip ppo.missing_eos ppo.missing_eos_penalty ppo.min_reward_agreement ppo.reward_timeout
    ppo.reward_retries ppo.reward_batch ppo.lag ppo.rollout_cap ppo.cuda_graphs ppo.max_length
    ppo.overlong ppo.chat_template ppo.template_kwargs ppo.parse_special_tokens ppo.date ppo.dtype
    ppo.seed ppo.lora.r ppo.lora.alpha ppo.lora.targets ppo.optim.lr ppo.optim.schedule
    ppo.optim.warmup ppo.optim.weight_decay ppo.optim.adam_eps ppo.optim.max_grad_norm
    ppo.optim.max_tokens_per_microbatch ppo.optim.checkpointing ppo.optim.max_skipped
    ppo.run.save_every ppo.run.keep_last ppo.run.trackers
"""
KEYS = {
    "demo": """
        out tiny human pairs port model sft.epochs sft.max_steps sft.batch_size sft.heldout sft.turns sft.packing
        sft.samples sft.sample_tokens sft.patience sft.max_length sft.overlong sft.chat_template sft.template_kwargs
        sft.parse_special_tokens sft.date sft.dtype sft.seed sft.lora.r sft.lora.alpha sft.lora.targets
        sft.optim.lr sft.optim.schedule sft.optim.warmup sft.optim.weight_decay sft.optim.adam_eps
        sft.optim.max_grad_norm sft.optim.max_tokens_per_microbatch sft.optim.checkpointing
        sft.optim.max_skipped sft.run.save_every sft.run.keep_last sft.run.trackers comparisons.prompts
        comparisons.samples_per_prompt comparisons.max_new_tokens comparisons.temperature comparisons.seed
        comparisons.annotator.error_rate comparisons.annotator.tie_margin comparisons.annotator.seed
        reward.epochs reward.max_steps reward.batch_size reward.heldout reward.center_coef reward.heads
        reward.lcb reward.normalize_samples reward.max_new_tokens reward.patience reward.max_length
        reward.overlong reward.chat_template reward.template_kwargs reward.parse_special_tokens reward.date
        reward.dtype reward.seed reward.lora.r reward.lora.alpha reward.lora.targets reward.optim.lr
        reward.optim.schedule reward.optim.warmup reward.optim.weight_decay reward.optim.adam_eps
        reward.optim.max_grad_norm reward.optim.max_tokens_per_microbatch reward.optim.checkpointing
        reward.optim.max_skipped reward.run.save_every reward.run.keep_last reward.run.trackers ppo.steps
        ppo.prompts_per_step ppo.samples_per_prompt ppo.max_new_tokens ppo.stop_token_ids ppo.temperature
        ppo.epochs ppo.minibatches ppo.kl_coef ppo.kl_target ppo.kl_horizon ppo.max_kl ppo.max_update_kl
        ppo.advantage ppo.kl_in ppo.scale ppo.resample ppo.critic ppo.critic_warmup ppo.gamma ppo.lam ppo.ratio
        ppo.objective ppo.aggregation ppo.clip_low ppo.clip_high ppo.tau_pos ppo.tau_neg ppo.dual_clip
        ppo.value_clip ppo.value_coef ppo.whiten_rewards ppo.reward_clip ppo.missing_eos
        ppo.missing_eos_penalty ppo.min_reward_agreement
        ppo.reward_timeout ppo.reward_retries ppo.reward_batch ppo.lag ppo.rollout_cap ppo.cuda_graphs
        ppo.max_length ppo.overlong ppo.chat_template ppo.template_kwargs ppo.parse_special_tokens ppo.date
        ppo.dtype ppo.seed ppo.lora.r ppo.lora.alpha ppo.lora.targets ppo.optim.lr ppo.optim.schedule
        ppo.optim.warmup ppo.optim.weight_decay ppo.optim.adam_eps ppo.optim.max_grad_norm
        ppo.optim.max_tokens_per_microbatch ppo.optim.checkpointing ppo.optim.max_skipped ppo.run.save_every
        ppo.run.keep_last ppo.run.trackers evaluation.samples_per_prompt evaluation.max_new_tokens
        evaluation.temperature evaluation.tie_margin evaluation.chat_template evaluation.template_kwargs
        evaluation.parse_special_tokens evaluation.seed
    """,
    "sft": """
        data out heldout_data model sft.epochs sft.max_steps sft.batch_size sft.heldout sft.turns sft.packing
        sft.samples sft.sample_tokens sft.patience sft.max_length sft.overlong sft.chat_template
        sft.template_kwargs sft.parse_special_tokens sft.date sft.dtype sft.seed sft.lora.r sft.lora.alpha
        sft.lora.targets sft.optim.lr sft.optim.schedule sft.optim.warmup sft.optim.weight_decay
        sft.optim.adam_eps sft.optim.max_grad_norm sft.optim.max_tokens_per_microbatch sft.optim.checkpointing
        sft.optim.max_skipped sft.run.save_every sft.run.keep_last sft.run.trackers
    """,
    "reward": """
        data out heldout_data model reward.epochs reward.max_steps reward.batch_size reward.heldout
        reward.center_coef reward.heads reward.lcb reward.normalize_samples reward.max_new_tokens
        reward.patience reward.max_length reward.overlong reward.chat_template reward.template_kwargs
        reward.parse_special_tokens reward.date reward.dtype reward.seed reward.lora.r reward.lora.alpha
        reward.lora.targets reward.optim.lr reward.optim.schedule reward.optim.warmup
        reward.optim.weight_decay reward.optim.adam_eps reward.optim.max_grad_norm
        reward.optim.max_tokens_per_microbatch reward.optim.checkpointing reward.optim.max_skipped
        reward.run.save_every reward.run.keep_last reward.run.trackers
    """,
    "dpo": """
        data out heldout_data model dpo.epochs dpo.max_steps dpo.batch_size dpo.heldout dpo.loss dpo.beta
        dpo.label_smoothing dpo.patience dpo.max_length dpo.overlong dpo.chat_template dpo.template_kwargs
        dpo.parse_special_tokens dpo.date dpo.dtype dpo.seed dpo.lora.r dpo.lora.alpha dpo.lora.targets
        dpo.optim.lr dpo.optim.schedule dpo.optim.warmup dpo.optim.weight_decay dpo.optim.adam_eps
        dpo.optim.max_grad_norm dpo.optim.max_tokens_per_microbatch dpo.optim.checkpointing
        dpo.optim.max_skipped dpo.run.save_every dpo.run.keep_last dpo.run.trackers
    """,
    "ppo": PPO,
    "grpo": PPO,
    "rloo": PPO,
    "data": """
        data model out max_length max_new_tokens overlong turns chat_template template_kwargs
        parse_special_tokens records lines problems json
    """,
    "generate": """
        prompts prompt out model n temperature top_k top_p min_p repetition_penalty presence_penalty
        frequency_penalty max_new_tokens min_new_tokens stop chat_template template_kwargs
        parse_special_tokens seed
    """,
    "annotate": """
        out store action responses prompts model votes form gold unsure labels heldout criteria host port proxy
        secret_file language annotate.judgements annotate.lease annotate.gold_share annotate.repeat_share
        annotate.repeat_after annotate.random_share annotate.least_seconds annotate.reports annotate.dispute_below
        annotate.disputed annotate.samples_per_model annotate.max_new_tokens annotate.temperature annotate.seed
        annotate.warnings
    """,
    "evaluate": """
        candidate baseline out prompts golden trained_on margin judge split evaluation.samples_per_prompt
        evaluation.max_new_tokens evaluation.temperature evaluation.tie_margin
        evaluation.chat_template evaluation.template_kwargs
        evaluation.parse_special_tokens evaluation.seed
    """,
    "export": "model out dtype",
    "bench": "suite op seconds out",
    "doctor": """
        config model device memory price tflops bandwidth utilisation sequences prompt_tokens response_tokens
        json
    """,
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command."""
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def error(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """The message of a command that should fail with `code`: one line on stderr, nothing on stdout."""
    came, out, err = run(capsys, *words)
    assert (came, out) == (code, "")
    assert err.startswith("rlhf-fast: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err.removeprefix("rlhf-fast: ").rstrip("\n")


def with_action(monkeypatch: pytest.MonkeyPatch, verb: str, action: Any) -> None:
    monkeypatch.setitem(cli.VERBS, verb, (cli.VERBS[verb][0], action))


def built(monkeypatch: pytest.MonkeyPatch, verb: str, *words: str) -> Any:
    """The settings that `verb` would run with."""
    commands: list[Any] = []
    with_action(monkeypatch, verb, commands.append)
    assert cli.main([verb, *words]) == 0
    return commands[0]


def test_verbs_and_settings_are_exactly_those_listed_here() -> None:
    actual = {verb: keys(cls) for verb, (cls, _) in cli.VERBS.items()}
    listed = {verb: text.split() for verb, text in KEYS.items()}
    added = [f"{verb} --{key}" for verb in actual for key in actual[verb] if key not in listed.get(verb, [])]
    removed = [f"{verb} --{key}" for verb in listed for key in listed[verb] if key not in actual.get(verb, [])]
    assert actual == listed, (
        f"new: {added}, gone: {removed}. Is each new setting needed, or would a good default do? If it is, explain it "
        "in the comment behind its field (that is what --help shows), list it in KEYS and say it in the documentation."
    )


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_every_verb(capsys: pytest.CaptureFixture[str], word: str) -> None:
    code, out, err = run(capsys, word)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(KEYS)


def test_help_is_a_word_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "help") == run(capsys, "--help")
    assert run(capsys, "help", "ppo") == run(capsys, "ppo", "help") == run(capsys, "ppo", "--help")


def test_no_verb_shows_the_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2 and "usage: rlhf-fast VERB" in out


@pytest.mark.parametrize("verb", KEYS)
def test_the_help_of_a_verb_shows_every_setting_with_its_default(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, err = run(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"rlhf-fast {verb}: ")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  --")}
    assert list(lines) == [f"--{key}" for key in KEYS[verb].split()]
    for key, kind, default, comment in describe(cli.VERBS[verb][0]):
        assert lines[f"--{key}"].split() == [f"--{key}", *f"{kind} {default} {comment}".split()]


def test_the_help_lists_the_words_of_a_choice_that_may_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "ppo", "--help")[1]
    assert "  loss|reward or none  " in out and "  group|batch|none or none  " in out


def test_the_help_shows_the_defaults_that_a_verb_really_has(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's PPO section has other defaults than PPOConfig."""
    assert DemoConfig().ppo.steps != PPOConfig().steps
    line = next(line for line in run(capsys, "demo", "--help")[1].splitlines() if line.startswith("  --ppo.steps "))
    assert line.split()[2] == str(DemoConfig().ppo.steps)


def test_every_setting_is_explained_unless_its_name_says_all() -> None:
    plain = {"seed", "weight_decay", "prompts_per_step", "samples_per_prompt", "temperature"}
    for verb, (cls, _) in cli.VERBS.items():
        unexplained = [key for key, _, _, comment in describe(cls) if not comment]
        assert {key.rpartition(".")[2] for key in unexplained} <= plain, (verb, unexplained)


def test_help_and_wrong_commands_load_neither_torch_nor_transformers() -> None:
    """In a process of its own, since the tests have loaded both."""
    code = (
        "import sys\n"
        "from rlhf_fast import cli\n"
        "__file__ = cli.__file__\n"
        "wrong = [['--help'], ['ppo', '--help'], ['ppo', '--ppo.kl_cof', '1'], ['generate', '--model', 'runs/none'],\n"
        "['ppo', '--policy', 'smollm2-135m', '--reward', 'my.py', '--prompts', __file__, '--out', 'o'],\n"
        "['sft', '--data', 'none.jsonl', '--out', 'o'], ['doctor', '--device', 'cuda'], ['train'],\n"
        "['sft', '--data', __file__, '--out', '.'],\n"
        "['dpo', '--data', __file__, '--out', 'o', '--dpo.run.trackers', 'trackio']]\n"
        "codes = [cli.main(words) for words in wrong]\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or codes != [0, 0, 2, 1, 1, 1, 2, 2, 1, 1] else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert run(capsys, word) == (0, f"rlhf-fast {__version__}\n", "")


# GRPO and RLOO -------------------------------------------------------------------------------------------------------

NEEDED = "--policy p --reward r --prompts f --out o".split()


@pytest.mark.parametrize("verb", ["grpo", "rloo"])
def test_the_verbs_of_an_advantage_are_ppo_with_it(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    assert cli.VERBS[verb][1] is cli.VERBS["ppo"][1]
    command = built(monkeypatch, verb, *NEEDED, "--ppo.steps", "3")
    assert command.ppo == PPOConfig(advantage=verb, steps=3)


def test_the_help_of_grpo_shows_its_advantage_and_ppo_as_its_kin(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "grpo", "--help")[1]
    (line,) = (line for line in out.splitlines() if line.startswith("  --ppo.advantage "))
    assert line.split()[2] == "grpo" and "rlhf-fast ppo" in out


@pytest.mark.parametrize(("verb", "other"), [("grpo", "gae"), ("grpo", "rloo"), ("rloo", "grpo")])
def test_another_advantage_than_the_verb_says_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, other: str
) -> None:
    (tmp_path / "other.yaml").write_text(f"ppo: {{advantage: {other}}}\n")
    for words in (["--ppo.advantage", other], ["--config", str(tmp_path / "other.yaml")]):
        line = error(capsys, 2, verb, *NEEDED, *words)
        assert line.startswith(f"--ppo.advantage: {other!r}; the verb {verb} is for {verb!r}")
        assert "rlhf-fast ppo takes any" in line


def test_dr_grpo_is_a_grpo(monkeypatch: pytest.MonkeyPatch) -> None:
    assert built(monkeypatch, "grpo", *NEEDED, "--ppo.advantage", "dr_grpo").ppo.advantage == "dr_grpo"


@pytest.mark.parametrize("verb", ["ppo", "grpo"])
def test_the_config_of_a_grpo_run_is_taken_by_ppo_and_by_grpo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    file = tmp_path / "config.yaml"
    inputs = {"policy": "p", "reward": "r", "prompts": "f", "out": "o"}
    file.write_text(run_yaml("ppo", PPOConfig(advantage="grpo"), **inputs))
    assert built(monkeypatch, verb, "--config", str(file)).ppo == PPOConfig(advantage="grpo")


# Settings ------------------------------------------------------------------------------------------------------------


def test_a_config_file_lies_under_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "ppo.yaml"
    file.write_text("policy: a\nreward: r\nprompts: p\nout: from-file\nppo: {steps: 7, kl_coef: 0.3}\n")
    for words in (["--config", str(file), "--ppo.steps", "9"], ["--ppo.steps=9", f"--config={file}"]):
        command = built(monkeypatch, "ppo", *words)
        assert (command.out, command.ppo) == ("from-file", PPOConfig(steps=9, kl_coef=0.3))


@pytest.mark.parametrize(
    "words", [["--tiny"], ["--tiny", "true"], ["--tiny", "True"], ["--tiny=true"], ["--config", "tiny.yaml"]]
)
def test_tiny_changes_the_defaults_of_the_demo_wherever_it_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text("tiny: true\n")
    assert built(monkeypatch, "demo", *words) == tiny_demo()
    assert built(monkeypatch, "demo", *words, "--ppo.steps", "5").ppo.steps == 5


@pytest.mark.parametrize("words", [[], ["--tiny", "false"], ["--tiny", "False"], ["--tiny=false"]])
def test_without_tiny_the_demo_has_its_full_size(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    assert built(monkeypatch, "demo", *words) == DemoConfig()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "nearest"), [("rewrad", "reward"), ("generat", "generate"), ("eval", "evaluate")])
def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str], word: str, nearest: str) -> None:
    assert error(capsys, 2, word) == f"unknown verb {word!r}; the nearest one is {nearest!r}, see rlhf-fast --help"


@pytest.mark.parametrize("word", ["train", "serve", "xyz"])
def test_an_unknown_verb_like_none_lists_all(capsys: pytest.CaptureFixture[str], word: str) -> None:
    verbs = ", ".join(cli.VERBS)
    assert error(capsys, 2, word) == f"unknown verb {word!r}; the verbs are {verbs}, see rlhf-fast --help"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo", "--kl_cof", "1"], "unknown setting --kl_cof; the nearest one is --ppo.kl_coef"),
        (["sft", "--out", "x"], "--data is missing"),
        (["sft", "--data", "d", "--out", "o", "--sft.epochs", "-1"], "--sft.epochs: -1; expected at least 1"),
        (["demo", "--sft.heldout", "1.5"], "--sft.heldout: 1.5; expected at least 0 and less than 1"),
        (["demo", "--tiny", "--reward.batch_size=0"], "--reward.batch_size: 0; expected at least 1"),
        (["demo", "--ppo.kl_coef", "nan"], "--ppo.kl_coef: 'nan' is not a number"),
        (["demo", "--comparisons.annotator.error_rate", "0.9"], "--comparisons.annotator.error_rate: 0.9; expected"),
        (["demo", "--config"], "--config needs a file"),
        (["demo", "--config", "none.yaml"], "--config: none.yaml cannot be read"),
        (["doctor", "--device", "cuda"], "--device is about a run, which --config FILE.yaml names; without it doctor"),
        (["doctor", "--json"], "--json is about a run, which --config FILE.yaml names"),
        (["demo", "stray"], "'stray' stands where a --key was expected"),
    ],
)
def test_wrong_usage_is_one_line_with_exit_code_2_and_names_the_help(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    line = error(capsys, 2, *words)
    assert line.startswith(message)
    assert line.endswith(f"; see rlhf-fast {words[0]} --help")


def test_a_yaml_error_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1\nb: 2\n")
    assert error(capsys, 2, "demo", "--config", str(file)).startswith(f"--config: {file} is not YAML: ")


@pytest.mark.parametrize(("verb", "hint"), [("doctor", "nothing is half-written"), ("demo", "last finished phase")])
def test_ctrl_c_ends_with_130_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, hint: str
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    with_action(monkeypatch, verb, interrupt)
    line = error(capsys, 130, verb)
    assert line.startswith("stopped; ") and hint in line


def test_an_error_in_a_process_of_its_own_leaves_no_traceback() -> None:
    words = [sys.executable, "-m", "rlhf_fast.cli", "ppo", "--kl_cof", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rlhf-fast: unknown setting --kl_cof") and "Traceback" not in done.stderr


def test_a_reader_is_gone_only_once_it_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_fast.cli.errors import reader_is_gone

    reading, writing = os.pipe()
    with open(reading, "rb") as reader, open(writing, "wb") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert not reader_is_gone()
        reader.close()
        assert reader_is_gone()
        out.write(b"to nobody")
        out.flush()  # no broken pipe: what is still written goes nowhere


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'smolm2-135m'" in error(capsys, 1, "generate", "--prompt", "Hello", "--model", "smolm2-135m")


def test_generate_takes_either_a_file_or_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--prompt", "Hello", "--prompts", "file.jsonl"
    assert error(capsys, 2, "generate", *words).startswith("give either --prompts FILE or --prompt TEXT")


@pytest.fixture()
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading any model fails the test, since errors in data should come first."""
    from rlhf_fast import models

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded before the data was read")

    for name in ("load", "load_reward", "reward_from"):
        monkeypatch.setattr(models, name, load)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("verb", "key", "good"),
    [
        ("sft", "data", {"prompt": "p", "completion": "c"}),
        ("reward", "data", {"prompt": "p", "chosen": "c", "rejected": "r"}),
        ("dpo", "data", {"prompt": "p", "chosen": "c", "rejected": "r"}),
        ("ppo", "prompts", {"prompt": "p"}),
        ("generate", "prompts", {"prompt": "p"}),
        ("evaluate", "prompts", {"prompt": "p"}),
    ],
)
def test_a_bad_line_is_named_before_a_model_is_loaded_or_anything_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, key: str, good: dict[str, str]
) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text(json.dumps(good) + "\n" + '{"prompt": 7}\n')
    others = {
        "ppo": ["--policy", "smollm2-135m", "--reward", "rule:json"],
        "evaluate": ["--candidate", "smollm2-135m", "--baseline", "smollm2-135m"],
    }.get(verb, [])
    code = 2 if verb == "evaluate" else 1  # whose 1 is a verdict
    line = error(capsys, code, verb, f"--{key}", str(file), "--out", str(out), *others)
    assert line.startswith(f"{file} line 2: ")
    assert list(tmp_path.iterdir()) == [file]


def test_evaluate_writes_nothing_when_a_model_is_unknown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text('{"prompt": "p"}\n')
    words = ["--candidate", "unknown", "--baseline", "unknown", "--prompts", str(file), "--out", str(out)]
    assert "'unknown'" in error(capsys, 2, "evaluate", *words)
    assert not out.exists()


def test_a_model_is_asked_with_the_template_and_settings_that_are_given(
    tiny: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_fast import models
    from rlhf_fast.rollout.generator import Generator

    model, tokenizer = tiny
    tokenizer.chat_template = None
    models.save(tmp_path / "base", model, tokenizer)
    asked: list[str] = []
    monkeypatch.setattr(Generator, "generate", _noting(Generator.generate, asked))
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "q"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": messages}))
    words = ["generate", "--model", str(tmp_path / "base"), "--prompts", str(tmp_path / "p.jsonl")]
    words += ["--max_new_tokens", "2"]
    assert cli.main(words) == 1
    assert (
        "line 1: the tokenizer has no chat template, which messages of the roles system, user"
        in capsys.readouterr().err
    )
    file = tmp_path / "t.jinja"
    file.write_text("{{ mood }}{% for m in messages %}<user>{{ m.content }}{% endfor %}")
    more = ["--chat_template", str(file), "--template_kwargs.mood", "kind", "--parse_special_tokens"]
    assert cli.main([*words, *more]) == 0
    assert asked == ["kind<user>Be.<user>q"]


def _noting(generate: Any, asked: list[str]) -> Any:
    def noting(self: Any, *args: Any) -> Any:
        rollouts = generate(self, *args)
        asked.extend(self.tokenizer.decode(example.prompt) for example in rollouts.examples())
        return rollouts

    return noting
