"""The verb annotate: what it refuses, and what its export and report leave."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import sqlalchemy as sa
import uvicorn

from rlhf_fast import cli
from rlhf_fast.config import AnnotateConfig, RewardConfig
from rlhf_fast.data.records import read_comparisons, read_demonstrations
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.assignment import Judgement, next_task, submit
from rlhf_fast.feedback.formats import FORMATS
from rlhf_fast.feedback.store import Person, Plan, Store, plan_of
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.trainers.reward import RewardTrainer
from tests.scenarios.test_settings_of_the_demo import OF_ANNOTATE


def refused(capsys: Any, *words: str) -> str:
    assert cli.main(["annotate", *words]) != 0
    return str(capsys.readouterr().err)


def test_what_is_missing_is_said_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", str(tmp_path / "votes"))
    assert "--out is missing" in refused(capsys)
    assert "go together" in refused(capsys, *out, "--model", "a,b")
    assert "holds no votes; give --responses FILE" in refused(capsys, *out)
    assert "there is no file none.jsonl" in refused(capsys, *out, "--responses", "none.jsonl")
    assert "expected 0 to 65535" in refused(capsys, *out, "--port", "70000")
    assert "expected serve, export, report or import" in refused(capsys, *out, "--action", "sell")
    assert "holds no votes" in refused(capsys, "export", str(tmp_path / "votes"))
    assert "--labels and --heldout are of an export" in refused(capsys, *out, "--labels", "model")
    assert "--gold and --unsure are of the page" in refused(capsys, "export", out[1], "--unsure", "rule:json")
    assert "--votes FILE and import go together" in refused(capsys, "import", str(tmp_path / "votes"))
    assert "there is no file none.json" in refused(capsys, "import", str(tmp_path / "votes"), "none.json")
    assert "expected one of label-studio, argilla, hh, rewardbench" in refused(
        capsys, "export", str(tmp_path / "votes"), "--form", "csv"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'rlhf-fast[annotate]'" in refused(capsys, *out, "--responses", __file__)
    assert not (tmp_path / "votes").exists()


def test_export_and_report_write_what_people_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    store.set_plan(Plan(judgements=1, gold_share=0.0, repeat_share=0.0))
    for i in range(3):
        store.add_prompt(f"Question {i}?", [f"good {i}", f"bad {i}"], category="simple")
    store.invite("Ann")
    ann = Person(1, "Ann", "annotator")
    while (task := next_task(store, ann)) is not None:
        side = -2 if task.left.startswith("good") else 2
        better = "best" if task.done == 0 else ""
        submit(store, ann, task.id, Judgement(side, True, True, better_answer=better, seconds=9.0))
    assert cli.main(["annotate", "export", str(tmp_path)]) == 0
    rows = read_comparisons(tmp_path / "comparisons.jsonl")
    assert len(rows) == 3 and all(row.chosen.startswith("good") for row in rows)
    assert [row.completion for row in read_demonstrations(tmp_path / "demonstrations.jsonl")] == ["best"]
    assert "Ann" not in (tmp_path / "comparisons.jsonl").read_text()
    assert json.loads((tmp_path / "comparisons.jsonl").read_text().splitlines()[0])["category"] == "simple"
    assert cli.main(["annotate", "report", str(tmp_path)]) == 0
    assert "3 of 3 pairs judged, 3 of 3 votes" in capsys.readouterr().out
    assert (tmp_path / "card.html").read_text().startswith("<!doctype html>")


def test_votes_of_another_tool_come_in_and_go_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pair = {"prompt": "Where?", "answer1": "Here.", "answer2": "There."}
    said = [
        {"completed_by": who, "result": [{"type": "pairwise", "from_name": "side", "value": {"selected": "left"}}]}
        for who in (1, 2)
    ]
    file, out = tmp_path / "export.json", tmp_path / "votes"
    file.write_text(json.dumps([{"data": pair, "annotations": said}]))
    assert cli.main(["annotate", "import", str(out), str(file)]) == 0
    assert "2 new votes of 2 new people on 1 pairs of label-studio" in capsys.readouterr().out
    assert cli.main(["annotate", "import", str(out), str(file)]) == 0
    assert "0 new votes of 0 new people" in capsys.readouterr().out
    for form, kept in {"label-studio": 2, "argilla": 2, "hh": 0, "rewardbench": 0}.items():
        assert cli.main(["annotate", "export", str(out), "--form", form]) == 0
        _, back = FORMATS[form]
        (item,) = back(out / f"{form}.json")
        assert len(getattr(item, "votes", ())) == kept
    (row,) = read_comparisons(out / "comparisons.jsonl")
    assert (row.chosen, row.confidence) == ("Here.", 1.0)
    file.write_text(json.dumps([{"data": pair, "annotations": [{"completed_by": 1, "result": []}]}]))
    assert "does not say which is better (nothing)" in refused(capsys, "import", str(tmp_path / "new"), str(file))
    assert not (tmp_path / "new").exists()


def test_the_report_of_a_reward_model_says_what_the_votes_of_the_export_allow(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """Three imported people, one of whom always disagrees: 1 of 3 pairs of votes agrees."""
    sides = {"ann": "left", "bo": "left", "cy": "right"}
    rows = []
    for i in range(24):
        pair = {"prompt": f"Question {i}?", "answer1": f"good {i}", "answer2": f"bad {i}"}
        said = [
            {"completed_by": who, "result": [{"type": "pairwise", "from_name": "side", "value": {"selected": side}}]}
            for who, side in sides.items()
        ]
        rows.append({"data": pair, "annotations": said})
    (tmp_path / "export.json").write_text(json.dumps(rows))
    assert cli.main(["annotate", "import", str(tmp_path / "votes"), str(tmp_path / "export.json")]) == 0
    assert cli.main(["annotate", "export", str(tmp_path / "votes")]) == 0
    config = RewardConfig(max_steps=1, batch_size=4)
    RewardTrainer(tiny_folder, tmp_path / "votes" / "comparisons.jsonl", tmp_path / "reward", config).train()
    report = json.loads((tmp_path / "reward" / "reward_report.json").read_text())
    people, accuracy = report["people"], report["accuracy"]["mean"]
    assert people["agreement"]["mean"] == pytest.approx(1 / 3) and people["pairs_judged_by_several"] == 24
    assert people["reach"] == [pytest.approx(1 / 3), 0.5]
    assert people["model_on_votes"]["mean"] == pytest.approx((2 * accuracy + (1 - accuracy)) / 3)
    page = (tmp_path / "reward" / "report.html").read_text()
    assert "People agree on 33%: a model of the majority reaches 33% to 50%" in page


def test_settings_reach_the_plan_and_the_sampler(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    generate = Generator.generate

    def seen(generator: Generator, prompts: Any, params: Any) -> Any:
        asked.append(params)
        return generate(generator, prompts, params)

    monkeypatch.setattr(Generator, "generate", seen)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: [one.close() for one in sockets])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    models = f"{tiny_folder},{tiny_folder}"
    words = ["--out", str(tmp_path / "votes"), "--prompts", str(tmp_path / "prompts.jsonl"), "--model", models]
    settings = [word for name, value in OF_ANNOTATE.items() for word in (f"--annotate.{name}", str(value))]
    assert cli.main(["annotate", *words, "--port", "0", *settings]) == 0
    told = [(one.n, one.max_new_tokens, one.temperature, one.seed) for one in asked]
    assert told == [(2, 3, 0.75, 5), (2, 3, 0.75, 6)]
    store = Store(tmp_path / "votes" / "votes.db")
    assert store.setting("warnings") == {"b": "of a fight"}
    with store.read() as connection:
        plan = plan_of(connection)
    assert asdict(plan) == {name: OF_ANNOTATE[name] for name in asdict(plan)}
    assert not {name for name, value in asdict(plan).items() if value == getattr(Plan(), name)}
    assert asdict(Plan()) == {name: getattr(AnnotateConfig(), name) for name in asdict(plan)}


def serve_once(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> Store:
    """The store as `annotate` leaves it when its server ends at once."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: [one.close() for one in sockets])
    assert cli.main(["annotate", "--out", str(folder), "--port", "0", *words]) == 0
    return Store(folder / "votes.db")


