"""`demo --human`: a person, played over HTTP, judges what the page shows; a kill keeps it, and the demo goes on."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from html import unescape
from http.cookiejar import CookieJar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from rlhf_fast import cli
from rlhf_fast.feedback.app import session
from rlhf_fast.feedback.progress import Progress, progress
from rlhf_fast.feedback.store import Plan, Store
from rlhf_fast.pages import plots
from tests.processes import verb
from tests.scenarios.test_pipeline import SHORT

WORDS = ["demo", "--tiny", "--human", "--pairs", "6", *SHORT]


def letters(text: str) -> str:
    return re.sub("[^a-z]", "", text)


class Human:
    """Signs in by the link that was printed, and prefers the answer that comes later in the alphabet."""

    def __init__(self, link: str) -> None:
        self.address = link.partition("/join/")[0]
        cookies = urllib.request.HTTPCookieProcessor(CookieJar())
        self.opener = urllib.request.build_opener(cookies, urllib.request.ProxyHandler({}))
        self.page = self.ask(link.removeprefix(self.address))
        assert "autofocus" in self.page  # so that Enter leads on
        self.page = self.ask(link.removeprefix(self.address), {})
        assert "I have read this" in self.page
        self.page = self.ask("/begin", {"csrf": self.field("csrf")})

    def ask(self, path: str, form: dict[str, str] | None = None) -> str:
        body = None if form is None else urllib.parse.urlencode(form).encode()
        return str(self.opener.open(self.address + path, body, timeout=60).read().decode())

    def field(self, name: str) -> str:
        found = re.search(rf'name="{name}" value="([^"]*)"', self.page)
        assert found, self.page
        return found[1]

    def done(self) -> tuple[int, int]:
        found = re.search(r"(\d+) / (\d+) done", self.page)
        assert found, self.page
        return int(found[1]), int(found[2])

    def judge(self, preference: int | None = None) -> None:
        sides = re.findall(r'<h2 id="(?:left|right)-head">.*?<div class="said" dir="auto">(.*?)</div>', self.page, re.S)
        left, right = (letters(unescape(re.sub("<span.*?</span>", "", side))) for side in sides)
        preference = (2 if right > left else -2) if preference is None else preference
        form = {"csrf": self.field("csrf"), "task": self.field("task"), "seconds": "7.0"}
        answers = {"preference": str(preference), "left_ok": "yes", "right_ok": "no"}
        self.page = self.ask("/judge", form | answers)


def printed_link(said: Path, alive: Any) -> str:
    deadline = time.monotonic() + 300
    while not (found := re.search(r"http://127\.0\.0\.1:\d+/join/\S+\n", said.read_text() if said.exists() else "")):
        assert alive() and time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)
    return found[0].strip()


def test_a_person_judges_a_kill_keeps_it_and_the_demo_goes_on_to_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    process = verb([*WORDS, "--out", str(out)], str(said))
    process.start()
    first = Human(printed_link(said, process.is_alive))
    first.judge()
    first.judge(0)
    assert first.done() == (2, 6)
    process.kill()
    process.join()

    monkeypatch.setattr(session, "GRACE", 0.5)
    monkeypatch.setattr(plots, "available", lambda: False)
    again = tmp_path / "again"
    codes: list[int] = []
    second: list[Human] = []

    def judge_the_rest() -> None:
        second.append(Human(printed_link(again, lambda: not codes)))
        assert second[0].done() == (2, 6)
        for _ in range(4):
            second[0].judge()

    person = threading.Thread(target=judge_the_rest)
    person.start()
    with open(again, "w", buffering=1) as file, contextlib.redirect_stdout(file):
        codes.append(cli.main([*WORDS, "--out", str(out)]))
    person.join(60)
    told = again.read_text()
    assert codes == [0], told
    assert "That is enough" in second[0].page
    assert second[0].address == first.address  # a tunnel still leads there
    with pytest.raises(urllib.error.URLError):  # the server has stopped
        second[0].ask("/")

    assert "sft: finished earlier" in told and "6 pairs are to be judged" in told
    assert "learned from 3 pairs that people judged; on 2 others it agrees with them on" in told
    assert "PPO is trained on it all the same" in told and "knows nothing of what people preferred here" in told
    rows = [json.loads(line) for line in (out / "comparisons" / "comparisons.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(letters(row["chosen"]) > letters(row["rejected"]) for row in rows)
    assert {row["annotator"] for row in rows} == {"people"}
    summary = json.loads((out / "comparisons" / "result.json").read_text())["summary"]
    expected = {"judged": 6, "about_equal": 1, "comparisons": 5, "annotator": "people (1)", "seconds_a_pair": 7.0}
    assert summary == summary | expected
    assert "5 pairs that people compared" in (out / "report.html").read_text()
    assert cli.main([word if word != "6" else "7" for word in WORDS] + ["--out", str(out)]) == 1
    assert "started with other settings (pairs: 6 -> 7)" in capsys.readouterr().err


def store_of(folder: Path, pairs: int) -> Store:
    store = Store(folder / "votes.db")
    store.set_plan(Plan(judgements=1, gold_share=0.0, repeat_share=0.0))
    for i in range(pairs):
        store.add_prompt(f"Question {i}?", [f"good {i}", f"bad {i}"])
    return store


def asked(store: Store, folder: Path, wanted: int, monkeypatch: pytest.MonkeyPatch, *preferences: int | str) -> Any:
    """What `ask` comes to when a person answers so, or does something else by name."""
    monkeypatch.setattr(session, "GRACE", 0.5)
    lines: list[str] = []
    person: list[Human] = []

    def sleep(seconds: float) -> None:
        person[:] = person or [Human(lines[1].strip())]
        if not answers:
            time.sleep(0.02)
            return
        answer = answers.pop(0)
        if answer == "Ctrl-C":
            raise KeyboardInterrupt
        if isinstance(answer, int):
            person[0].judge(answer)
        else:
            more = {} if answer == "undo" else {"task": person[0].field("task"), "act": "skip"}
            path = "/undo" if answer == "undo" else "/away"
            person[0].page = person[0].ask(path, {"csrf": person[0].field("csrf"), **more})

    answers = list(preferences)
    with monkeypatch.context() as patch:
        patch.setattr(session, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        found = session.ask(store, folder, wanted, 0, lines.append)
    return found, person[0]


def test_it_goes_on_after_undo_and_asks_for_more_where_too_few_have_a_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path, 9)
    answers = (0, 0, 2, 2, -2, "undo", -2, 2)  # after five, which were to be enough, three have a side
    found, person = asked(store, tmp_path, 5, monkeypatch, *answers)
    assert found == Progress(judged=6, equal=2, left=3, seconds=7.0) == progress(store)
    assert "That is enough" in person.page and 'action="/undo"' in person.page
    assert "autofocus" not in person.page  # one Enter more undoes nothing
    assert session.pace(found, 8) == "2 about equal, 7 s a pair, 14 s left"
    assert session.pace(found, 30) == "2 about equal, 7 s a pair, 3 min left"
    assert session.pace(Progress(0, 0, 9, 0.0), 8) == ""


def test_the_last_answer_may_be_undone_before_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, 6)
    found, person = asked(store, tmp_path, 4, monkeypatch, 2, 2, 2, 2, "undo", -2)
    assert found.judged == 4 and "That is enough" in person.page
    assert session.ask(store, tmp_path, 4, 0, print) == found  # it was enough already: nothing is served


def test_it_ends_when_no_pair_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = asked(store_of(tmp_path, 3), tmp_path, 4, monkeypatch, 2, "skip", 2)
    assert found == Progress(judged=2, equal=0, left=0, seconds=7.0)


def test_ctrl_c_says_what_is_kept_and_frees_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, 6)
    with pytest.raises(KeyboardInterrupt, match=r"1 of 4 pairs are judged and kept; the same command goes on"):
        asked(store, tmp_path, 4, monkeypatch, 2, "Ctrl-C")
    port = store.setting("port")
    with contextlib.closing(session.listen(session.HOST, port)):
        with pytest.raises(ValueError, match=f"port: {port} is in use; choose another, or 0 for a free one"):
            session.ask(store, tmp_path, 4, port, print)
        found, person = asked(store, tmp_path, 4, monkeypatch, 2, 2, 2)
    assert found.judged == 4 and not person.address.endswith(f":{port}")


def test_what_the_demo_refuses_with_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["demo", "--tiny", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--pairs", "30"]) == 2
    assert "give --human, too" in capsys.readouterr().err
    assert cli.main([*words, "--human", "--pairs", "97"]) == 1
    assert "pairs: 97; the replies make 96 pairs at most" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([*words, "--human"]) == 1
    assert "demo --human needs the package fastapi; pip install 'rlhf-fast[annotate]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
