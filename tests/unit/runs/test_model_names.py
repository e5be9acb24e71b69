"""Names of models: what each mistake is answered, from the files alone and at once."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.runs import model_names

EXPECTED = "expected the folder of a model or of a run, a hub name (owner/name) or smollm2-135m"


def said(name: str | Path, setting: str = "model", kind: Any = "policy") -> str:
    """What is said of a name that cannot be used."""
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        model_names.check(name, setting, kind)
    return str(caught.value)


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the finished run runs/sft in it."""
    shutil.copytree(tiny_folder, tmp_path / "runs" / "sft" / "checkpoints" / "step-3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", [str, Path])
def test_good_names_are_taken(here: Path, form: Any) -> None:
    for name in ("runs/sft", "./runs/sft/checkpoints/step-3", here / "runs" / "sft"):
        model_names.check(form(name))
        assert model_names.find(form(name)) == str(here / "runs" / "sft" / "checkpoints" / "step-3")
    model_names.check("smollm2-135m")


def test_a_home_folder_that_no_shell_has_written_out_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert model_names.find("~/runs/sft").startswith(str(here))


@pytest.mark.parametrize("name", ["runs/none", "./none", "/none", "~/none", "none/", "a/b/c", "..", "C:\\none"])
def test_a_path_is_never_looked_for_on_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setattr(model_names, "_is_offline", lambda: False)
    line = said(name)
    assert line.startswith(("model: there is no folder ", "model: the folder ")), line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/none", "policy: there is no folder runs/none ({here}/runs has sft); " + EXPECTED),
        ("runs/stf", "policy: there is no folder runs/stf; did you mean runs/sft?; " + EXPECTED),
        ("nowhere/a/b", "policy: there is no folder nowhere/a/b (nor {here}/nowhere/a); " + EXPECTED),
        ("smolm2-135m", "policy: 'smolm2-135m' is neither a folder nor a hub name (owner/name) nor 'smollm2-135m'; "
         "did you mean 'smollm2-135m'?"),
        ("runs", "policy: the folder {here}/runs holds neither config.json nor adapter_config.json nor "
         "checkpoints/step-N; within it are sft: give one, such as {here}/runs/sft"),
        ("notes.txt", "policy: notes.txt is a file; " + EXPECTED),
        ("runs/sft/checkpoints/step-3/model.safetensors", "policy: runs/sft/checkpoints/step-3/model.safetensors is a "
         "file; " + EXPECTED + "; runs/sft/checkpoints/step-3 may be what is meant"),
        ("empty", "policy: the folder {here}/empty is empty; " + EXPECTED),
        ("begun", "policy: the run in {here}/begun has kept no checkpoint yet; the same command that began it goes on "
         "with it"),
    ],
)  # fmt: skip
def test_a_wrong_name_says_what_is_there(here: Path, name: str, words: str) -> None:
    (here / "notes.txt").write_text("notes")
    (here / "empty").mkdir()
    (here / "begun").mkdir()
    (here / "begun" / "config.yaml").write_text("out: begun\n")
    assert said(name, "policy") == words.format(here=here)


# Folders that are not whole ------------------------------------------------------------------------------------------


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shard(folder: Path) -> None:
    """As a model of two files of which one has arrived."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


DAMAGES = {
    "model.safetensors is cut off: it has": lambda folder: halve(folder / "model.safetensors"),
    "is damaged or cut off: it has 4 bytes": lambda folder: (folder / "model.safetensors").write_bytes(b"1234"),
    "is damaged: its header is no JSON": lambda folder: (folder / "model.safetensors").write_bytes(
        (16).to_bytes(8, "little") + b"x" * 99
    ),
    "it holds no weights, such as model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "1 of its 2 files of weights are missing, the first is model-00002-of-00002.safetensors": shard,
    "config.json: ": lambda folder: halve(folder / "config.json"),
    "holds no tokenizer (tokenizer.json)": lambda folder: [f.unlink() for f in folder.glob("*token*")],
}


@pytest.mark.parametrize("words", DAMAGES)
def test_what_a_half_copied_model_lacks_is_named(tiny_folder: Path, tmp_path: Path, words: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    model_names.check(folder)
    DAMAGES[words](folder)
    line = said(folder)
    assert line.startswith(f"model: {folder} ") and words in line


@pytest.fixture(scope="module")
def kinds(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of policies and reward models, whole and as adapters."""
    from rlhf_fast import models
    from rlhf_fast.config import LoRAConfig

    folder = tmp_path_factory.mktemp("kinds")
    for name, lora in (("whole", LoRAConfig(r=0)), ("adapter", LoRAConfig(r=2))):
        models.save(folder / f"reward-{name}", *models.reward_from(tiny_folder, lora))
        model, tokenizer = models.load(tiny_folder)
        models.save(folder / f"policy-{name}", models.trainable(model, lora), tokenizer)
    return folder