def responses_file(tmp_path: Path, count: int) -> str:
    rows = [{"prompt": f"q{i}?", "responses": [f"{'x' * i} a", f"{i} b"], "category": "simple"} for i in range(count)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "r.jsonl")


def test_a_file_of_known_answers_measures_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gold = [
        {"prompt": f"known {i}?", "chosen": "right", "rejected": [{"role": "assistant", "content": "wrong"}]}
        for i in (1, 2)
    ]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    words = ["--responses", responses_file(tmp_path, 3), "--gold", str(tmp_path / "gold.jsonl")]
    store = serve_once(monkeypatch, tmp_path / "votes", *words, "--annotate.gold_share", "0.9")
    store = serve_once(monkeypatch, tmp_path / "votes", *words, "--annotate.gold_share", "0.9")  # and adds none twice
    store.invite("Ann")
    ann = Person(2, "Ann", "annotator")  # 1 is the owner
    seen = []
    while (task := next_task(store, ann)) is not None:
        seen.append({task.left, task.right})
        submit(store, ann, task.id, Judgement(-3 if task.left == "right" else 3, True, True, seconds=9.0))
    assert seen.count({"right", "wrong"}) == 2 and len(seen) == 5
    assert cli.main(["annotate", "export", str(tmp_path / "votes")]) == 0
    assert len(read_comparisons(tmp_path / "votes" / "comparisons.jsonl")) == 3  # none of the known ones


