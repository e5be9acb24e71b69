"""A run's folder: what it refuses, what it clears, and what it writes."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.config import PPOConfig
from rlhf_fast.config.settings import run_yaml
from rlhf_fast.runs import folder as run_folder
from rlhf_fast.runs.folder import RunFolder, is_finished, peak_rss_gb, read_result
from rlhf_fast.runs.terminal import bar_updater, progress_bar


def lines(file: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_bytes().split(b"\n")[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_finished_exactly_when_its_result_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", "sft", "seed: 0\n")
    run.log({"step": 1})
    run.checkpoint(1).mkdir(parents=True)
    assert not is_finished(run.path)
    returned = run.finish({"loss": 0.5})
    assert is_finished(run.path)
    assert read_result(run.path) == returned
    assert (returned["phase"], returned["summary"]) == ("sft", {"loss": 0.5})
    assert returned["seconds"] >= 0 and returned["peak_rss_gb"] > 0


def test_a_finished_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "sft", "seed: 0\n")
    run.log({"step": 1})
    run.finish({})
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="holds a finished run; choose another --out"):
        RunFolder(tmp_path, "sft", "seed: 1\n")
    assert contents(tmp_path) == before


def test_an_unfinished_run_starts_over_and_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "sft", "seed: 0\n") as run:
        run.log({"step": 1})
        run.sample({"text": "a"})
        (tmp_path / "notes.txt").write_text("mine")
    again = RunFolder(tmp_path, "sft", "seed: 0\n")
    assert contents(tmp_path).keys() == {"run.json", "config.yaml", "notes.txt"}
    again.log({"step": 1})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_the_result_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a finished run promises is there by the time that result.json appears."""
    order: list[str] = []
    write, append = run_folder.write_atomic, run_folder.append_line
    monkeypatch.setattr(run_folder, "write_atomic", lambda path, text: (order.append(path.name), write(path, text)))
    monkeypatch.setattr(run_folder, "append_line", lambda path, row: (order.append(path.name), append(path, row)))
    run = RunFolder(tmp_path, "sft", "")
    run.log({"step": 1})
    run.sample({})
    run.finish({})
    assert order == ["config.yaml", "metrics.jsonl", "samples.jsonl", "result.json"]
    assert json.loads((tmp_path / "run.json").read_text())["verb"] == "sft"


def test_a_run_that_cannot_write_its_result_stays_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path, "sft", "")

    def fail(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        run.finish({})
    assert not is_finished(tmp_path)
    assert sorted(contents(tmp_path)) == ["config.yaml", "run.json"]


def test_metrics_carry_the_seconds_since_the_start_and_never_go_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "sft", "")
    for step in range(5):
        run.log({"step": step})
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(5))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] >= 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def with_nulls(value: Any) -> Any:
    """What should be read back: NaN and infinity as None."""
    if isinstance(value, dict):
        return {key: with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_nulls(inner) for inner in value]
    return None if value in (math.inf, -math.inf) or value != value else value


@settings(max_examples=25, deadline=None)
@given(row=st.dictionaries(st.text().filter(lambda key: key != "seconds"), values, max_size=4))
def test_nan_and_infinity_become_null_at_any_depth_and_all_else_stays(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("run")
    run = RunFolder(path, "sft", "")
    run.log(row)
    run.sample(row)
    run.finish(row)
    (logged,) = lines(path / "metrics.jsonl")
    assert {key: value for key, value in logged.items() if key != "seconds"} == with_nulls(row)
    assert lines(path / "samples.jsonl") == [with_nulls(row)]
    assert read_result(path)["summary"] == with_nulls(row)


def test_checkpoints_are_named_by_step(tmp_path: Path) -> None:
    assert RunFolder(tmp_path, "sft", "").checkpoint(12) == tmp_path / "checkpoints" / "step-12"


@pytest.mark.seconds(2)
def test_peak_memory_is_in_gigabytes_and_grows_with_what_is_held() -> None:
    before = peak_rss_gb()
    assert 0.01 < before < 1000  # an interpreter alone holds about 10 MB
    held = bytearray(os.urandom(1)) * (int(before * 1e9) + 100_000_000)
    assert peak_rss_gb() > before + 0.05
    del held


def test_the_bar_follows_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10, "sample", "reply") as bar:
        update = bar_updater(bar)
        update(3, 8)
        update(8, 8)
        assert (bar.n, bar.total) == (8, 8)
    assert "sample" in capsys.readouterr().err


def test_a_setting_that_an_earlier_version_had_not_is_as_its_default(tmp_path: Path) -> None:
    """So that a run which that version left goes on, unless the setting is changed."""

    def described(config: PPOConfig) -> str:
        return run_yaml("ppo", config, out=str(tmp_path))

    without = [line for line in described(PPOConfig()).splitlines() if "objective:" not in line]
    RunFolder(tmp_path, "ppo", "\n".join(without)).close()
    with pytest.raises(ValueError, match=r"interrupted with other settings \(ppo\.objective: clip -> cispo\); go on"):
        RunFolder(tmp_path, "ppo", described(PPOConfig(objective="cispo")))
    RunFolder(tmp_path, "ppo", described(PPOConfig())).close()
    assert "objective: clip" in (tmp_path / "config.yaml").read_text()
