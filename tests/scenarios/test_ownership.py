"""Nothing is lost that this very run did not write: foreign folders, other verbs, two processes at once, kills."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import RunConfig
from rlhf_fast.runs import trackers
from rlhf_fast.runs.claim import MARK, Claim, check_claim
from rlhf_fast.runs.folder import RunFolder, check_folder, is_finished
from rlhf_fast.trainers.loop.checkpoints import Checkpoints, Goal
from tests.processes import PROCESSES
from tests.unit.runs.test_run_folder import contents

SETTINGS = "sft:\n  epochs: 2\n"


def foreign(folder: Path) -> dict[str, bytes]:
    """A project of another kind that looks like a run."""
    files = {"config.yaml": "trainer: lightning\n", "checkpoints/weights.bin": "w", "metrics.jsonl": '{"a": 1}\n'}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return contents(folder)


@pytest.mark.parametrize("mark", [None, "", "{}", '{"verb": "sft"}', "[1]", "not JSON"])
def test_another_projects_folder_is_refused_by_name_and_untouched(tmp_path: Path, mark: str | None) -> None:
    foreign(tmp_path)
    if mark is not None:  # somebody else's file of that name
        (tmp_path / MARK).write_text(mark)
    before = contents(tmp_path)
    named = r"checkpoints is there, and .* is no run's folder" if mark is None else r"run\.json is not a run's"
    for look in (lambda: check_folder(tmp_path, "sft", SETTINGS), lambda: RunFolder(tmp_path, "sft", SETTINGS)):
        with pytest.raises(FileExistsError, match=named + "; choose another --out"):
            look()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", ".hidden", "a file.txt"])
def test_anything_in_a_folder_without_a_mark_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=rf"{name} is there"):
        RunFolder(tmp_path, "sft", SETTINGS)
    assert contents(tmp_path) == {name: b"precious"}


def test_an_empty_folder_is_taken_and_marked_first(tmp_path: Path) -> None:
    RunFolder(tmp_path, "sft", SETTINGS).close()
    mark = json.loads((tmp_path / MARK).read_text())
    assert (mark["verb"], mark["process"]) == ("sft", os.getpid()) and "began" in mark
    (tmp_path / "config.yaml").unlink()  # a kill after the mark: nothing was written yet, so any verb may have it
    RunFolder(tmp_path, "ppo", "ppo: {}\n").close()


def test_an_interrupted_run_of_another_verb_is_called_that(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "sft", SETTINGS) as run:
        run.log({"step": 1})
    before = contents(tmp_path)
    for look in (check_folder, RunFolder):
        with pytest.raises(FileExistsError, match=r"holds an interrupted run of sft, begun 20\d\d-.*, and this is ppo"):
            look(tmp_path, "ppo", "ppo: {}\n")  # type: ignore[operator]
    assert contents(tmp_path) == before


def test_other_settings_lose_nothing_though_no_state_was_kept_yet(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "sft", SETTINGS) as run:
        run.log({"step": 1})
        save(run, 48)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"interrupted with other settings \(sft\.epochs: 2 -> 3\)"):
        RunFolder(tmp_path, "sft", SETTINGS.replace("2", "3"))
    assert contents(tmp_path) == before
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl is there without the config\.yaml of its run"):
        RunFolder(tmp_path, "sft", SETTINGS)


def save(run: RunFolder, step: int) -> None:
    run.will_write(step).mkdir(parents=True, exist_ok=True)
    (run.checkpoint(step) / "weights").write_text(str(step))
    run.has_written(step)


def checkpoints_of(run: RunFolder, keep_last: int = 1) -> Checkpoints:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(folder.name)

    return Checkpoints(run, RunConfig(save_every=1, keep_last=keep_last), Goal("score", higher=True), write)


def test_rotation_removes_what_the_run_wrote_and_nothing_beside_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "sft", SETTINGS) as run:
        (tmp_path / "checkpoints" / "step-best").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step-best" / "copy").write_text("mine")
        (tmp_path / "checkpoints" / "step-99").mkdir()
        (tmp_path / "checkpoints" / "step-99" / "weights").write_text("somebody else's")
        kept = checkpoints_of(run)
        for step in range(1, 4):
            kept.after(step, {"score": 0.0}, save=False)
            (run.checkpoint(step) / "notes.txt").write_text("mine")
        assert sorted(contents(tmp_path / "checkpoints")) == [
            "step-1/notes.txt", "step-1/weights", "step-2/notes.txt", "step-3/notes.txt", "step-3/weights",
            "step-99/weights", "step-best/copy",
        ]  # fmt: skip
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"step-\d+/\S+ is there, and this run did not write it; move it out of"):
        RunFolder(tmp_path, "sft", SETTINGS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["file", "below a file"])
def test_a_path_that_is_no_folder_is_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" if what == "file" else tmp_path / "file" / "run"
    for look in (check_folder, RunFolder):
        with pytest.raises((FileExistsError, NotADirectoryError), match=r"file is (no folder|a file, where)"):
            look(out, "sft", SETTINGS)  # type: ignore[operator]


def test_a_folder_that_cannot_be_written_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind everybody who runs tests
    with pytest.raises(PermissionError, match=r"cannot be written to; choose another --out"):
        check_claim(tmp_path / "a" / "run", "sft")
    assert not contents(tmp_path)


def test_a_tracker_that_is_not_installed_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"run\.trackers: trackio is not installed; pip install trackio"):
        check_folder(tmp_path / "run", "sft", SETTINGS, ("trackio",))
    assert not (tmp_path / "run").exists()


# Two processes, and kills ------------------------------------------------------------------------------------------


def hold(out: str, errors: str, seconds: float) -> None:
    """Write a run for a while; what went wrong goes into a file."""
    try:
        with RunFolder(out, "sft", SETTINGS) as run:
            for step in range(1, 1 + int(seconds / 0.01)):
                run.log({"step": step})
                time.sleep(0.01)
            run.finish({})
    except OSError as error:
        Path(errors).write_text(str(error))
        sys.exit(1)


def test_of_two_processes_at_once_one_has_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = [PROCESSES.Process(target=hold, args=(str(out), str(tmp_path / f"{i}"), 0.5)) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert sorted(process.exitcode for process in both) == [0, 1]
    winner = both[0] if both[0].exitcode == 0 else both[1]
    (said,) = [file.read_text() for file in tmp_path.iterdir() if file.is_file()]
    assert "is in use by" in said and (f"process {winner.pid} on " in said or "another process" in said)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 51)) and is_finished(out)


def test_who_holds_a_folder_is_named_to_the_next_and_let_go_of_in_the_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "sft", SETTINGS)
    for look in (check_folder, RunFolder):
        with pytest.raises(FileExistsError, match=rf"is in use by process {os.getpid()} on \S+; wait for it"):
            look(tmp_path, "sft", SETTINGS)  # type: ignore[operator]
    with pytest.raises(FileExistsError, match="is in use by"):
        Claim(tmp_path, "demo")
    run.close()
    check_folder(tmp_path, "sft", SETTINGS)
    RunFolder(tmp_path, "sft", SETTINGS).finish({})
    with pytest.raises(FileExistsError, match="holds a finished run"):
        check_folder(tmp_path, "sft", SETTINGS)


def keep_on(out: str) -> None:
    """A run of 12 steps as trainers make it, with checkpoints and states, and little else."""
    os.dup2(os.open(f"{out}.errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    from rlhf_fast.runs.files import write_folder_atomic

    with RunFolder(out, "sft", SETTINGS) as run:
        done, state = 0, run.state / "state.json"
        kept = checkpoints_of(run)
        if run.resumes:
            found = json.loads(state.read_text())
            done = found["step"]
            run.rewind(found["files"], 0.0)
            kept.load_state_dict(found["checkpoints"])
        for step in range(done + 1, 13):
            run.log({"step": step})
            time.sleep(0.002)
            kept.after(step, {"score": float(step % 5)}, save=step == 12)
            found = {"step": step, "files": run.sizes(), "checkpoints": kept.state_dict()}
            if step % 3 == 0:
                write_folder_atomic(
                    run.state, lambda folder, f=found: (folder / "state.json").write_text(json.dumps(f))
                )  # type: ignore[misc]
        kept.outcome(12, {})
        run.finish({})


def is_marked(out: Path) -> bool:
    return (out / MARK).exists() and (out / MARK).stat().st_size > 0


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_at_any_instant_a_run_goes_on_and_foreign_files_stay(tmp_path: Path) -> None:
    """As soon as there is a folder, somebody's file is put into it; then it is killed, again and again."""
    draw, killed = random.Random(1), 0
    for number in range(6):
        out = tmp_path / f"run-{number}"
        for attempt in range(12):
            process: Any = PROCESSES.Process(target=keep_on, args=(str(out),))
            process.start()
            if attempt % 2:  # at any instant after the mark; otherwise at any
                wait_for(lambda out=out: is_marked(out))
                (out / "notes.txt").write_text("mine")
            time.sleep(draw.random() * 0.04)
            process.kill()
            process.join(60)
            assert process.exitcode in (0, -9), Path(f"{out}.errors").read_text()
            killed += process.exitcode == -9
            if is_finished(out):  # and perhaps killed before it could tidy up
                (out / "result.json").unlink()
        process = PROCESSES.Process(target=keep_on, args=(str(out),))
        process.start()
        process.join(60)
        assert process.exitcode == 0, Path(f"{out}.errors").read_text()
        rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert rows == list(range(1, 13))
        left = sorted(folder.name for folder in (out / "checkpoints").glob("step-*"))
        assert left == ["step-12", "step-4"]  # the last, and the best
        assert (out / "notes.txt").read_text() == "mine"
        assert not (out / "state").exists()
    assert killed > 30
