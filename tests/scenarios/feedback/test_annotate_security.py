"""The web application against those who should not: forged, foreign, oversized and malformed requests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("rlhf_fast.feedback.store")

from starlette.testclient import TestClient

from rlhf_fast.feedback import quality
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.app.hostile import shown
from rlhf_fast.feedback.app.security import COOKIE, MOST_BODY, Access, Logins, Rates, read_secret
from rlhf_fast.feedback.app.server import application
from rlhf_fast.feedback.errors import FeedbackError
from rlhf_fast.feedback.store import Plan, Store

SECRET = "s" * 40
EVIL = "<script>alert(1)</script>\u202e\u200bhttps://evil.example"


class Site:
    def __init__(self, folder: Path, **options: Any) -> None:
        self.store = Store(folder / "votes.db")
        self.store.set_plan(Plan(judgements=2, gold_share=0.0, repeat_share=0.0))
        for i in range(4):
            texts = [{"text": f"{EVIL} {i} a", "checkpoint": "secret-model-a"}, {"text": f"plain {i} b"}]
            self.store.add_prompt(f"Question {i}? {EVIL}", texts, category="chat")
        self.app = application(self.store, Access(SECRET), folder, **options)

    def client(self) -> TestClient:
        return TestClient(self.app, base_url="http://127.0.0.1:8000", follow_redirects=False)

    def joined(self, name: str, role: str = "annotator") -> TestClient:
        client = self.client()
        assert client.post(f"/join/{self.store.invite(name, role)}").status_code == 303
        return client


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def fields(client: TestClient, path: str = "/") -> dict[str, str]:
    text = client.get(path).text
    found = {name: re.search(rf'name="{name}" value="(\w+)"', text) for name in ("csrf", "task")}
    return {name: match[1] for name, match in found.items() if match}


ANSWER = {"preference": "-2", "left_ok": "yes", "right_ok": "no", "seconds": "9"}


def test_a_judgement_comes_in_and_can_be_undone(site: Site) -> None:
    client = site.joined("Ann")
    given = fields(client)
    extra = {"comment": EVIL, "criterion honesty": "1"}
    assert client.post("/judge", data={**given, **ANSWER, **extra}).status_code == 303
    (vote,) = quality.counting_votes(site.store)
    sign = -1 if vote["swapped"] else 1
    assert (vote["preference"], vote["criteria"], vote["comment"]) == (-2 * sign, {"honesty": sign}, EVIL)
    assert client.post("/undo", data=given).status_code == 303
    assert quality.counting_votes(site.store) == []
    assert fields(client)["task"] == given["task"] and "&lt;script&gt;" in client.get("/").text


def test_what_models_and_people_write_is_text(site: Site) -> None:
    client = site.joined("<b>Owner</b>", "owner")
    for path in ("/", "/owner", "/guidelines"):
        text = client.get(path).text
        assert "<script>alert" not in text and "<b>Owner" not in text and "\u202e" not in text and "\u200b" not in text
        assert "secret-model-a" not in text and 'href="https://evil' not in text
    assert "U+202E" in client.get("/").text
    assert str(shown("a\x00\x9b\u2066\U000e0041<")).count('class="mark"') == 4


@pytest.mark.parametrize(
    "cookie",
    ["", "x", "eyJwZXJzb24iOjF9.aaaa.bbbb", Logins("t" * 40).cookie(1, "a" * 16)],
    ids=["none", "no cookie", "no signature", "another secret"],
)
def test_a_forged_cookie_opens_nothing(site: Site, cookie: str) -> None:
    site.store.invite("Owner", "owner")
    client = site.client()
    client.cookies.set(COOKIE, cookie)
    assert [client.get(path).status_code for path in ("/", "/owner", "/senior", "/owner/comparisons.jsonl")] == [
        401
    ] * 4
    assert client.post("/judge", data=ANSWER).status_code == 401
    assert client.get("/join/" + "x" * 43).status_code == 404


def test_a_session_ends_with_the_person_or_the_link_and_not_with_a_restart(site: Site, tmp_path: Path) -> None:
    for end in (site.store.renew, site.store.remove_person):
        client = site.joined("Ann")
        cookie = client.cookies[COOKIE]
        again = TestClient(application(site.store, Access(SECRET), tmp_path), base_url="http://127.0.0.1:8000")
        again.cookies.set(COOKIE, cookie)
        assert again.get("/").status_code == client.get("/").status_code == 200
        end(site.store.people()[-1].id)
        assert again.get("/").status_code == client.get("/").status_code == 401


def test_who_is_removed_in_the_midst_of_a_request_gets_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client = site.joined("Ann")
    given, ann = fields(client), site.store.people()[-1]
    site.store.remove_person(ann.id)
    monkeypatch.setattr(site.store, "person", lambda number, mark: ann)  # the login had been read before
    assert client.get("/").status_code == 401
    for path in ("/judge", "/draft", "/away", "/undo"):
        assert client.post(path, data={**given, **ANSWER, "act": "skip"}).status_code == 401, path
    with site.store.read() as connection:
        states = connection.execute(t.assignment.select()).all()
        assert [row.state for row in states] == ["expired"] and quality.counting_votes(site.store) == []


def test_criteria_that_are_not_in_force_are_refused_by_name(site: Site) -> None:
    scale = ["Left", "A little left", "A little right", "Right"]
    site.store.set_setting("criteria", [{"name": "tone", "title": "Tone", "examples": [EVIL], "scale": scale}])
    client = site.joined("Ann")
    text = client.get("/").text
    assert "A little right" in text and 'name="criterion tone"' in text and "criterion honesty" not in text
    given = {**fields(client), **ANSWER}
    for extra, words in (
        ({"criterion honesty": "1"}, "honesty"),
        ({"criterion tone": "0"}, "scale has -2, -1, 1, 2"),
    ):
        answer = client.post("/judge", data={**given, **extra})
        assert answer.status_code == 409 and words in answer.text
    assert client.post("/judge", data={**given, "criterion tone": "2"}).status_code == 303
    (vote,) = quality.counting_votes(site.store)
    assert vote["criteria"] == {"tone": -2 if vote["swapped"] else 2}


def test_one_person_cannot_act_for_another(site: Site) -> None:
    ann, bob = site.joined("Ann"), site.joined("Bob")
    hers, his = fields(ann), fields(bob)
    for path in ("/judge", "/draft", "/away"):
        data = {**ANSWER, "act": "skip", "task": hers["task"], "csrf": his["csrf"]}
        assert bob.post(path, data=data).status_code == 404, path
    for token in ("", hers["csrf"], "é"):
        assert bob.post("/judge", data={**ANSWER, "task": his["task"], "csrf": token}).status_code == 403
    assert quality.counting_votes(site.store) == []
    assert [bob.get(path).status_code for path in ("/owner", "/senior", "/senior/1")] == [403] * 3
    assert bob.post("/owner/invite", data={**his, "name": "x", "role": "owner"}).status_code == 403


def test_malformed_and_oversized_bodies_are_refused(site: Site) -> None:
    client = site.joined("Ann")
    given = fields(client)
    for wrong in ({"preference": "9"}, {"preference": "x"}, {"left_ok": "maybe"}, {"task": "1e9"}, {"task": "9" * 15},
                  {"seconds": "inf"}, {"comment": "x" * 4001}, {"comment": "\x00"}):  # fmt: skip
        assert 400 <= client.post("/judge", data={**given, **ANSWER, **wrong}).status_code < 500, wrong
    assert client.post("/judge", data=given).status_code == 422
    assert client.post("/judge", content=b"x" * (MOST_BODY + 1)).status_code == 413
    parts = iter([b"x" * MOST_BODY, b"x"])
    assert client.post("/judge", content=parts).status_code == 413
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert 400 <= client.post("/judge", content=b"--x\r\nrubbish", headers=kind).status_code < 500
    assert quality.counting_votes(site.store) == []


def test_hosts_sites_and_rates(site: Site, tmp_path: Path) -> None:
    client = site.joined("Ann")
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    given = fields(client)
    foreign = {"sec-fetch-site": "cross-site"}
    assert client.post("/judge", data={**given, **ANSWER}, headers=foreign).status_code == 403
    slow = Site(tmp_path / "slow", rate=0.001, burst=5).joined("Ann")
    assert [slow.get("/guidelines").status_code for _ in range(6)].count(429) in (1, 2)
    rates = Rates(1.0, 2)
    assert [rates.allows("a", 0.0) for _ in range(3)] == [True, True, False]
    assert rates.allows("b", 0.0) and rates.allows("a", 1.5)
    joining = site.client()
    assert 429 in {joining.get(f"/join/{i}").status_code for i in range(25)}


def test_every_answer_has_the_policy_and_the_cookie_is_strict(site: Site) -> None:
    client = site.client()
    answer = client.post(f"/join/{site.store.invite('Ann')}")
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=lax" in answer.headers["set-cookie"]
    for reply in (answer, client.get("/"), client.get("/static/judge.js"), client.get("/none")):
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert " style=" not in client.get("/").text and " onclick" not in client.get("/").text


def test_beyond_loopback_a_secret_and_tls_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_FAST_ANNOTATE_SECRET", raising=False)
    with pytest.raises(FeedbackError, match=r"host: 0\.0\.0\.0 is beyond this machine, which needs a secret"):
        read_secret(tmp_path, "0.0.0.0")
    made = read_secret(tmp_path, "127.0.0.1")
    assert made == read_secret(tmp_path, "::1") and (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("RLHF_FAST_ANNOTATE_SECRET", SECRET)
    assert read_secret(tmp_path, "0.0.0.0") == SECRET
    with pytest.raises(FeedbackError, match=r"host: 0\.0\.0\.0 is beyond this machine and nothing encrypts"):
        Access(SECRET, "0.0.0.0")
    with pytest.raises(FeedbackError, match="secret: 3 characters came; expected at least 32"):
        Access("abc")
    for address in ("http://x", "https://", "https:///", "https://x/judge"):
        with pytest.raises(FeedbackError, match=f"proxy: '{address}' came"):
            Access(SECRET, public=address)
    assert Access(SECRET, public="https://x/").is_host("x")
    behind = Access(SECRET, "0.0.0.0", "https://judge.example.org")
    assert behind.is_secure and behind.is_host("judge.example.org") and not behind.is_host("127.0.0.1")


def test_two_annotators_differ_and_a_senior_decides_before_seeing_their_votes(site: Site) -> None:
    for name, side in (("Ann", "-2"), ("Bob", "2")):
        client = site.joined(name)
        for _ in range(4):
            given = fields(client)
            assert client.post(
                "/judge", data={**given, **ANSWER, "preference": side, "comment": f"by {name}"}
            ).is_redirect
        assert "Nothing is left" in client.get("/").text
    found = quality.disputed(site.store)
    assert found  # sides are drawn for each, so that left and right are not the same answer everywhere
    senior = site.joined("Cleo", "owner")
    path = f"/senior/{found[0].pair}"
    assert "by Ann" not in senior.get(path).text
    after = senior.post("/senior", data={**fields(senior, path), **ANSWER}).text
    assert "by Ann" in after and "by Bob" in after
    assert found[0].pair not in {one.pair for one in quality.disputed(site.store)}
    votes = quality.counting_votes(site.store)
    assert len([vote for vote in votes if vote["pair"] == found[0].pair]) == 3  # those of both are as they were
    text = senior.get("/owner").text
    assert "Cohen&#39;s kappa" in text and "Ann / Bob" in text and "too few to act on" in text and "<svg" in text
    data = {**fields(senior, "/owner"), "person": "2", "votes": "keep"}
    link = re.search(r"/join/[\w-]+", senior.post("/owner/renew", data=data).text)
    assert link and site.client().get(link[0]).status_code == 200
    assert senior.post("/owner/remove", data=data).status_code == 303
    assert site.client().get(link[0]).status_code == 404 and "Ann / removed" in senior.get("/owner").text
    assert senior.post("/owner/renew", data=data).status_code == 409
    lines = senior.get("/owner/comparisons.jsonl").text.splitlines()
    assert len(lines) == 4 and "by Ann" not in lines[0]
    assert senior.post("/owner/backup", data=fields(senior, "/owner")).status_code == 200