@pytest.mark.parametrize("form", ["whole", "adapter"])
def test_a_policy_in_place_of_a_reward_model_is_named_and_the_other_way_round(
    kinds: Path, tmp_path: Path, form: str
) -> None:
    policy, reward = kinds / f"policy-{form}", kinds / f"reward-{form}"
    model_names.check(policy)
    model_names.check(reward, "reward", "reward")
    line = said(policy, "reward", "reward")
    assert line == f"reward: {policy} is a language model, not a reward model; {kinds}/reward-adapter is one"
    shutil.copytree(policy, tmp_path / "alone")
    line = said(tmp_path / "alone", "reward", "reward")
    assert "not a reward model; train one (rlhf-fast reward --model" in line
    assert "rule:NAME, FILE.py:function or a URL" in line
    assert said(reward, "policy").startswith(f"policy: {reward} is a reward model, not a language model; give a policy")
    assert said("smollm2-135m", "reward", "reward").startswith("reward: smollm2-135m is a language model")


def test_an_adapter_without_its_weights_or_its_base_is_named(kinds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(kinds / "policy-adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    for gone, words in ((str(tmp_path / "gone"), "the base model of the adapter in"), (base, "")):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": gone}))
        if words:
            assert words in said(folder) and f"there is no folder {gone}" in said(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "it holds no weights, such as adapter_model.safetensors" in said(folder)


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; no proxy, nothing known of the network."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    model_names._unreachable.cache_clear()
    return tmp_path / "cache"


def test_a_hub_name_offline_is_refused_by_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_names, "_is_offline", lambda: True)
    assert said("owner/name") == (
        "model: 'owner/name' was not found: there is no such folder, it is not in the hub's cache, and the hub cannot "
        f"be reached (HF_HUB_OFFLINE is set); {EXPECTED}"
    )


def test_what_is_in_a_folder_of_the_same_owner_is_told(
    here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder says nothing of the hub: it may be where its models are kept."""
    (here / "runs").rename(here / "mine")
    monkeypatch.setattr(model_names, "_is_offline", lambda: True)
    assert "there is no such folder; did you mean mine/sft?, it is not in the hub's cache" in said("mine/stf")
    monkeypatch.setattr(model_names, "_is_offline", lambda: False)
    monkeypatch.setattr(model_names, "_unreachable", lambda endpoint: None)
    model_names.check("mine/stf")


def test_a_hub_name_without_a_network_is_refused_within_two_seconds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where looking an address up never ends."""
    monkeypatch.setattr(model_names, "_is_offline", lambda: False)
    monkeypatch.setattr(model_names, "HUB_SECONDS", 0.2)

    def never(*_: Any) -> None:
        time.sleep(3)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", never)
    start = time.monotonic()
    assert "(no connection to https://huggingface.co: no answer)" in said("owner/name")
    assert time.monotonic() - start < 2


def test_a_refused_connection_is_told_as_such(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(model_names, "_is_offline", lambda: False)
        assert "Connection refused" in said("owner/name")


def test_a_hub_that_answers_is_left_to_be_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(model_names, "_is_offline", lambda: False)
        model_names.check("owner/name")


def test_without_a_network_the_cache_is_read_and_not_waited_for(tmp_path: Path) -> None:
    """In a process of its own, where huggingface_hub is not yet imported: it then goes offline at once."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    code = (
        "import os; from rlhf_fast.runs import model_names; model_names.check('owner/name'); "
        "print(os.environ['HF_HUB_OFFLINE'])"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": sys.path[0]}
    environment["PYTHONPATH"] = str(Path(model_names.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "owner/name: read from the cache, as the hub cannot be reached" in done.stderr


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("https://huggingface.co", ("huggingface.co", 443)),
        ("http://hub.local", ("hub.local", 80)),
        ("https://hub.local:8443/x", ("hub.local", 8443)),
    ],
)
def test_the_hub_is_asked_for_where_its_address_says(
    endpoint: str, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def connect(address: tuple[str, int], timeout: float) -> Any:
        asked.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(model_names.socket, "create_connection", connect)
    assert model_names._unreachable.__wrapped__(endpoint) == "Connection refused" and asked == [address]
