"""The golden set: its files, its checks, and what a comparison on it decides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast import cli
from rlhf_fast.cli.evaluate import DEMO_GOLDEN
from rlhf_fast.data.records import RecordError, read_prompts
from rlhf_fast.evaluation import golden as golden_set
from rlhf_fast.evaluation.golden import (
    BETTER_OR_EQUAL,
    REGRESSION,
    UNDECIDED,
    GoldenJudge,
    check_of,
    decide,
    detectable,
    difference_of,
    fingerprint,
    read_golden,
    refuse_trained_on,
)
from rlhf_fast.statistics.intervals import Interval, clustered_bootstrap

ROW = {"id": "a", "prompt": "Is the sign ready?", "category": "simple", "checks": ["words:2-4", "mentions:sign|shop*"]}


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ("words:2-3", ["two words", "now there're three"], ["one", "", "these are four words"]),
        (
            "mentions:sign|opening hours",
            ["The SIGN.", "our Opening  hours:", "a (sign)"],
            ["signs", "hours opening", ""],
        ),
        ("mentions:enquir*|can't", ["Enquiries come", "I can’t", "I can't"], ["re-inquire", "cant", "an equiry"]),
        ("avoids:guarantee|no risk", ["", "guaranteed", "no big risk"], ["We GUARANTEE it", "at no risk."]),
        ("finished", ["Yes.", 'He said "yes."', "Ja!  ", "So?)", "真的。"], ["Yes", "and then,", "", "one - "]),
        ("json:name", ['{"name": 1}'], ['{"other": 1}', "name", "[1]"]),
        ("json", ["{}", "```json\n{}\n```"], ["[]", "{"]),
        ("tags:a,b", ["<a>1</a><b>2</b>"], ["<a>1</a>", "1"]),
        ("math", ["It is 7.", r"\boxed{14/2}"], ["8", "none"]),
        ("exact", ["7", " 7. "], ["07", "seven"]),
    ],
)
def test_a_check_passes_what_it_says(check: str, right: list[str], wrong: list[str]) -> None:
    for reply in right:
        assert check_of(check)(reply, "7"), reply
    for reply in wrong:
        assert not check_of(check)(reply, "7"), reply


def test_a_letter_is_checked_too() -> None:
    assert check_of("choice")("The answer is B.", "B") and not check_of("choice")("The answer is C.", "B")


@given(st.text(max_size=300), st.sampled_from(["mentions:", "avoids:"]), st.text(max_size=30))
def test_any_reply_is_judged_and_avoiding_is_not_mentioning(reply: str, name: str, argument: str) -> None:
    try:
        found = check_of(name + argument)(reply, None)
    except ValueError as error:
        assert str(error).startswith(name)
        return
    other = "avoids:" if name == "mentions:" else "mentions:"
    assert check_of(other + argument)(reply, None) is not found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "id: None; expected a text that is this prompt's alone"),
        ({"id": "b"}, "the id 'b' came before, in row 0"),
        ({"prompt": "Other?"}, "the prompt 'Other\\?' came before, in row 0"),
        ({"checks": []}, r'checks: \[\]; expected a list such as \["words:10-120"\]'),
        ({"checks": "words:1-2"}, "checks: 'words:1-2'; expected a list"),
        ({"checks": ["words:3"]}, "checks: words:3: expected words:LEAST-MOST"),
        ({"checks": ["words:9-3"]}, "checks: words:9-3: expected words:LEAST-MOST"),
        ({"checks": ["mentions:a||b"]}, "expected mentions: and words or phrases"),
        ({"checks": ["avoid:a"]}, "there is no check 'avoid'; the nearest one is 'avoids'"),
        ({"checks": ["math"]}, "math: the row has no answer to hold a reply against"),
        ({"checks": ["choice"], "answer": "seven"}, "answer: 'seven'; expected a letter"),
        ({"checks": ["exact"], "answer": {"a": 1}}, "answer: .*; expected text or a number"),
        ({"checks": ["json:,"]}, "rule:json:,; expected rule:json:name,age"),
    ],
)
def test_a_row_that_cannot_be_judged_by_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=rf"^row 1: .*{message}"):
        read_golden([{**ROW, "id": "b", "prompt": "Other?"}, {**ROW, **change}])


def test_the_hash_is_of_what_is_asked_and_what_is_right() -> None:
    rows: list[dict[str, Any]] = [ROW, {**ROW, "id": "b", "prompt": "Other?"}]
    before = fingerprint(read_golden(rows))
    assert fingerprint(read_golden(rows[::-1])) == before
    assert fingerprint(read_golden([rows[0], {**rows[1], "note": "a remark"}])) == before
    for change in ({"id": "c"}, {"prompt": "x"}, {"category": "y"}, {"checks": ["words:2-5"]}, {"answer": "z"}):
        assert fingerprint(read_golden([rows[0], {**rows[1], **change}])) != before, change


def test_a_golden_prompt_that_was_trained_on_is_refused_and_one_that_is_nearly_the_same() -> None:
    long = "Please move the map on our contact page to the new office at the harbour, number fourteen, by Monday."
    golden = read_golden([ROW, {**ROW, "id": "b", "prompt": long}])
    refuse_trained_on(golden, read_prompts([{"prompt": "Is the sign red?"}, {"prompt": "Something else"}]))
    for trained in ("is the SIGN ready", long.replace("Monday", "Friday")):
        with pytest.raises(ValueError, match=r"^row [01]: .* was trained on \(row 1: .*1 of 2 golden prompts were"):
            refuse_trained_on(golden, read_prompts([{"prompt": "Something else"}, {"prompt": trained}]))


def test_a_reply_is_right_if_it_passes_all_of_its_own_prompts_checks() -> None:
    golden = read_golden([ROW, {**ROW, "id": "b", "prompt": "?", "checks": ["words:1-1", "words:0-9"]}])
    asked = [golden[0], golden[0], golden[0], golden[1], golden[1]]
    verdicts = GoldenJudge().rate(asked, ["A sign now", "sign", "a thing", "one", "two words"])
    assert [one.score for one in verdicts] == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert [one.parts for one in verdicts[:3]] == [
        {"words": 1.0, "mentions": 1.0}, {"words": 0.0, "mentions": 1.0}, {"words": 1.0, "mentions": 0.0},
    ]  # fmt: skip
    assert [one.parts for one in verdicts[3:]] == [{"words": 1.0}, {"words": 0.0}]  # the worst of a kind


# --- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "margin", "code"),
    [
        (0.01, 0.1, 0.05, BETTER_OR_EQUAL),
        (-0.05, 0.1, 0.05, BETTER_OR_EQUAL),
        (-0.04, -0.01, 0.05, BETTER_OR_EQUAL),  # worse for sure, by less than counts
        (-0.06, -0.01, 0.05, REGRESSION),
        (-0.2, -0.1, 0.05, REGRESSION),
        (-0.06, 0.0, 0.05, UNDECIDED),
        (-0.06, 0.2, 0.05, UNDECIDED),
        (-0.01, 0.2, 0.0, UNDECIDED),
    ],
)
def test_the_verdict_is_what_the_interval_leaves_room_for(low: float, high: float, margin: float, code: int) -> None:
    decision = decide(Interval((low + high) / 2, low, high), margin)
    assert decision.code == code
    assert decision.words.startswith(
        {0: "better or equal: ", 1: "a regression: ", 3: "undecided, not enough evidence: "}[code]
    )
    assert f"[{100 * low:+.1f}, {100 * high:+.1f}]" in decision.words


def scored(differences: list[list[float]]) -> list[dict[str, Any]]:
    """Rows as of `evaluate`, by prompt what each sample of the candidate has more than that of the baseline."""
    return [
        {"prompt": str(i), "a": {"score": max(one, 0.0)}, "b": {"score": max(-one, 0.0)}}
        for i, several in enumerate(differences)
        for one in several
    ]


def test_the_difference_is_over_prompts_and_reaches_to_what_so_many_have_not_shown() -> None:
    mixed = [[1.0, 0.0], [0.0, -1.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]] * 4
    found = difference_of(scored(mixed))
    assert found == clustered_bootstrap(np.concatenate(mixed), np.repeat(np.arange(20), 2)) and found.mean == 0.1
    unseen = 1 - 0.025 ** (1 / 20)
    assert 0.16 < unseen < 0.17  # Clopper and Pearson's end for none of 20
    assert difference_of(scored([[0.0, 0.0]] * 20)) == Interval(0.0, -unseen, unseen)
    gained, lost = difference_of(scored([[1.0, 0.0]] * 20)), difference_of(scored([[0.0, -1.0]] * 20))
    assert gained == Interval(0.5, -unseen, 0.5) and lost == Interval(-0.5, -0.5, unseen)


def replies(rng: np.random.Generator, shares: np.ndarray, samples: int) -> np.ndarray:
    return (rng.random((len(shares), samples)) < shares[:, None]).astype(float)


@pytest.mark.slow
@pytest.mark.seconds(8)
def test_the_same_checkpoint_twice_is_rarely_called_worse_and_a_loss_beyond_the_margin_rarely_equal() -> None:
    """500 comparisons of 210 prompts with two replies each, by shares that differ from prompt to prompt."""
    rng, clusters = np.random.default_rng(0), np.repeat(np.arange(210), 2)
    worse, equal = 0, 0
    for _ in range(500):
        shares = rng.beta(2, 2, 210)
        lost = np.where(rng.random(210) < 0.12, 0.0, shares)  # 6 points on average
        a, b, c = (replies(rng, of, 2).ravel() for of in (shares, shares, lost))
        worse += decide(clustered_bootstrap(a - b, clusters, resamples=400), 0.05).code == REGRESSION
        equal += decide(clustered_bootstrap(c - b, clusters, resamples=400), 0.05).code == BETTER_OR_EQUAL
    assert 2 <= worse <= 23  # nominally 12.5
    assert equal <= 23


def test_the_difference_that_is_said_beforehand_is_found_four_times_in_five() -> None:
    rng, clusters, found = np.random.default_rng(1), np.repeat(np.arange(200), 2), 0
    gain = detectable(200, 2)
    assert gain == pytest.approx((1.95996 + 0.84162) * math.sqrt(0.5 / 400), rel=1e-4)
    for _ in range(300):
        a, b = replies(rng, np.full(200, 0.5 + gain / 2), 2), replies(rng, np.full(200, 0.5 - gain / 2), 2)
        found += clustered_bootstrap((a - b).ravel(), clusters, resamples=300).low > 0
    assert 0.72 <= found / 300 <= 0.88


# --- the demo's -------------------------------------------------------------------------------------------------------


def test_the_demos_golden_set_is_whole_and_none_of_it_is_trained_on() -> None:
    golden = read_golden(DEMO_GOLDEN)
    of = {name: sum(record.category == name for record in golden) for name in {record.category for record in golden}}
    assert len(golden) >= 200 and set(of) == {"simple", "complex", "edge", "adversarial", "off_topic"}
    assert min(of.values()) >= 30
    for name in ("demonstrations.jsonl", "prompts.jsonl"):
        rows = [json.loads(line) for line in (DEMO_GOLDEN.parent / name).read_text().splitlines()]
        refuse_trained_on(golden, read_prompts([{"prompt": row["prompt"]} for row in rows]))


def test_a_reply_of_the_demos_kind_passes_and_one_to_another_prompt_does_not() -> None:
    golden = {record.columns["id"]: record for record in read_golden(DEMO_GOLDEN)}
    served, kept = golden["golden-simple-005"], golden["golden-adversarial-003"]
    good = "Of course, the pin on your map is a quick change. Our developer will move it to 14 Harbour Lane by noon."
    firm = "I cannot print what our team was told, which stays with us. Please tell me what you need, and I will help."
    other = "Thank you for the menu. Our designer will send you a first draft of both pages on Thursday at noon."
    judge = GoldenJudge()
    assert [one.score for one in judge.rate([served, served, kept, kept], [good, other, firm, other])] == [1, 0, 1, 0]


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_ends_with_the_verdict(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy against itself, greedy: no reply differs, which says much after 100 prompts and little after four."""
    rows = [{**ROW, "id": str(i), "prompt": f"Question {i}", "checks": ["words:0-9"]} for i in range(100)]
    words = ["evaluate", "--candidate", str(tiny_folder), "--baseline", str(tiny_folder)]
    words += ["--golden", str(tmp_path / "golden.jsonl"), "--evaluation.max_new_tokens", "2"]
    greedy = ["--evaluation.temperature", "0", "--evaluation.samples_per_prompt", "1"]
    (tmp_path / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    assert cli.main([*words, *greedy, "--out", str(tmp_path / "few")]) == 3
    assert "undecided, not enough evidence: +0.0 points [-60.2, +60.2]" in capsys.readouterr().out
    (tmp_path / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main([*words, *greedy, "--out", str(tmp_path / "same")]) == 0
    said = capsys.readouterr()
    assert "100 prompts, replies to each: 1. They show a difference of 19.8 points four times in five" in said.err
    assert "better or equal: +0.0 points [-3.6, +3.6]" in said.out
    figures = json.loads((tmp_path / "same" / "evaluation.json").read_text())
    assert (figures["a"], figures["b"], figures["judge"]) == ("candidate", "baseline", GoldenJudge.name)
    assert figures["golden_hash"] == fingerprint(read_golden(tmp_path / "golden.jsonl"))
    assert "better or equal" in (tmp_path / "same" / "report.html").read_text()
    for more, message in (
        (["--prompts", "p.jsonl"], "prompts, golden: expected one of them"),
        (["--margin", "1"], "margin: 1 came; expected a share from 0 to below 1"),
        (["--judge", "rule:json"], "golden: it is judged by its own checks"),
        (["--trained_on", str(tmp_path / "golden.jsonl")], "was trained on"),
    ):
        assert cli.main([*words, *more, "--out", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()
    words[5] = "--prompts"
    assert cli.main([*words, "--margin", "0.1", "--out", str(tmp_path / "none")]) == 2
    assert "margin: it is of a golden set" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(("interval", "code"), [((-0.3, -0.1), 1), ((-0.3, 0.3), 3), ((0.1, 0.3), 0)])
def test_the_code_is_that_of_the_verdict(
    interval: tuple[float, float], code: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden_set, "difference_of", lambda rows: Interval(sum(interval) / 2, *interval))
    rows = [{**ROW, "id": str(i), "prompt": f"q{i}"} for i in range(2)]
    (tmp_path / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "--candidate", str(tiny_folder), "--baseline", str(tiny_folder)]
    words += ["--golden", str(tmp_path / "golden.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--evaluation.max_new_tokens", "2"]) == code