@pytest.mark.parametrize("several", [False, True])
def test_pairs_of_which_rewards_are_unsure_come_first(
    several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses `xx a` and `2 b`: by length they differ by one, two, ... less one."""
    (tmp_path / "my.py").write_text(
        "def size(prompts, responses):\n    return [float(len(r)) for r in responses]\n\n\n"
        "def other(prompts, responses):\n    return [float('x' not in r) for r in responses]\n"
    )
    judges = [f"{tmp_path}/my.py:size", f"{tmp_path}/my.py:other"]
    given = ",".join(judges if several else judges[:1])
    store = serve_once(monkeypatch, tmp_path / "votes", "--responses", responses_file(tmp_path, 4), "--unsure", given)
    with store.read() as connection:
        found = [row.priority for row in connection.execute(sa.select(t.pair.c.priority).order_by(t.pair.c.id))]
    size = [-1.0, 0.0, 1.0, 2.0]  # "0 b" is longer than " a"
    scaled = [one / (6 / 4) ** 0.5 for one in size]
    others = [one / (3 / 4) ** 0.5 for one in (0.0, -1.0, -1.0, -1.0)]
    want = [abs(a - b) / 2 for a, b in zip(scaled, others, strict=True)] if several else [-abs(one) for one in scaled]
    assert found == pytest.approx(want)
    words = ["--out", str(tmp_path / "new"), "--responses", str(tmp_path / "r.jsonl"), "--unsure", "runs/no"]
    assert "unsure: there is no" in refused(capsys, *words) and not (tmp_path / "new").exists()


def test_an_export_leaves_out_what_is_disputed_if_told_to_and_takes_the_labels_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--responses", responses_file(tmp_path, 8), "--annotate.repeat_share", "0"]
    discard = ["--annotate.disputed", "discard", "--annotate.dispute_below", "0.5"]
    store = serve_once(monkeypatch, tmp_path / "votes", *words)
    for number in (2, 3, 4):  # all agree but on q0, and one of three there
        store.invite(f"P{number}")
        person = Person(number, f"P{number}", "annotator")
        while (task := next_task(store, person)) is not None:
            first = task.left.endswith(" a")
            wants = first != (number == 4 and "q0?" in str(task.prompt))
            submit(store, person, task.id, Judgement(-3 if wants else 3, True, True, seconds=9.0))

    def exported(*more: str) -> list[dict[str, Any]]:
        assert cli.main(["annotate", "export", str(tmp_path / "votes"), *more]) == 0
        return [json.loads(line) for line in (tmp_path / "votes" / "comparisons.jsonl").read_text().splitlines()]

    shares, model = exported(), exported("--labels", "model", "--heldout", "0.5")
    assert sorted(row["confidence"] for row in shares) == pytest.approx([2 / 3] + 7 * [1.0])
    assert all(0.5 < row["confidence"] < 1 for row in model)
    assert sum(row["split"] == "heldout" for row in model) > sum(row["split"] == "heldout" for row in shares)
    serve_once(monkeypatch, tmp_path / "votes", *words, *discard)
    capsys.readouterr()
    assert len(exported()) == 7 and "1 disputed pairs left out" in capsys.readouterr().out
    serve_once(monkeypatch, tmp_path / "votes", *words)
    assert len(exported()) == 8  # it was left out of that export alone
